"""Host side of the Gluon kernel for sm_90: tensors to TMA descriptors, grids. Imports triton; only GPU calls need it.

Nothing here reads a tensor's values. A descriptor is a kernel argument (128 bytes by value), so a CUDA graph keeps it.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, report

from ._hopper_forward import hopper_forward
from ._hopper_pairs import misplaced
from ._hopper_plan import RECORD, gather_keys, key_blocks, tile_plan
from ._quick_launch import launch, on

ROWS = 64
FAR = 1 << 30
# a dimension that is never too short for FAR, and a stride that wraps FAR times itself to 0 (in elements of 2 bytes
# and up)
_LONG, _WRAP = 0x7FFF0000, 1 << 34
# Bytes of keys and values of the heads worked on at a time, for causal calls: more than the 50 MB of L2, as balance
# counts for more, less than what would be read from memory again and again.
_TOGETHER = 64 << 20
_PLAN_BLOCK = 128
_KEY_BLOCK = 2048
# of elements, 16 bytes: :func:`readable` has them start there
_UNIT = 8
# 16 x 512: as fast as any other and few programs where there is little to copy (H200)
_COPY_ROWS, _COPY_COLUMNS = 16, 512


@dataclass(frozen=True)
class Config:
    """Computing warpgroups (64 rows each), keys of a block, tiles of Q, blocks of K and of V in memory, registers
    of a computing thread (of the first warpgroup: at least; it gets what is left).

    ``alternate``: the warpgroups take turns at the tensor cores. ``held``: rows of Q stay in registers. ``named``: the
    slots of K and V, at most 5, are given back through named barriers. ``paired``: two programs share what they load;
    only with ``named``.
    """

    consumers: int
    block_k: int
    q_slots: int
    k_slots: int
    v_slots: int
    registers: int
    alternate: bool = True
    held: bool = False
    named: bool = False
    paired: bool = False

    def constants(self) -> dict[str, Any]:
        """What the kernel is compiled for, in the order of its parameters."""
        return {
            "CONSUMERS": self.consumers, "BLOCK_K": self.block_k, "Q_SLOTS": self.q_slots, "K_SLOTS": self.k_slots,
            "V_SLOTS": self.v_slots, "REGISTERS": self.registers, "ALTERNATE": self.alternate, "HELD": self.held,
            "NAMED": self.named, "PAIRED": self.paired,
        }  # fmt: skip


# head columns in shared memory -> configuration of dense calls, of programs that work alone (packed calls, and dense
# ones that do not make enough pairs), and of causal masks and windows
_WIDE = Config(2, 64, 1, 2, 3, 240, alternate=False)
_NAMED = Config(2, 128, 2, 2, 3, 240, held=True, named=True)
TABLE: dict[int, tuple[Config, Config, Config]] = {
    64: (Config(3, 128, 2, 3, 4, 160), Config(3, 128, 2, 3, 4, 160), Config(2, 128, 2, 3, 4, 240)),
    # Q in registers: 1.01 flux and wan480; 0.96 of the speed where a loop with tests needs the registers. Named
    # barriers: 1.01 flux, 1.02 wan480 and cross, level causal; 0.985 at 64 columns (with numbers 5 to 7 for turns)
    # Pairs: 1.04 wan480, 1.03 qwen, 1.01 flux and cross
    128: (replace(_NAMED, paired=True), _NAMED, Config(2, 128, 2, 2, 3, 240, named=True)),
    # without turns: as fast, and less to wait for
    256: (_WIDE, _WIDE, _WIDE),
}


def width_of(head_dim: int) -> int:
    """Columns of a tile: what lies behind head_dim reads as zeros.

    >>> [width_of(head_dim) for head_dim in (16, 64, 72, 256)]
    [64, 64, 128, 256]
    """
    return next(width for width in TABLE if head_dim <= width)


def choose(head_dim: int, positional: bool, alone: bool) -> Config:
    """The configuration for a head_dim; ``positional``: with a causal mask or a window."""
    return TABLE[width_of(head_dim)][2 if positional else int(alone)]


def better_alone(q_length: int, heads: int, processors: int) -> bool:
    """Whether pairs, whose tiles are twice as long, would take over 2 % more rounds than programs alone; ``heads``: of
    all the batch.
    """
    tiles = -(-q_length // (2 * ROWS))
    pairs = -(-tiles // 2)
    # rounds over all programs, and over all pairs
    alone, paired = -(-tiles * heads // processors), -(-pairs * heads // (processors // 2))
    return 50 * paired > 51 * alone


# what check_pairs found in this process
_misplaced: list[str] = []


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def readable(tensor: Tensor) -> Tensor:
    """``tensor``, copied unless TMA can read it: columns together, rows at multiples of 16 bytes, none expanded."""
    *outer, columns = zip(tensor.shape, tensor.stride(), strict=True)
    if (
        (columns[1] == 1 or columns[0] == 1)
        and tensor.data_ptr() % 16 == 0
        and all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in outer)
    ):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.cache
def layout(width: int) -> NVMMASharedLayout:
    return NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=5)


def _descriptor(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """Tiles of ``rows`` rows of one head; see hopper_forward for the dimensions."""
    shape = tensor.shape
    # the stride of a dimension of one element is anything
    strides = [8 if size == 1 else stride for size, stride in zip(shape, tensor.stride(), strict=True)]
    if len(shape) == 3:
        sizes = [_LONG, _LONG, shape[1], FAR, shape[2]]
        steps = [_WRAP - strides[0], strides[0], strides[1], strides[0], 1]
    else:
        sizes = [1, shape[0], shape[2], shape[1], shape[3]]
        steps = [8, strides[0], strides[2], strides[1], 1]
    return TensorDescriptor(tensor, sizes, steps, [1, 1, 1, rows, width], layout(width))


def check_pairs(config: Config, width: int, listed: bool, ptx: str) -> bool:
    """Whether a kernel compiled for pairs keeps things where its inline PTX looks for them. Warns if it does not, and
    keeps this process from trying again: programs alone need none of it.
    """
    parts, slots = config.q_slots * config.consumers, (config.k_slots, config.v_slots)
    of_slots = 2 * sum(slots) * config.block_k * width
    found = misplaced(ptx, of_slots, of_slots + 2 * parts * ROWS * width, (*slots, *slots, parts, parts), listed)
    if found:
        _misplaced.extend(found)
        head = f"triton_hopper: triton {triton.__version__} lays its kernel for programs in pairs out otherwise than it"
        warnings.warn(report(f"{head} expects; programs work alone, up to 4 % slower:", found), stacklevel=2)
    return not found


def folded(tensor: Tensor) -> Tensor:
    """``tensor`` (B, S, H, D), copied unless (B, S) and (H, D) are one dimension each to its strides."""
    (batch, length, _, head_dim), (of_batch, of_row, of_head, _) = tensor.shape, tensor.stride()
    if (batch == 1 or of_batch == length * of_row) and (tensor.shape[2] == 1 or of_head == head_dim):
        return tensor
    return tensor.contiguous()


class Listed:
    """What the kernel reads of a key-padding mask: numbers and list of blocks of keys, and the rows to find them in: of
    K and V (B * Sk, H, D), and of copies, in which the keys of blocks with a hole are one behind the other.
    """

    def __init__(self, k: Tensor, v: Tensor, key_padding: Tensor, block_k: int) -> None:
        batch, length, heads, head_dim = k.shape
        k, v = folded(k), folded(v)
        self.room = max(length // block_k, 1)
        order, count, whole = (
            torch.empty(sizes, dtype=torch.int32, device=k.device)
            for sizes in ((batch, length), (batch, 2), (batch, self.room))
        )
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (k, v)]
        index = k.device.index
        launch(
            key_blocks, (batch, 1, 1), (key_padding, order, count, whole, *key_padding.stride(), length, self.room),
            {"BLOCK_K": block_k, "BLOCK": _KEY_BLOCK}, 8, index,
        )  # fmt: skip
        launch(
            gather_keys, (-(-length // _COPY_ROWS), batch, -(-heads * head_dim // _COPY_COLUMNS)),
            (k, v, *copies, order, count, *(stride // _UNIT for t in (k, v) for stride in t.stride()[:2]), length),
            {"WIDTH": heads * head_dim, "UNIT": _UNIT, "ROWS": _COPY_ROWS, "COLUMNS": _COPY_COLUMNS}, 4, index,
        )  # fmt: skip
        self.lists = (count, whole)
        self.key, self.value, *self.copies = (tensor.flatten(0, 1) for tensor in (k, v, *copies))


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, starts: Any, causal: int, scale: float | None,
    window: Any, return_lse: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out (B, Sq, H, D) and lse (B, H, Sq), or None; packed when ``starts`` is (cu_seqlens_q, cu_seqlens_k)."""
    packed = starts is not None
    q_length, heads, head_dim = q.shape[-3:]
    k_length, key_heads = k.shape[-3:-1]
    out = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], heads, q_length), dtype=torch.float32) if return_lse else None
    if out.numel() == 0 or k.numel() == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return out, lse
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    if scale <= 0.0:  # the maximum of a row is found before it is scaled
        q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
    q, k, v = (readable(tensor) for tensor in (q, k, v))
    left, right = (-1, -1) if window is None else window
    if causal & CAUSAL:
        right = 0
    left, right = min(left, FAR), min(right, FAR)
    width = width_of(head_dim)
    if config is None:
        alone = packed or bool(_misplaced) or better_alone(q_length, heads * q.shape[0], _processors(q.device.index))
        config = choose(head_dim, left >= 0 or right >= 0, alone)
    block_q = config.consumers * ROWS * (2 if config.paired else 1)
    together = 1
    if right >= 0:
        together = max(_TOGETHER // (4 * max(k_length, 1) * width), 1)
    listed, copies, lists, room = None, [None, None], (out, out), 0
    given = (k, v)
    with on(q.device):
        if key_padding is not None:
            listed = Listed(k, v, key_padding, config.block_k)
            k, v, lists, room = listed.key, listed.value, listed.lists, listed.room
        if packed:
            batch = starts[0].shape[0] - 1
            tiles = q_length // block_q + batch + 1
            turns = tiles * heads
            plan = torch.empty((tiles, RECORD), dtype=torch.int32, device=q.device)
            launch(
                tile_plan, (batch + 1, 1, 1), (*starts, plan, batch, q_length, k_length, tiles),
                {"BLOCK_Q": block_q, "BLOCK": _PLAN_BLOCK}, 4, q.device.index,
            )  # fmt: skip
            together = min(together, heads)
        else:
            batch = q.shape[0]
            tiles = -(-q_length // block_q)
            turns = tiles * heads * batch
            plan = out
            together = min(together, heads * batch)
        processors = _processors(q.device.index)
        programs = min(turns, processors // 2 if config.paired else processors)
        rows = [_descriptor(tensor, config.block_k, width) for tensor in (k, v)]
        if listed is not None:
            copies = [_descriptor(tensor, config.block_k, width) for tensor in listed.copies]
        launched = launch(
            hopper_forward, (programs, 1, 1),
            (
                _descriptor(q, ROWS, width), *rows, *copies, _descriptor(out, ROWS, width), out if lse is None else lse,
                plan, *lists, room, turns, tiles, heads, batch, q_length, k_length, together, left, right,
                scale * math.log2(math.e), 0,
            ),
            {
                "GROUP": heads // key_heads, "LEFT": left >= 0, "RIGHT": right >= 0,
                "LOWER_RIGHT": bool(causal & ALIGN_LOWER_RIGHT), "VARLEN": packed, "LISTED": listed is not None,
                "LSE": return_lse, "WIDTH": width, **config.constants(),
            },
            4, q.device.index,
            functools.partial(check_pairs, config, width, listed is not None) if config.paired else None,
        )  # fmt: skip
    if not launched:
        return forward(q, *given, key_padding, starts, causal, scale, window, return_lse, TABLE[width][1])
    return out, lse
