"""Keys and values packed by a key-padding mask: one small kernel says where each goes, another copies both.

Triton kernels only; nothing here may be imported before a GPU call needs it.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import load_rows, store_rows

_PLAIN = ["keep_batch", "keep_key", "batch", "length"]
_ROWS = ["k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "heads", "length", "total"]


@triton.jit
def keys_at(Keep, keep_batch, keep_key, length, total, begin, BLOCK: tl.constexpr):
    """Of the BLOCK keys from ``begin`` on: place in the batch, sequence, key, and 1 where it is real."""
    places = begin + tl.arange(0, BLOCK)
    number = places // length
    key = places - number * length
    pointers = Keep + number.to(tl.int64) * keep_batch + key.to(tl.int64) * keep_key
    return places, number, key, tl.load(pointers, mask=places < total, other=False).to(tl.int32)


@triton.jit(do_not_specialize=_PLAIN)
def place_keys(Keep, Source, Target, Starts, keep_batch, keep_key, batch, length, BLOCK: tl.constexpr):
    """masks.packing of Keep (batch, length), bool: Source and Target (batch * length,), Starts (batch + 1,).

    A program for each BLOCK of keys counts the real ones in front of it by itself, in all of the mask: nobody waits for
    anybody, and masks are small.
    """
    total = batch * length
    mine = tl.program_id(0) * BLOCK
    ahead = tl.zeros([BLOCK], tl.int32)
    every = tl.zeros([BLOCK], tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, total, BLOCK):
        places, _, _, real = keys_at(Keep, keep_batch, keep_key, length, total, begin, BLOCK)
        ahead += tl.where(begin < mine, real, 0)
        every += real
        last = tl.maximum(last, tl.where(real != 0, places, 0))
    count = tl.sum(every, 0)
    places, number, key, real = keys_at(Keep, keep_batch, keep_key, length, total, mine, BLOCK)
    inside = places < total
    rank = tl.sum(ahead, 0) + tl.cumsum(real, 0) - real
    tl.store(Source + rank, places, mask=real != 0)
    tl.store(Source + places, tl.zeros([BLOCK], tl.int32) + tl.max(last, 0), mask=inside & (places >= count))
    tl.store(Target + places, tl.where(real != 0, rank, total - 1), mask=inside)
    tl.store(Starts + number, rank, mask=inside & (key == 0))
    if mine == 0:
        tl.store(Starts + batch, count)


@triton.jit
def copy_rows(From, To, number, key, head, batch_stride, row_stride, head_stride, places, inside, heads,
              D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Rows of one head from (B, S, H, D) to (T, H, D). Strides are in units of UNIT elements, so that the compiler
    knows that rows are aligned; multiplied by it last, in 64 bits.
    """
    offsets = (number * batch_stride + key * row_stride + head * head_stride) * UNIT
    rows = load_rows(From, offsets, inside, 0, WIDTH, D, True)
    store_rows(To, (places.to(tl.int64) * heads + head) * D, inside, rows, 0, WIDTH, D)


@triton.jit(do_not_specialize=_ROWS)
def pack_rows(
    K, V, PackedK, PackedV, Source, k_batch, k_row, k_head, v_batch, v_row, v_head, heads, length, total,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows Source of K (B, S, H, D_K) and V (B, S, H, D_V), packed. Grid: a program for BLOCK rows of a head."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    places = program // heads * BLOCK + tl.arange(0, BLOCK)
    inside = places < total
    rows = tl.load(Source + places, mask=inside, other=0)
    number = (rows // length).to(tl.int64)
    key = rows - number * length
    copy_rows(K, PackedK, number, key, head, k_batch, k_row, k_head, places, inside, heads, D_K, WIDTH_K, UNIT)
    copy_rows(V, PackedV, number, key, head, v_batch, v_row, v_head, places, inside, heads, D_V, WIDTH_V, UNIT)
