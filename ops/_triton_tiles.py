"""What the Triton kernels share: which rows a program works on, which keys a tile of queries sees, loads, the order of
keys under a key-padding mask. Kernels only; nothing here may be imported before a GPU call needs it.

AOTInductor and torch.compile write these functions out as text, with every ``@triton.jit`` function and constexpr that
they name: helpers stay at module level, and nothing else is reached from a kernel.

Words: a *row* is a token, a *tile* the rows of one program, a *block* what one step of its loop reads. Strides come in
units of UNIT elements (8 where head_dim is a multiple of 8), so that the compiler knows that rows are aligned to 16
bytes: it takes only multiples of 16 elements from an argument, and 3 heads of 72 are none.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

# Arguments whose value and divisibility Triton need not look at: lengths vary from call to call without a new kernel,
# strides are multiples of UNIT in any case.
PLAIN = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head", "g_batch", "g_row",
    "g_head", "mask_batch", "mask_head", "batch", "heads", "key_heads", "q_length", "k_length", "tiles", "left",
    "right", "keep_batch", "keep_key", "length",
)  # fmt: skip


def kernel(function: Any) -> Any:
    """``triton.jit``, not specialised on :data:`PLAIN`."""
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in PLAIN if name in names])


# Which packed sequence a tile belongs to is found in the kernels themselves. Sequence b owns the tiles from
# start // BLOCK + b on: at least as many as it needs, so that total // BLOCK + batch + 1 tiles are enough for any
# lengths and the host need not know them. A helper that reads Starts would make PyTorch take Starts for written to
# (analyze_kernel_mutations follows the arguments of a call, but not those of a load), so that compiled code copies it;
# with dynamic lengths torch < 2.13 fails on that copy.


@triton.jit
def bounds(begin, end, total):
    """The rows ``begin`` to ``end`` of a packed tensor, as far as it has them.

    Clamped, as AOTInductor runs a kernel once on numbers of its own.
    """
    begin = tl.minimum(tl.maximum(begin, 0), total)
    return begin, tl.minimum(tl.maximum(end, begin), total)


@triton.jit
def load_rows(base, offsets, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows at ``offsets``; 0 past column D and, if CHECK, where not ``inside``."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + (offsets[:, None] + columns[None, :])
    if FIRST + WIDTH > D:
        if CHECK:
            tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(base, offsets, inside, tile, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + (offsets[:, None] + columns[None, :])
    if FIRST + WIDTH > D:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None])


@triton.jit
def keys_seen(
    first, last, shift, left, right, k_length, Rank,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys that rows ``first`` to ``last`` see: begin, begin and end of whole blocks that all rows see, end.

    Row i sees keys i + shift - left to i + shift + right. With GATHER the four are places in the order of keys.
    """
    begin = 0
    whole_begin = 0
    whole_end = k_length
    end = k_length
    if RIGHT:
        whole_end = tl.minimum(tl.maximum(first + shift + right + 1, 0), k_length)
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), k_length)
    if LEFT:
        begin = tl.minimum(tl.maximum(first + shift - left, 0), end)
        whole_begin = tl.minimum(tl.maximum(last + shift - left, 0), end)
    if GATHER:
        if LEFT:
            begin = tl.load(Rank + begin)
            whole_begin = tl.load(Rank + whole_begin)
        whole_end = tl.load(Rank + whole_end)
        end = tl.load(Rank + end)
    if LEFT:
        whole_begin = begin + (whole_begin - begin + BLOCK - 1) // BLOCK * BLOCK
    whole_end = whole_begin + tl.maximum(whole_end - whole_begin, 0) // BLOCK * BLOCK
    return begin, whole_begin, whole_end, end


@triton.jit
def mask_start(
    Mask, offsets, inside, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASK: tl.constexpr, CHECK: tl.constexpr
):
    """What the product of Q and K starts from: zeros, or the mask tensor over ``scale`` (base 2) as float32.

    MASK: 0 none, 1 bool, 2 additive. Added to the product instead, the mask would bring the whole softmax into the
    layout it is loaded in: 326 shuffles a step instead of 8.
    """
    if MASK == 0:
        start = tl.zeros([ROWS, COLUMNS], tl.float32)
    elif MASK == 1:
        if CHECK:
            allowed = tl.load(Mask + offsets, mask=inside, other=False)
        else:
            allowed = tl.load(Mask + offsets)
        start = tl.where(allowed, 0.0, float("-inf"))
    else:
        if CHECK:
            bias = tl.load(Mask + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            bias = tl.load(Mask + offsets).to(tl.float32)
        # the lowest finite number stays finite: a row of nothing else is a mean over all keys, not an empty one
        start = tl.maximum(bias * (1.4426950408889634 / scale), -3.0e38)
        start = tl.where(bias == float("-inf"), float("-inf"), start)
    return start


@triton.jit
def hide(scores, rows, keys, inside, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """``scores`` with -inf where not ``inside`` and where a (shifted) row does not see a key."""
    keep = inside
    if RIGHT:
        keep = keep & (keys <= rows + right)
    if LEFT:
        keep = keep & (keys >= rows - left)
    return tl.where(keep, scores, float("-inf"))


@kernel
def key_order(Keep, Order, Rank, keep_batch, keep_key, length, BLOCK: tl.constexpr):
    """Order (B, Sk): the real keys of each sequence, then the others. Rank (B, Sk + 1): real keys before each place.

    One program for each sequence. Keep is bool, with strides ``keep_batch`` and ``keep_key``.
    """
    number = tl.program_id(0).to(tl.int64)
    Keep += number * keep_batch
    Order += number * length
    Rank += number * (length + 1)
    before = 0
    for begin in range(0, length, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        real = tl.load(Keep + places.to(tl.int64) * keep_key, mask=places < length, other=False).to(tl.int32)
        rank = before + tl.cumsum(real, 0) - real
        # the others from the end on, so that one pass is enough
        target = tl.where(real != 0, rank, length - 1 - (places - rank))
        tl.store(Order + target, places, mask=places < length)
        tl.store(Rank + places, rank, mask=places < length)
        before += tl.sum(real, 0)
    tl.store(Rank + length, before)


@kernel
def compact(
    K, V, OutK, OutV, Order, Rank, k_batch, k_row, k_head, v_batch, v_row, v_head, key_heads, k_length, tiles,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The real keys and values of each sequence one behind the other, (B, Sk, Hk, D) contiguous; the rest is left.

    A look-up of every row inside the loop of the attention kernels costs 5 to 40 % of their time instead, which wait
    for two loads then and keep more of them on their way (H200); this copy 2 to 6 %.
    """
    program = tl.program_id(0)
    head = (program % key_heads).to(tl.int64)
    first = program // key_heads % tiles * BLOCK
    number = (program // key_heads // tiles).to(tl.int64)
    places = first + tl.arange(0, BLOCK)
    inside = places < tl.load(Rank + number * (k_length + 1) + k_length)
    keys = tl.load(Order + number * k_length + places, mask=inside, other=0).to(tl.int64)
    K += number * k_batch * UNIT + head * k_head * UNIT
    V += number * v_batch * UNIT + head * v_head * UNIT
    k = load_rows(K, keys * (k_row * UNIT), inside, 0, WIDTH, D, True)
    v = load_rows(V, keys * (v_row * UNIT), inside, 0, WIDTH, D, True)
    to = (number * k_length + first) * key_heads + head
    offsets = tl.arange(0, BLOCK) * (key_heads * D)
    store_rows(OutK + to * D, offsets, inside, k, 0, WIDTH, D)
    store_rows(OutV + to * D, offsets, inside, v, 0, WIDTH, D)
