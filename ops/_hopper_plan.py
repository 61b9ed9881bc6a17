"""Who works on what, decided on the device: plain Triton kernels in front of the one in _hopper_forward.py.

They read lengths and masks where they are, so the host never waits and a CUDA graph replays with others. Triton's
interpreter runs them on a CPU.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

# int32 numbers of one record of the plan, and what they are: first tile of the sequence, its tiles, first row and rows
# of its queries, first row and rows of its keys
RECORD = 8
RECORD_SIZE = tl.constexpr(RECORD)


@triton.jit
def lengths_of(numbers, Starts, batch, total):
    """Begin and rows of sequences ``numbers``; number ``batch`` is what lies behind the last. Clamped to ``total``."""
    begin = tl.minimum(tl.maximum(tl.load(Starts + numbers, mask=numbers <= batch, other=total), 0), total)
    end = tl.load(Starts + numbers + 1, mask=numbers < batch, other=total)
    return begin, tl.minimum(tl.maximum(end, begin), total) - begin


@triton.jit(do_not_specialize=["batch", "q_total", "k_total", "records"])
def tile_plan(StartsQ, StartsK, Plan, batch, q_total, k_total, records, BLOCK_Q: tl.constexpr, BLOCK: tl.constexpr):
    """Plan (records, RECORD): one record for each tile of BLOCK_Q packed rows, those with the most keys first.

    One program for each sequence, and one for the rows behind the last, which have no keys: they are written as empty.
    ``records`` is at least the number of tiles; the rest becomes tiles without rows. Quadratic in the number of
    sequences, without a sum over them that programs would have to wait for.
    """
    number = tl.program_id(0)
    q_begin, rows = lengths_of(number, StartsQ, batch, q_total)
    k_begin, keys = lengths_of(number, StartsK, batch, k_total)
    keys = tl.where(number < batch, keys, 0)
    first = 0
    for start in range(0, batch + 1, BLOCK):
        others = start + tl.arange(0, BLOCK)
        _, other_rows = lengths_of(others, StartsQ, batch, q_total)
        _, other_keys = lengths_of(others, StartsK, batch, k_total)
        other_keys = tl.where(others < batch, other_keys, 0)
        before = (other_keys > keys) | ((other_keys == keys) & (others < number))
        before = before & (others <= batch)
        first += tl.sum(tl.where(before, (other_rows + BLOCK_Q - 1) // BLOCK_Q, 0), 0)
    tiles = (rows + BLOCK_Q - 1) // BLOCK_Q
    for start in range(0, tiles, BLOCK):
        mine = start + tl.arange(0, BLOCK)
        inside = (mine < tiles) & (first + mine < records)
        record = Plan + (first + mine) * RECORD_SIZE
        tl.store(record, first, mask=inside)
        tl.store(record + 1, tiles, mask=inside)
        tl.store(record + 2, q_begin, mask=inside)
        tl.store(record + 3, rows, mask=inside)
        tl.store(record + 4, k_begin, mask=inside)
        tl.store(record + 5, keys, mask=inside)
    if number == batch:  # the last of all: it has no keys and the highest number
        for start in range(first + tiles, records, BLOCK):
            mine = start + tl.arange(0, BLOCK)
            record = Plan + mine * RECORD_SIZE
            inside = mine < records
            tl.store(record, mine, mask=inside)
            tl.store(record + 1, 1, mask=inside)
            tl.store(record + 2, 0, mask=inside)
            tl.store(record + 3, 0, mask=inside)
            tl.store(record + 4, 0, mask=inside)
            tl.store(record + 5, 0, mask=inside)


@triton.jit(do_not_specialize=["keep_batch", "keep_key", "length", "room"])
def key_blocks(
    Keep, Order, Count, Whole, keep_batch, keep_key, length, room, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each sequence of Keep (B, Sk) bool, what the kernel for sm_90 walks over in blocks of BLOCK_K keys.

    Whole (B, room) lists the blocks whose keys are all real, which are read in place. Order (B, Sk) lists the other
    real keys, which :func:`gather_keys` packs: so no block but the last packed one needs a test. Count (B, 2) has the
    number of whole blocks, and of keys to pack. One program for each sequence.
    """
    ROWS: tl.constexpr = BLOCK // BLOCK_K
    number = tl.program_id(0)
    Keep += number.to(tl.int64) * keep_batch
    Order += number.to(tl.int64) * length
    Whole += number * room
    whole = 0
    rest = 0
    for begin in range(0, length, BLOCK):
        blocks = begin // BLOCK_K + tl.arange(0, ROWS)
        places = blocks[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        real = tl.load(Keep + places.to(tl.int64) * keep_key, mask=places < length, other=False).to(tl.int32)
        keys = tl.sum(real, 1)
        full = (keys == BLOCK_K).to(tl.int32)
        tl.store(Whole + whole + tl.cumsum(full, 0) - 1, blocks, mask=full != 0)
        left = keys * (1 - full)
        rank = (rest + tl.cumsum(left, 0) - left)[:, None] + tl.cumsum(real, 1) - real
        tl.store(Order + rank, places, mask=(real != 0) & (full == 0)[:, None])
        whole += tl.sum(full, 0)
        rest += tl.sum(left, 0)
    tl.store(Count + number * 2, whole)
    tl.store(Count + number * 2 + 1, rest)


@triton.jit(do_not_specialize=["k_batch", "k_row", "v_batch", "v_row", "length"])
def gather_keys(
    K, V, KeysTo, ValuesTo, Order, Count, k_batch, k_row, v_batch, v_row, length,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys and values (WIDTH columns together) in :func:`key_blocks`' Order, packed at the front of their sequence in
    KeysTo and ValuesTo (B, Sk, ...). Strides are in units of UNIT elements, or each element would be loaded by itself.
    Grid: (Sk // ROWS, batch, WIDTH // COLUMNS).
    """
    number = tl.program_id(1)
    rest = tl.load(Count + number * 2 + 1)
    first = tl.program_id(0) * ROWS
    if first >= rest:
        return
    rows = first + tl.arange(0, ROWS)
    batch = number.to(tl.int64)
    source = tl.load(Order + batch * length + rows, mask=rows < rest, other=0).to(tl.int64)
    target = (batch * length + rows) * WIDTH
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < rest)[:, None] & (columns < WIDTH)[None, :]
    of_key = (batch * k_batch + source * k_row) * UNIT
    of_value = (batch * v_batch + source * v_row) * UNIT
    key = tl.load(K + of_key[:, None] + columns[None, :], mask=inside)
    value = tl.load(V + of_value[:, None] + columns[None, :], mask=inside)
    tl.store(KeysTo + target[:, None] + columns[None, :], key, mask=inside)
    tl.store(ValuesTo + target[:, None] + columns[None, :], value, mask=inside)
