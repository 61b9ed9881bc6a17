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


@triton.jit
def most(one, other):
    return tl.maximum(one, other)


@triton.jit(do_not_specialize=["keep_batch", "keep_key", "length", "room"])
def key_blocks(
    Keep, Order, Count, Blocks, keep_batch, keep_key, length, room, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each sequence of Keep (B, Sk) bool: runs of real keys, cut into blocks of at most BLOCK_K.

    Blocks (B, room, 2) has begin and end of each, in rows of all batches; Order (B, Sk) the real keys one behind the
    other; Count (B, 4) the number of blocks, of real keys, and 1 where the runs are so short that their blocks are not
    worth it, so that :func:`gather_keys` shall copy the keys. One program for each sequence.
    """
    number = tl.program_id(0)
    Keep += number.to(tl.int64) * keep_batch
    Order += number.to(tl.int64) * length
    Blocks += number * room * 2
    base = number * length
    keys = 0
    blocks = 0
    started = 0
    for begin in range(0, length, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        pointers = Keep + places.to(tl.int64) * keep_key
        real = tl.load(pointers, mask=places < length, other=False).to(tl.int32)
        previous = tl.load(pointers - keep_key, mask=(places > 0) & (places <= length), other=False).to(tl.int32)
        following = tl.load(pointers + keep_key, mask=places + 1 < length, other=False).to(tl.int32)
        starts = (real != 0) & (previous == 0)
        run = tl.associative_scan(tl.where(starts, places, 0), 0, most)
        run = tl.maximum(run, started)  # a run that began in an earlier chunk
        within = (places - run) % BLOCK_K
        opens = ((real != 0) & (within == 0)).to(tl.int32)
        closes = (real != 0) & ((within == BLOCK_K - 1) | (following == 0))
        of_block = blocks + tl.cumsum(opens, 0) - 1
        tl.store(Blocks + of_block * 2, base + places, mask=(opens != 0) & (of_block < room))
        tl.store(Blocks + of_block * 2 + 1, base + places + 1, mask=closes & (of_block < room))
        rank = keys + tl.cumsum(real, 0) - real
        tl.store(Order + rank, places, mask=real != 0)
        keys += tl.sum(real, 0)
        blocks += tl.sum(opens, 0)
        started = tl.maximum(started, tl.max(tl.where(starts, places, 0), 0))
    packed = (keys + BLOCK_K - 1) // BLOCK_K
    copied = blocks > packed + 1 + packed // 16
    Count += number * 4
    tl.store(Count, tl.maximum(tl.where(copied, packed, blocks), 1))
    tl.store(Count + 1, keys)
    tl.store(Count + 2, copied.to(tl.int32))
    if blocks == 0:  # one block without keys, so that rows without keys are written
        tl.store(Blocks, base)
        tl.store(Blocks + 1, base)


@triton.jit(do_not_specialize=["k_batch", "k_row", "v_batch", "v_row", "length", "room"])
def gather_keys(
    K, V, KeysTo, ValuesTo, Order, Count, Blocks, k_batch, k_row, v_batch, v_row, length, room,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where :func:`key_blocks` asked for it: real rows of K and V (WIDTH columns together) copied to the front of their
    sequence in KeysTo and ValuesTo (B, Sk, ...), and Blocks of those. Grid: (rows // ROWS, batch)."""
    number = tl.program_id(1)
    if tl.load(Count + number * 4 + 2) == 0:
        return
    keys = tl.load(Count + number * 4 + 1)
    first = tl.program_id(0) * ROWS
    if first == 0:
        for start in range(0, (keys + BLOCK_K - 1) // BLOCK_K, ROWS):
            block = start + tl.arange(0, ROWS)
            inside = block * BLOCK_K < keys
            begin = number * length + block * BLOCK_K
            tl.store(Blocks + (number * room + block) * 2, begin, mask=inside)
            end = number * length + tl.minimum((block + 1) * BLOCK_K, keys)
            tl.store(Blocks + (number * room + block) * 2 + 1, end, mask=inside)
    if first >= keys:
        return
    rows = first + tl.arange(0, ROWS)
    batch = number.to(tl.int64)
    source = tl.load(Order + batch * length + rows, mask=rows < keys, other=0).to(tl.int64)
    target = (batch * length + rows) * WIDTH
    for start in range(0, WIDTH, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < keys)[:, None] & (columns < WIDTH)[None, :]
        key = tl.load(K + batch * k_batch + (source * k_row)[:, None] + columns[None, :], mask=inside)
        value = tl.load(V + batch * v_batch + (source * v_row)[:, None] + columns[None, :], mask=inside)
        tl.store(KeysTo + target[:, None] + columns[None, :], key, mask=inside)
        tl.store(ValuesTo + target[:, None] + columns[None, :], value, mask=inside)
