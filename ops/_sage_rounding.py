"""Q and K rounded to int8, K less its mean, V as float16: one kernel for what SageAttention 1.0.6 launches four for.

Its attention kernels take a scale for each block of 128 rows of Q and of 64 keys, blocks of a head together. Triton;
nothing here may be imported before a GPU call needs it.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._quick_launch import launch
from ._sage_library import BLOCK_K, BLOCK_Q
from ._triton_tiles import load_rows, store_rows

_PLAIN = [
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "q_length", "k_length",
    "heads", "key_heads", "scale",
]  # fmt: skip


@triton.jit
def round_rows(rows):
    """int8 of a block of float32 rows, and its scale: the largest becomes 127, halves go away from 0."""
    scale = tl.max(tl.max(tl.abs(rows), 1), 0) / 127.0
    whole = rows / tl.where(scale > 0.0, scale, 1.0)
    return (whole + tl.where(whole >= 0.0, 0.5, -0.5)).to(tl.int8), scale


@triton.jit
def round_queries(Q, Q8, Scale, number, block, head, batch_stride, row_stride, head_stride, length, heads, scale,
                  D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of a head of Q times ``scale``; see :func:`round_all`."""
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    offsets = (number * batch_stride + rows.to(tl.int64) * row_stride + head * head_stride) * UNIT
    tile = load_rows(Q, offsets, inside, 0, WIDTH, D, True).to(tl.float32) * scale
    whole, of = round_rows(tile)
    store_rows(Q8, ((number * length + rows) * heads + head) * WIDTH, inside, whole, 0, WIDTH, WIDTH)
    tl.store(Scale + (number * heads + head) * tl.cdiv(length, BLOCK) + block, of)


@triton.jit
def round_keys(K, V, Mean, K8, V16, Scale, number, block, head, k_batch, k_row, k_head, v_batch, v_row, v_head, length,
               heads, D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One block of a head of K less its mean, and of V; see :func:`round_all`."""
    blocks = tl.cdiv(length, BLOCK)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    columns = tl.arange(0, WIDTH)
    mean = tl.load(Mean + (number * heads + head) * D + columns, mask=columns < D, other=0.0).to(tl.float32)
    offsets = (number * k_batch + rows.to(tl.int64) * k_row + head * k_head) * UNIT
    tile = load_rows(K, offsets, inside, 0, WIDTH, D, True).to(tl.float32) - mean[None, :]
    whole, of = round_rows(tl.where(inside[:, None], tile, 0.0))
    places = ((number * length + rows) * heads + head) * WIDTH
    store_rows(K8, places, inside, whole, 0, WIDTH, WIDTH)
    place = (number * heads + head) * blocks + block
    tl.store(Scale + place, of)
    last = (block == blocks - 1) & (head == heads - 1) & (number == tl.num_programs(1) - 1)
    tl.store(Scale + place + 1, 0.0, mask=last)
    offsets = (number * v_batch + rows.to(tl.int64) * v_row + head * v_head) * UNIT
    store_rows(V16, places, inside, load_rows(V, offsets, inside, 0, WIDTH, D, True), 0, WIDTH, WIDTH)


@triton.jit(do_not_specialize=_PLAIN)
def round_all(
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
    of_queries = tl.cdiv(q_length, BLOCK_Q) * heads
    if program < of_queries:
        round_queries(
            Q, Q8, ScaleQ, number, program // heads, (program % heads).to(tl.int64), q_batch, q_row, q_head, q_length,
            heads, scale, D, WIDTH, UNIT, BLOCK_Q,
        )  # fmt: skip
    else:
        rest = program - of_queries
        round_keys(
            K, V, Mean, K8, V16, ScaleK, number, rest // key_heads, (rest % key_heads).to(tl.int64), k_batch, k_row,
            k_head, v_batch, v_row, v_head, k_length, key_heads, D, WIDTH, UNIT, BLOCK_K,
        )  # fmt: skip


def round_blocks(
    q: Tensor, k: Tensor, v: Tensor, mean: Tensor, scale: float, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """int8 Q * ``scale`` and K - ``mean``, float16 V, (B, S, H, ``width``); scales (B, H, blocks, 1) of Q and of K.

    ``mean`` is (B, 1, Hk, D). Behind K's scales lies a 0: the causal kernels of every release read blocks of keys in
    pairs, and so the scale of one that is not there where their number is odd. Its keys count for nothing, but NaN,
    if that was left in memory, times 0 is NaN (seen on an H200).
    """
    batch, q_length, heads, head_dim = q.shape
    k_length, key_heads = k.shape[1:3]
    q, k, v = (tensor if tensor.stride(3) == 1 else tensor.contiguous() for tensor in (q, k, v))
    q_blocks, k_blocks = -(-q_length // BLOCK_Q), -(-k_length // BLOCK_K)
    q8 = torch.empty((batch, q_length, heads, width), dtype=torch.int8, device=q.device)
    k8 = torch.empty((batch, k_length, key_heads, width), dtype=torch.int8, device=q.device)
    v16 = torch.empty((batch, k_length, key_heads, width), dtype=torch.float16, device=q.device)
    scales = [
        torch.empty(count, dtype=torch.float32, device=q.device)
        for count in (batch * heads * q_blocks, batch * key_heads * k_blocks + 1)
    ]
    strides = [stride for tensor in (q, k, v) for stride in tensor.stride()[:3]]
    unit = 1 if any(stride % 8 for stride in strides) else 8
    launch(
        round_all, (q_blocks * heads + k_blocks * key_heads, batch, 1),
        (
            q, k, v, mean, q8, k8, v16, *scales, *(stride // unit for stride in strides), q_length, k_length, heads,
            key_heads, scale,
        ),
        {"D": head_dim, "WIDTH": width, "UNIT": unit, "BLOCK_Q": BLOCK_Q, "BLOCK_K": BLOCK_K}, 8, q.device.index,
    )  # fmt: skip
    return (
        q8, k8, v16, scales[0].view(batch, heads, q_blocks, 1), scales[1][:-1].view(batch, key_heads, k_blocks, 1)
    )  # fmt: skip
