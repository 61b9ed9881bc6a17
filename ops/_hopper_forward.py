"""The forward kernel for sm_90 (H100, H200), in Gluon: a warp that loads by TMA, two or three warpgroups that compute.

A computing warpgroup owns 64 rows of the tile: its scores, weights and accumulator stay in its registers, and so do its
rows of Q where there is room. The product of the next scores and the one with the last values are asked for together,
in turns: while one warpgroup's products run, the others are at their softmax. Blocks of keys are walked from the last
to the first: those cut by a length or by positions come first, the long loop tests nothing. Gluon has no interpreter:
off sm_90 this file can only be compiled.

Words: a *tile* is the rows of one turn of a program, a *block* what one step of its loop reads, a *slot* the shared
memory of one block. Slot n % SLOTS serves block n, counted over all turns; the phase of its mbarriers is
n // SLOTS & 1 (named barriers have none).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._hopper_pairs import ROOM, announce, half, idle, meet
from ._hopper_tiles import (
    FAR,
    FREE,
    ROWS,
    TURN,
    await_turn,
    give_back,
    keys_of,
    pass_turn,
    place_of,
    produce,
    rounds_of,
    turn_of,
)


@gluon.jit
def hide(
    scores, rows, place, end, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_K: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """``scores`` with -inf from key ``end`` on and where a (shifted) row does not see a key."""
    keys = place + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    keep = (keys < end)[None, :]
    if RIGHT:
        keep = keep & (keys[None, :] <= (rows + right)[:, None])
    if LEFT:
        keep = keep & (keys[None, :] >= (rows - left)[:, None])
    return gl.where(keep, scores, float("-inf"))


@gluon.jit
def parted(tile):
    """The left and the right half of a tile, element by element in the same registers."""
    rows: gl.constexpr = tile.shape[0]
    columns: gl.constexpr = tile.shape[1]
    return tile.reshape([rows, 2, columns // 2]).permute((0, 2, 1)).split()


@gluon.jit
def top_of(scores):
    """Maximum of each row. Triton takes one column after the other, a chain of 32 to 64 steps in which a warpgroup with
    one warp for each scheduler waits for itself; three halvings before leave an eighth.
    """
    one, other = parted(scores)
    one, other = parted(gl.maximum(one, other))
    one, other = parted(gl.maximum(one, other))
    return gl.max(gl.maximum(one, other), 1)


@gluon.jit
def sum_of(weights):
    """Sum of each row, as :func:`top_of` does it."""
    one, other = parted(weights)
    one, other = parted(one + other)
    return gl.sum(one + other, 1)


@gluon.jit
def lift(scores, top, scale, CHECK: gl.constexpr):
    """The new maximum of each row, that in units of the exponent, and what the sums so far shrink by."""
    new_top = gl.maximum(top, gl.convert_layout(top_of(scores), top.type.layout))
    lifted = new_top * scale
    if CHECK:
        # a row that saw nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN
        lifted = gl.where(new_top == float("-inf"), 0.0, lifted)
    return new_top, lifted, gl.exp2(top * scale - lifted)


@gluon.jit
def soften(scores, lifted, total, fade, scale):
    """Weights of one block, and the new sum of each row."""
    # the scale rides on the subtraction: one multiply-add for each score
    weights = gl.exp2(scores * scale - lifted[:, None])
    return weights, total * fade + gl.convert_layout(sum_of(weights), total.type.layout)


@gluon.jit
def walk(
    acc, weights, top, total, query, slots, barriers, step_from, step_to, done, blocks, begin, end, rows, left, right,
    scale, never,
    part: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, CHECK: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_K: gl.constexpr, K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr, ALTERNATE: gl.constexpr, NAMED: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Blocks ``step_from`` to ``step_to``, counted from the last: scores of each, and the product of the one before."""
    _, _, k_full, k_empty, v_full, v_empty = barriers
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    start = gl.zeros([ROWS, BLOCK_K], gl.float32, layout=s_layout)
    for step in range(step_from, step_to):
        number = done + step
        k_slot = number % K_SLOTS
        v_slot = (number - 1) % V_SLOTS
        mbarrier.wait(k_full.index(k_slot), (number // K_SLOTS) & 1)
        if ALTERNATE:
            await_turn(part)
        scores = warpgroup_mma(query, slots.index(k_slot).permute((1, 0)), start, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_slot), ((number - 1) // V_SLOTS) & 1)
        product = warpgroup_mma(weights, slots.index(K_SLOTS + v_slot), acc, is_async=True)
        if ALTERNATE:
            pass_turn((part + 1) % CONSUMERS)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        give_back(k_empty, k_slot, 0, CONSUMERS, NAMED)
        if CHECK:
            scores = hide(
                scores, rows, begin + (blocks - 1 - step) * BLOCK_K, end, left, right, LEFT, RIGHT, BLOCK_K, s_layout
            )
        top, lifted, fade = lift(scores, top, scale, CHECK)
        # Never so. Without a branch ptxas 12.8 moves the wait in front of the maxima (in some variants) and the
        # shrinking behind the exponentials. With it the two are mixed, and run beside another's products.
        if never > 0:
            mbarrier.wait(k_full.index(k_slot), never)
        acc = warpgroup_mma_wait(0, deps=(product,))
        give_back(v_empty, v_slot, K_SLOTS, CONSUMERS, NAMED)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        fresh, total = soften(scores, lifted, total, fade, scale)
        weights = gl.convert_layout(fresh.to(weights.dtype), p_layout)
    return acc, weights, top, total


@gluon.jit
def consume(
    part: gl.constexpr, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, VARLEN: gl.constexpr, LISTED: gl.constexpr,
    LSE: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, Q_SLOTS: gl.constexpr, K_SLOTS: gl.constexpr,
    V_SLOTS: gl.constexpr, WIDTH: gl.constexpr, ALTERNATE: gl.constexpr, HELD: gl.constexpr, NAMED: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """Warpgroup ``part`` of the computing ones: rows part * 64 to part * 64 + 63 of each tile."""
    BLOCK_Q: gl.constexpr = CONSUMERS * ROWS
    SPAN: gl.constexpr = BLOCK_Q * (2 if PAIRED else 1)
    q_tile: gl.constexpr = [1, 1, 1, ROWS, WIDTH]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_K, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = out_rows.dtype
    s_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_row: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    Plan, Count, _whole = tables
    _, heads, _, q_length, _, _ = sizes
    done = 0
    taken = 0
    if ALTERNATE and part == CONSUMERS - 1:
        pass_turn(0)
    if PAIRED:
        meet(4)
    for round in range(rounds_of(turns, PAIRED)):
        program = turn_of(round, PAIRED)
        number, head, first, q_from, q_rest, k_rest, q_outer, q_inner, _k_outer, _k_inner = place_of(
            gl.minimum(program, turns - 1), Plan, sizes, RIGHT, VARLEN, SPAN
        )
        if (program < turns) & (first < q_rest):
            if PAIRED:
                # rows behind the last are none: read as zeros, not written
                first += half() * BLOCK_Q
            if LISTED:
                k_rest = gl.load(Count + number * 2) * BLOCK_K + gl.load(Count + number * 2 + 1)
            begin, end, shift, blocks, plain_begin, plain_end = keys_of(
                first, q_rest, k_rest, left, right, LEFT, RIGHT, LOWER_RIGHT, BLOCK_Q, BLOCK_K
            )
            place = begin + (blocks - 1) * BLOCK_K
            within = first + part * ROWS + gl.arange(0, ROWS, layout=s_row)
            rows = within + shift
            top = gl.full([ROWS], float("-inf"), gl.float32, layout=s_row)
            total = gl.zeros([ROWS], gl.float32, layout=s_row)
            acc = gl.zeros([ROWS, WIDTH], gl.float32, layout=o_layout)
            start = gl.zeros([ROWS, BLOCK_K], gl.float32, layout=s_layout)
            mine = (taken % Q_SLOTS) * CONSUMERS + part
            q_slot = parts.index(mine)
            slot = done % K_SLOTS
            mbarrier.wait(q_full.index(mine), (taken // Q_SLOTS) & 1)
            if HELD:
                query = q_slot.load(gl.DotOperandLayout(0, s_layout, 2))
            else:
                query = q_slot
            mbarrier.wait(k_full.index(slot), (done // K_SLOTS) & 1)
            scores = warpgroup_mma(query, slots.index(slot).permute((1, 0)), start, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            give_back(k_empty, slot, 0, CONSUMERS, NAMED)
            if plain_begin > 0:
                scores = hide(scores, rows, place, end, left, right, LEFT, RIGHT, BLOCK_K, s_layout)
            top, lifted, fade = lift(scores, top, scale, True)
            fresh, total = soften(scores, lifted, total, fade, scale)
            weights = gl.convert_layout(fresh.to(dtype), p_layout)
            if Q_SLOTS > 1:
                # the result of the turn before has left its slot by now
                if taken > 0:
                    tma.store_wait(0)
                    mbarrier.arrive(q_empty.index(((taken - 1) % Q_SLOTS) * CONSUMERS + part), count=1)
            tested = 1
            if RIGHT or LEFT:
                tested = gl.maximum(plain_begin, 1)
                acc, weights, top, total = walk(
                    acc, weights, top, total, query, slots, barriers, 1, tested, done, blocks, begin, end,
                    rows, left, right, scale, never,
                    part, LEFT, RIGHT, True, CONSUMERS, BLOCK_K, K_SLOTS, V_SLOTS, ALTERNATE, NAMED, s_layout, o_layout,
                )  # fmt: skip
            acc, weights, top, total = walk(
                acc, weights, top, total, query, slots, barriers, tested, plain_end, done, blocks, begin, end,
                rows, left, right, scale, never,
                part, LEFT, RIGHT, False, CONSUMERS, BLOCK_K, K_SLOTS, V_SLOTS, ALTERNATE, NAMED, s_layout, o_layout,
            )  # fmt: skip
            if LEFT:
                plain_end = gl.maximum(plain_end, tested)
                acc, weights, top, total = walk(
                    acc, weights, top, total, query, slots, barriers, plain_end, blocks, done, blocks, begin, end,
                    rows, left, right, scale, never,
                    part, LEFT, RIGHT, True, CONSUMERS, BLOCK_K, K_SLOTS, V_SLOTS, ALTERNATE, NAMED, s_layout, o_layout,
                )  # fmt: skip
            done += blocks
            slot = (done - 1) % V_SLOTS
            mbarrier.wait(v_full.index(slot), ((done - 1) // V_SLOTS) & 1)
            product = warpgroup_mma(weights, slots.index(K_SLOTS + slot), acc, is_async=True)
            share = 1.0 / gl.where(total == 0.0, 1.0, total)
            if LSE:
                # an empty row: -inf + log2(0)
                lse = (top * scale + gl.log2(total)) * 0.6931471805599453
                if VARLEN:
                    lse_from = head.to(gl.int64) * q_length + q_from
                else:
                    lse_from = (number.to(gl.int64) * heads + head) * q_length
                gl.store(Lse + lse_from + within, lse, mask=within < q_rest)
            acc = warpgroup_mma_wait(0, deps=(product,))
            give_back(v_empty, slot, K_SLOTS, CONSUMERS, NAMED)
            acc = acc * gl.convert_layout(share, o_row)[:, None]
            # nobody reads these rows of Q again: their slot takes those of the result
            q_slot.store(acc.to(dtype))
            fence_async_shared()
            leading = 0
            if VARLEN:
                leading = FAR
            tma.async_copy_shared_to_global(
                out_rows, [leading, q_outer, head, q_inner + first + part * ROWS, 0],
                q_slot._reinterpret(dtype, q_tile, out_rows.layout),
            )  # fmt: skip
            if Q_SLOTS == 1:
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(part), count=1)
            taken += 1
    tma.store_wait(0)
    if PAIRED:
        meet(4)


# these vary from call to call without a new kernel
_PLAIN = ["room", "turns", "tiles", "heads", "batch", "q_length", "k_length", "together", "left", "right", "never"]


@gluon.jit(do_not_specialize=_PLAIN)
def hopper_forward(
    q_rows, k_rows, v_rows, k_copies, v_copies, out_rows, Lse, Plan, Count, Whole,
    room, turns, tiles, heads, batch, q_length, k_length, together, left, right, scale, never,
    GROUP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, VARLEN: gl.constexpr,
    LISTED: gl.constexpr, LSE: gl.constexpr, WIDTH: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr,
    Q_SLOTS: gl.constexpr, K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
    ALTERNATE: gl.constexpr, HELD: gl.constexpr, NAMED: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Out and Lse of dense (B, S, H, D) or packed (T, H, D) tensors, the first six as TMA descriptors of rank 5.

    Dimensions of a descriptor: 1, batch, head, row, column; packed: the two of :data:`FAR`, head, row, column. Columns
    from head_dim to WIDTH read as zeros. ``turns`` tiles are shared out among the programs of the grid. Plan is
    tile_plan's, Count, Whole and the copies are key_blocks' and gather_keys' (packed over the batch), where VARLEN and
    LISTED ask for them. ``scale`` is positive and for base 2. ``never`` is 0. ALTERNATE: the warpgroups take turns
    at the tensor cores. HELD: rows of Q stay in registers, so that a step reads a fifth less of shared memory.
    NAMED: slots of K and V, at most 5, are given back through named barriers. PAIRED: programs work in pairs, as
    _hopper_pairs.py has it; neither packed sequences nor positions.
    """
    gl.static_assert(TURN + CONSUMERS <= FREE)
    gl.static_assert(not PAIRED or (NAMED and CONSUMERS == 2 and WIDTH == 128 and not (VARLEN or LEFT or RIGHT)))
    gl.static_assert(not NAMED or FREE + K_SLOTS + V_SLOTS <= 16, "there are 16 named barriers")
    dtype: gl.constexpr = q_rows.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], dtype)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, WIDTH], dtype)
    # The larger the nearer to the front: the inline PTX of pairs has to know where everything is. So there are more
    # mbarriers than are used, each kind takes more than what Triton hands to the partitions there (about 200 bytes).
    slots = gl.allocate_shared_memory(dtype, [K_SLOTS + V_SLOTS, BLOCK_K, WIDTH], k_layout)
    parts = gl.allocate_shared_memory(dtype, [Q_SLOTS * CONSUMERS, ROWS, WIDTH], q_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [ROOM[0], 1], one)
    v_empty = gl.allocate_shared_memory(gl.int64, [ROOM[1], 1], one)
    k_full = gl.allocate_shared_memory(gl.int64, [ROOM[2], 1], one)
    v_full = gl.allocate_shared_memory(gl.int64, [ROOM[3], 1], one)
    q_full = gl.allocate_shared_memory(gl.int64, [ROOM[4], 1], one)
    q_empty = gl.allocate_shared_memory(gl.int64, [ROOM[5], 1], one)
    # where named barriers serve, these are for the other of a pair
    givers: gl.constexpr = 1 if NAMED else CONSUMERS
    for index in gl.static_range(Q_SLOTS * CONSUMERS):
        mbarrier.init(q_full.index(index), count=1)
        mbarrier.init(q_empty.index(index), count=1)
    for index in gl.static_range(K_SLOTS):
        mbarrier.init(k_full.index(index), count=1)
        mbarrier.init(k_empty.index(index), count=givers)
    for index in gl.static_range(V_SLOTS):
        mbarrier.init(v_full.index(index), count=1)
        mbarrier.init(v_empty.index(index), count=givers)
    if PAIRED:
        announce()
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (Plan, Count, Whole)
    sizes = (tiles, heads, batch, q_length, k_length, together)
    # the loading one is a single warp: four would be 6 % of all instructions, and 4 % of the time of cross attention
    if PAIRED:
        gl.warp_specialize(
            [
                (consume, (
                    0, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (consume, (
                    1, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (produce, (
                    q_rows, k_rows, v_rows, k_copies, v_copies, parts, slots, barriers, tables, room, turns, sizes,
                    left, right, GROUP, LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS,
                    V_SLOTS, WIDTH, NAMED, PAIRED,
                )),
                (idle, (2,)),
                (idle, (1,)),
            ],
            [4, 1, 2, 1],
            [REGISTERS, 24, 24, 24],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (
                    0, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (consume, (
                    1, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (produce, (
                    q_rows, k_rows, v_rows, k_copies, v_copies, parts, slots, barriers, tables, room, turns, sizes,
                    left, right, GROUP, LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS,
                    V_SLOTS, WIDTH, NAMED, PAIRED,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    0, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (consume, (
                    1, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (consume, (
                    2, Lse, out_rows, parts, slots, barriers, tables, turns, sizes, left, right, scale, never,
                    LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, LSE, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS, V_SLOTS,
                    WIDTH, ALTERNATE, HELD, NAMED, PAIRED,
                )),
                (produce, (
                    q_rows, k_rows, v_rows, k_copies, v_copies, parts, slots, barriers, tables, room, turns, sizes,
                    left, right, GROUP, LEFT, RIGHT, LOWER_RIGHT, VARLEN, LISTED, CONSUMERS, BLOCK_K, Q_SLOTS, K_SLOTS,
                    V_SLOTS, WIDTH, NAMED, PAIRED,
                )),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
