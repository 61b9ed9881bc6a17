"""Q and K rounded to int8, K less its mean, V as float16: one kernel in place of the library's own three or four.

SageAttention's attention kernels take a scale for each block of 128 rows of Q and of 64 keys of a sequence. Triton;
nothing here may be imported before a GPU call needs it.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._packing import in_units
from ._quick_launch import launch
from ._sage_library import BLOCK_K, BLOCK_Q
from ._triton_tiles import load_rows, store_rows

_DENSE = [
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "q_length", "k_length",
    "heads", "key_heads", "scale",
]  # fmt: skip
_PACKED = [*_DENSE[1:9], "q_blocks", *_DENSE[10:]]
_SUMS = ["k_batch", "k_row", "k_head", "keep_batch", "keep_key", "length", "heads", "parts"]
# keys that one program of sum_keys adds up, and at a time
_SUMMED, _SUM_BLOCK = 256, 64

Rounded = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def round_rows(rows):
    """int8 of a block of float32 rows, and its scale: the largest becomes 127, halves go away from 0."""
    scale = tl.max(tl.max(tl.abs(rows), 1), 0) / 127.0
    whole = rows / tl.where(scale > 0.0, scale, 1.0)
    return (whole + tl.where(whole >= 0.0, 0.5, -0.5)).to(tl.int8), scale


@triton.jit
def round_queries(
    Q, Q8, Scale, base, place, of, block, head, row_stride, head_stride, length, heads, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a head of a sequence of Q times ``scale``. The sequence starts at ``base`` in Q, in units, and at
    row ``place`` of Q8; the scale of the block is number ``of``.
    """
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    offsets = (base + rows.to(tl.int64) * row_stride + head * head_stride) * UNIT
    tile = load_rows(Q, offsets, inside, 0, WIDTH, D, True).to(tl.float32) * scale
    whole, largest = round_rows(tile)
    store_rows(Q8, ((place + rows) * heads + head) * WIDTH, inside, whole, 0, WIDTH, WIDTH)
    tl.store(Scale + of, largest)


@triton.jit
def round_keys(
    K, V, Mean, K8, V16, Scale, numbers, keys, inside, places, of, mean_at, head, k_batch, k_row, k_head, v_batch,
    v_row, v_head, heads, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One block of a head of K less its mean, and of V: ``keys`` of the sequences ``numbers``, to rows ``places``."""
    columns = tl.arange(0, WIDTH)
    mean = tl.load(Mean + (mean_at * heads + head) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    offsets = (numbers * k_batch + keys * k_row + head * k_head) * UNIT
    tile = load_rows(K, offsets, inside, 0, WIDTH, D, True).to(tl.float32) - mean[None, :]
    whole, largest = round_rows(tl.where(inside[:, None], tile, 0.0))
    targets = (places * heads + head) * WIDTH
    store_rows(K8, targets, inside, whole, 0, WIDTH, WIDTH)
    tl.store(Scale + of, largest)
    offsets = (numbers * v_batch + keys * v_row + head * v_head) * UNIT
    store_rows(V16, targets, inside, load_rows(V, offsets, inside, 0, WIDTH, D, True), 0, WIDTH, WIDTH)


@triton.jit(do_not_specialize=_DENSE)
def round_dense(
    Q, K, V, Mean, Q8, K8, V16, ScaleQ, ScaleK, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    q_length, k_length, heads, key_heads, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Q, K, V (B, S, H, D), strides in units of UNIT elements, to (B, S, H, WIDTH), dense, 0 behind column D.

    ScaleQ (B, H, blocks) has ``scale`` in it; ScaleK (B, Hk, blocks) has one number more behind the last one.
    Grid: a program for each block of a head of Q, then of K and V together, heads of a block beside each other; batch.
    """
    number = tl.program_id(1).to(tl.int64)
    program = tl.program_id(0)
    q_blocks = tl.cdiv(q_length, BLOCK_Q)
    if program < q_blocks * heads:
        block = program // heads
        head = (program % heads).to(tl.int64)
        round_queries(
            Q, Q8, ScaleQ, number * q_batch, number * q_length, (number * heads + head) * q_blocks + block, block, head,
            q_row, q_head, q_length, heads, scale, D, WIDTH, UNIT, BLOCK_Q,
        )  # fmt: skip
    else:
        rest = program - q_blocks * heads
        k_blocks = tl.cdiv(k_length, BLOCK_K)
        block_of_keys = rest // key_heads
        key_head = (rest % key_heads).to(tl.int64)
        keys = (block_of_keys * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        of = (number * key_heads + key_head) * k_blocks + block_of_keys
        round_keys(
            K, V, Mean, K8, V16, ScaleK, number, keys, keys < k_length, number * k_length + keys, of, number, key_head,
            k_batch, k_row, k_head, v_batch, v_row, v_head, key_heads, D, WIDTH, UNIT,
        )  # fmt: skip
        tl.store(ScaleK + of + 1, 0.0, mask=of + 1 == k_blocks * key_heads * tl.num_programs(1))


@triton.jit(do_not_specialize=_PACKED)
def round_packed(
    Q, K, V, Mean, Source, StartsQ, StartsK, BlocksQ, BlocksK, Q8, K8, V16, ScaleQ, ScaleK,
    q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, q_blocks, k_length, heads, key_heads, scale,
    GATHER: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for packed sequences: Q (Tq, H, D), K and V (Tk, Hk, D), rows that StartsQ and StartsK (N + 1,) cut.

    GATHER: K and V are (B, ``k_length``, Hk, D), and row t of the packed ones is row Source[t] of all of theirs.
    Mean (N, Hk, D). Scales (blocks, H), those of sequence n from BlocksQ[n], BlocksK[n] on. Grid: as many programs as
    the longest sequences have blocks of a head, ``q_blocks`` of Q and then those of K and V; N.
    """
    number = tl.program_id(1)
    program = tl.program_id(0)
    if program < q_blocks * heads:
        block = program // heads
        head = (program % heads).to(tl.int64)
        begin = tl.load(StartsQ + number).to(tl.int64)
        count = tl.load(StartsQ + number + 1) - begin
        if block * BLOCK_Q < count:
            of = (tl.load(BlocksQ + number) + block) * heads + head
            round_queries(
                Q, Q8, ScaleQ, begin * q_row, begin, of, block, head, q_row, q_head, count, heads, scale, D, WIDTH,
                UNIT, BLOCK_Q,
            )  # fmt: skip
    else:
        rest = program - q_blocks * heads
        block_of_keys = rest // key_heads
        key_head = (rest % key_heads).to(tl.int64)
        first = tl.load(StartsK + number).to(tl.int64)
        keys_left = tl.load(StartsK + number + 1) - first - block_of_keys * BLOCK_K
        if keys_left > 0:
            inside = tl.arange(0, BLOCK_K) < keys_left
            places = first + block_of_keys * BLOCK_K + tl.arange(0, BLOCK_K)
            of_keys = (tl.load(BlocksK + number) + block_of_keys) * key_heads + key_head
            if GATHER:
                rows = tl.load(Source + places, mask=inside, other=0)
                numbers = (rows // k_length).to(tl.int64)
                keys = rows - numbers * k_length
            else:
                numbers = tl.zeros([BLOCK_K], tl.int64)
                keys = places
            round_keys(
                K, V, Mean, K8, V16, ScaleK, numbers, keys, inside, places, of_keys, number.to(tl.int64), key_head,
                k_batch, k_row, k_head, v_batch, v_row, v_head, key_heads, D, WIDTH, UNIT,
            )  # fmt: skip


@triton.jit(do_not_specialize=_SUMS)
def sum_keys(
    K, Keep, Sums, k_batch, k_row, k_head, keep_batch, keep_key, length, heads, parts,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums (B, parts, Hk, D), float32, of the real keys among each ROWS of K (B, S, Hk, D). Grid: parts * Hk, B."""
    number = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    total = tl.zeros([WIDTH], tl.float32)
    for begin in range(part * ROWS, part * ROWS + ROWS, BLOCK):
        keys = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        real = tl.load(Keep + number * keep_batch + keys * keep_key, mask=keys < length, other=False)
        offsets = (number * k_batch + keys * k_row + head * k_head) * UNIT
        total += tl.sum(load_rows(K, offsets, real & (keys < length), 0, WIDTH, D, True).to(tl.float32), 0)
    columns = tl.arange(0, WIDTH)
    tl.store(Sums + ((number * parts + part) * heads + head) * D + columns, total, mask=columns < D)


def _room(q: Tensor, keys: tuple[int, ...], width: int) -> list[Tensor]:
    """int8 Q and K and float16 V, ``width`` wide; ``keys`` are the other sizes of K."""
    sizes = ((*q.shape[:-1], width), (*keys, width), (*keys, width))
    kinds = (torch.int8, torch.int8, torch.float16)
    return [torch.empty(size, dtype=dtype, device=q.device) for size, dtype in zip(sizes, kinds, strict=True)]


def dense(q: Tensor, k: Tensor, v: Tensor, mean: Tensor, scale: float, width: int) -> Rounded:
    """int8 Q * ``scale`` and K - ``mean``, float16 V, (B, S, H, ``width``); scales (B, H, blocks, 1) of Q and of K.

    ``mean`` is (B, 1, Hk, D). Behind K's scales lies a 0: the causal kernels of every release read blocks of keys in
    pairs, and so the scale of one that is not there where their number is odd. Its keys count for nothing, but NaN,
    if that was left in memory, times 0 is NaN (seen on an H200). (Behind other heads the next one's scale lies, which
    is NaN or infinite only if a key there is.)
    """
    batch, q_length, heads, head_dim = q.shape
    k_length, key_heads = k.shape[1:3]
    (q, k, v), strides, unit = in_units(q, k, v)
    q_blocks, k_blocks = -(-q_length // BLOCK_Q), -(-k_length // BLOCK_K)
    rows = _room(q, tuple(k.shape[:-1]), width)
    scales = [
        torch.empty(count, dtype=torch.float32, device=q.device)
        for count in (batch * heads * q_blocks, batch * key_heads * k_blocks + 1)
    ]
    launch(
        round_dense, (q_blocks * heads + k_blocks * key_heads, batch, 1),
        (q, k, v, mean, *rows, *scales, *strides, q_length, k_length, heads, key_heads, scale),
        {"D": head_dim, "WIDTH": width, "UNIT": unit, "BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K}, 8, q.device.index,
    )  # fmt: skip
    return (
        rows[0], rows[1], rows[2], scales[0].view(batch, heads, q_blocks, 1),
        scales[1][:-1].view(batch, key_heads, k_blocks, 1),
    )  # fmt: skip


def packed(
    q: Tensor, k: Tensor, v: Tensor, mean: Tensor, source: Tensor | None, starts: tuple[Tensor, Tensor],
    blocks: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float, width: int,
) -> Rounded:  # fmt: skip
    """The same for packed Q (Tq, H, D), K and V (Tk, Hk, D); scales (blocks, H) of Q and of K.

    With ``source`` (int32, a masks.packing) K and V are (B, Sk, Hk, D) instead. ``mean`` is (N, Hk, D); ``starts`` are
    cu_seqlens, ``blocks`` (int64) say where the scales of a sequence start, with one to spare behind each; sequences
    have at most ``longest`` rows.
    """
    heads, head_dim = q.shape[1:]
    key_heads, k_length = k.shape[-2], k.shape[-3]
    sequences = starts[0].shape[0] - 1
    if source is None:
        k, v = k[None], v[None]
    (q, k, v), strides, unit = in_units(q, k, v)
    q_blocks, k_blocks = -(-longest[0] // BLOCK_Q), -(-longest[1] // BLOCK_K)
    rows = _room(q, (k.shape[0] * k_length, key_heads), width)
    # No more than this many, whatever the lengths are: nobody waits for them.
    scales = [
        torch.zeros((total // block + 2 * sequences, count), dtype=torch.float32, device=q.device)
        for total, block, count in ((q.shape[0], BLOCK_Q, heads), (rows[1].shape[0], BLOCK_K, key_heads))
    ]
    if sequences:
        launch(
            round_packed, (q_blocks * heads + k_blocks * key_heads, sequences, 1),
            (
                q, k, v, mean, starts[1] if source is None else source, *starts, *blocks, *rows, *scales, *strides,
                q_blocks, k_length, heads, key_heads, scale,
            ),
            {
                "GATHER": source is not None, "D": head_dim, "WIDTH": width, "UNIT": unit, "BLOCK_Q": BLOCK_Q,
                "BLOCK_K": BLOCK_K,
            },
            8, q.device.index,
        )  # fmt: skip
    return rows[0], rows[1], rows[2], scales[0], scales[1]


def mean_of_real(k: Tensor, key_padding: Tensor) -> Tensor:
    """Mean of the real keys of each sequence of K (B, Sk, Hk, D), float32 (B, Hk, D); 0 where there is none."""
    batch, length, heads, head_dim = k.shape
    parts = -(-length // _SUMMED)
    (k,), strides, unit = in_units(k)
    sums = torch.empty((batch, parts, heads, head_dim), dtype=torch.float32, device=k.device)
    width = triton.next_power_of_2(head_dim)
    launch(
        sum_keys, (parts * heads, batch, 1),
        (k, key_padding, sums, *strides, *key_padding.stride(), length, heads, parts),
        {"D": head_dim, "WIDTH": width, "UNIT": unit, "ROWS": _SUMMED, "BLOCK": _SUM_BLOCK}, 4, k.device.index,
    )  # fmt: skip
    return sums.sum(1) / key_padding.sum(1).clamp(min=1)[:, None, None]
