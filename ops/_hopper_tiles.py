"""What the warps of the kernel for sm_90 share: where a turn works, which keys its rows see; and the loading one.

Gluon functions only; see _hopper_forward.py for the words.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ._hopper_pairs import K_FULL, V_FULL, copy_to_both, half, meet, tell_partner

# rows of one computing warpgroup: its matrix instruction has 64
ROWS = gl.constexpr(64)
# Two leading dimensions make a TMA descriptor end where a sequence ends: FAR in the first and the end of the sequence
# in the second cancel (addresses wrap at 2^64) against FAR - length + row in the dimension of rows, which is FAR long.
# What lies behind reads as zeros, NaN of a neighbour included, and is not written.
FAR = gl.constexpr(1 << 30)


# Numbers of named barriers, 16 in all, of which Triton takes the first few. Who waits there wakes faster than at an
# mbarrier (1 % of the kernel's time), and arriving makes nobody wait: at an mbarrier Gluon lets one thread arrive, for
# which the warpgroup waits for itself.
TURN = gl.constexpr(8)  # and as many as there are computing warpgroups: each waits at its own for its turn
FREE = gl.constexpr(11)  # NAMED: one for each slot of K, then of V; all who compute arrive, the loading warp waits


@gluon.jit
def _barrier(ASM: gl.constexpr, number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    place = gl.zeros([32 * WARPS], gl.int32, layout=layout) + number
    threads = gl.full([32 * WARPS], THREADS, gl.int32, layout=layout)
    gl.inline_asm_elementwise(ASM, "=r,r,r", [place, threads], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive_at(number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """All threads of this partition, of WARPS warps, arrive at a named barrier that opens when THREADS did."""
    _barrier("bar.arrive $1, $2; mov.b32 $0, $1;", number, THREADS, WARPS)


@gluon.jit
def wait_at(number, THREADS: gl.constexpr, WARPS: gl.constexpr):
    """Arrive, as :func:`arrive_at` does, and wait until the barrier opens."""
    _barrier("bar.sync $1, $2; mov.b32 $0, $1;", number, THREADS, WARPS)


@gluon.jit
def await_turn(part: gl.constexpr):
    """Wait until another warpgroup passes the turn to warpgroup ``part``, this one."""
    wait_at(TURN + part, 256, 4)


@gluon.jit
def pass_turn(part: gl.constexpr):
    """Let warpgroup ``part``, another one, take its turn."""
    arrive_at(TURN + part, 256, 4)


@gluon.jit
def give_back(empty, slot, before: gl.constexpr, CONSUMERS: gl.constexpr, NAMED: gl.constexpr):
    """This warpgroup has read ``slot``: of K (``before`` is 0) or of V (``before`` is K_SLOTS)."""
    if NAMED:
        arrive_at(FREE + before + slot, CONSUMERS * 128 + 32, 4)
    else:
        mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def await_free(
    empty, number, SLOTS: gl.constexpr, before: gl.constexpr, CONSUMERS: gl.constexpr, NAMED: gl.constexpr,
    PAIRED: gl.constexpr, BEHIND: gl.constexpr,
):  # fmt: skip
    """Wait until all warpgroups, of both programs of a pair, have given back the slot that block ``number`` gets: the
    loading warp.
    """
    if NAMED:
        if number >= SLOTS:
            wait_at(FREE + before + number % SLOTS, CONSUMERS * 128 + 32, 1)
            if PAIRED:
                tell_partner(empty, number % SLOTS, before == 0, BEHIND)
    if PAIRED or not NAMED:
        mbarrier.wait(empty.index(number % SLOTS), ((number // SLOTS) & 1) ^ 1)


@gluon.jit
def place_of(program, Plan, sizes, RIGHT: gl.constexpr, VARLEN: gl.constexpr, BLOCK_Q: gl.constexpr):
    """Where turn ``program`` works: batch, head, first row, first row of the sequence among the packed, rows and keys
    of the sequence; of Q and of K the outer and inner coordinates that row 0 has in their descriptors.

    ``together`` heads take turns at a tile number, so that the longest tiles come first and their keys stay in L2.
    """
    tiles, heads, batch, q_length, k_length, together = sizes
    if VARLEN:
        record = Plan + (program // heads) * 8
        first_tile = gl.load(record)
        tiles = gl.load(record + 1)
        q_begin = gl.load(record + 2)
        q_length = gl.load(record + 3)
        k_begin = gl.load(record + 4)
        k_length = gl.load(record + 5)
        program -= first_tile * heads
        every = heads
    else:
        every = batch * heads
    size = tiles * together
    of_group = program // size
    turn = program - of_group * size
    wide = gl.minimum(together, every - of_group * together)
    tile = turn // wide
    head = of_group * together + turn - tile * wide
    if RIGHT:
        tile = tiles - 1 - tile  # the longest rows first
    first = tile * BLOCK_Q
    if VARLEN:
        number = 0
        q_from = q_begin
        q_outer, q_inner = q_begin + q_length, FAR - q_length
        k_outer, k_inner = k_begin + k_length, FAR - k_length
    else:
        number = head // heads
        head -= number * heads
        q_from = 0
        q_outer, q_inner = number, 0
        k_outer, k_inner = number, 0
    return number, head, first, q_from, q_length, k_length, q_outer, q_inner, k_outer, k_inner


@gluon.jit
def rounds_of(turns, PAIRED: gl.constexpr):
    """How many turns the first program takes; a pair takes its turns together."""
    programs = gl.num_programs(0)
    if PAIRED:
        programs = programs // 2
    return (turns + programs - 1) // programs


@gluon.jit
def turn_of(round, PAIRED: gl.constexpr):
    """The turn that this program takes in ``round``: there and back over the programs, so that who begins with a long
    one ends with a short one.
    """
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if PAIRED:
        program = program // 2
        programs = programs // 2
    return round * programs + gl.where(round % 2 == 0, program, programs - 1 - program)


@gluon.jit
def keys_of(
    first, q_length, k_length, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """What the rows from ``first`` on see: first key, end, shift, number of blocks; and of blocks, counted from the
    last one, where those without tests begin and end. Row i sees keys i + shift - left to i + shift + right.
    """
    shift = 0
    if LOWER_RIGHT:
        shift = k_length - q_length
    last = gl.minimum(first + BLOCK_Q, q_length) - 1
    begin = 0
    end = k_length
    whole_end = k_length
    if RIGHT:
        end = gl.minimum(gl.maximum(last + shift + right + 1, 0), k_length)
        whole_end = gl.minimum(gl.maximum(first + shift + right + 1, 0), k_length)
    if LEFT:
        begin = gl.minimum(gl.maximum(first + shift - left, 0), end)
    # a tile that sees nothing walks over one block of hidden keys
    blocks = gl.maximum((end - begin + BLOCK_K - 1) // BLOCK_K, 1)
    plain_begin = blocks - gl.minimum(gl.maximum(whole_end - begin, 0) // BLOCK_K, blocks)
    plain_end = blocks
    if LEFT:
        whole_begin = gl.minimum(gl.maximum(last + shift - left, 0), end)
        plain_end = gl.maximum(blocks - (whole_begin - begin + BLOCK_K - 1) // BLOCK_K, plain_begin)
    return begin, end, shift, blocks, plain_begin, plain_end


@gluon.jit
def block_at(step, blocks, place, k_outer, Whole, whole, rest, base, LISTED: gl.constexpr, BLOCK_K: gl.constexpr):
    """Outer coordinate and row, in a descriptor, of the block that step ``step`` takes, and whether it is packed.

    LISTED: the blocks of a key-padding mask, the packed ones first; key_blocks has what Whole, whole and rest are,
    ``base`` is the first row of the sequence. Otherwise the sequence begins at ``place``.
    """
    block = blocks - 1 - step
    if LISTED:
        packed = block >= whole
        number = gl.load(Whole + gl.minimum(block, gl.maximum(whole - 1, 0)))
        begin = base + gl.where(packed, block - whole, number) * BLOCK_K
        end = gl.where(packed, gl.minimum(begin + BLOCK_K, base + rest), begin + BLOCK_K)
        return end, FAR - end + begin, packed
    else:
        return k_outer, place + block * BLOCK_K, block < 0


@gluon.jit
def copy_in(
    tensor, copies, at, full, slot, packed, tile, barrier,
    KEYS: gl.constexpr, LISTED: gl.constexpr, BLOCK_K: gl.constexpr, WIDTH: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """One block of keys or values, of ``tensor`` or of what gather_keys packed of it, on its way to ``slot``.

    In pairs half of it, to both; ``slot`` is tile ``tile`` of shared memory, ``full`` at byte ``barrier``.
    """
    mbarrier.expect(full, tensor.block_type.nbytes)
    target = slot._reinterpret(tensor.dtype, [1, 1, 1, BLOCK_K, WIDTH], tensor.layout)
    if PAIRED:
        copy_to_both(tensor, copies, at, full, slot, packed, tile, barrier, KEYS, LISTED)
    elif LISTED:
        tma.async_copy_global_to_shared(tensor, at, full, target, pred=packed == 0)
        tma.async_copy_global_to_shared(copies, at, full, target, pred=packed != 0)
    else:
        tma.async_copy_global_to_shared(tensor, at, full, target)


@gluon.jit
def produce(
    q_rows, k_rows, v_rows, k_copies, v_copies, parts, slots, barriers, tables, room, turns, sizes, left, right,
    GROUP: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, LOWER_RIGHT: gl.constexpr, VARLEN: gl.constexpr,
    LISTED: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_K: gl.constexpr, Q_SLOTS: gl.constexpr,
    K_SLOTS: gl.constexpr, V_SLOTS: gl.constexpr, WIDTH: gl.constexpr, NAMED: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """The loading warp: Q of each turn, then K one block ahead of V, as their slots are set free in that order."""
    BLOCK_Q: gl.constexpr = CONSUMERS * ROWS
    SPAN: gl.constexpr = BLOCK_Q * (2 if PAIRED else 1)
    # where pairs find mbarriers: behind all tiles
    BEHIND: gl.constexpr = 2 * WIDTH * ((K_SLOTS + V_SLOTS) * BLOCK_K + Q_SLOTS * BLOCK_Q)
    q_tile: gl.constexpr = [1, 1, 1, ROWS, WIDTH]
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    Plan, Count, Whole = tables
    done = 0
    taken = 0
    if PAIRED:
        meet(1)
    for round in range(rounds_of(turns, PAIRED)):
        program = turn_of(round, PAIRED)
        number, head, first, _q_from, q_rest, k_rest, q_outer, q_inner, k_outer, k_inner = place_of(
            gl.minimum(program, turns - 1), Plan, sizes, RIGHT, VARLEN, SPAN
        )
        if (program < turns) & (first < q_rest):
            if PAIRED:
                first += half() * BLOCK_Q
            whole = 0
            rest = 0
            mine = Whole
            base = number * k_rest
            if LISTED:
                mine = Whole + number * room
                whole = gl.load(Count + number * 2)
                rest = gl.load(Count + number * 2 + 1)
                k_rest = whole * BLOCK_K + rest
            begin, _end, _shift, blocks, _plain_begin, _plain_end = keys_of(
                first, q_rest, k_rest, left, right, LEFT, RIGHT, LOWER_RIGHT, BLOCK_Q, BLOCK_K
            )
            leading = 0
            if VARLEN:
                leading = FAR
            k_leading = leading
            if LISTED:
                k_leading = FAR
            key_head = head // GROUP
            place = k_inner + begin
            q_slot = (taken % Q_SLOTS) * CONSUMERS
            for part in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(q_slot + part), ((taken // Q_SLOTS) & 1) ^ 1)
                mbarrier.expect(q_full.index(q_slot + part), q_rows.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_rows, [leading, q_outer, head, q_inner + first + part * ROWS, 0],
                    q_full.index(q_slot + part),
                    parts.index(q_slot + part)._reinterpret(q_rows.dtype, q_tile, q_rows.layout),
                )  # fmt: skip
            for step in range(blocks + 1):
                # Rows are computed from the step: of two names of one value before a loop Triton 3.6 and 3.7 carry one.
                if step < blocks:
                    outer, row, packed = block_at(
                        step, blocks, place, k_outer, mine, whole, rest, base, LISTED, BLOCK_K
                    )
                    slot = (done + step) % K_SLOTS
                    await_free(k_empty, done + step, K_SLOTS, 0, CONSUMERS, NAMED, PAIRED, BEHIND)
                    copy_in(
                        k_rows, k_copies, [k_leading, outer, key_head, row, 0], k_full.index(slot),
                        slots.index(slot), packed, slot, BEHIND + K_FULL + slot * 8,
                        True, LISTED, BLOCK_K, WIDTH, PAIRED,
                    )  # fmt: skip
                if step > 0:
                    outer, row, packed = block_at(
                        step - 1, blocks, place, k_outer, mine, whole, rest, base, LISTED, BLOCK_K
                    )
                    slot = (done + step - 1) % V_SLOTS
                    await_free(v_empty, done + step - 1, V_SLOTS, K_SLOTS, CONSUMERS, NAMED, PAIRED, BEHIND)
                    copy_in(
                        v_rows, v_copies, [k_leading, outer, key_head, row, 0], v_full.index(slot),
                        slots.index(K_SLOTS + slot), packed, K_SLOTS + slot, BEHIND + V_FULL + slot * 8,
                        False, LISTED, BLOCK_K, WIDTH, PAIRED,
                    )  # fmt: skip
            done += blocks
            taken += 1
    if NAMED:
        # What was given back last: so every arrival at a slot's barrier is waited for. (The last turn is not: who
        # passes it on cannot know that nobody is left to take it.)
        for number in range(gl.maximum(done, K_SLOTS), done + K_SLOTS):
            await_free(k_empty, number, K_SLOTS, 0, CONSUMERS, NAMED, PAIRED, BEHIND)
        for number in range(gl.maximum(done, V_SLOTS), done + V_SLOTS):
            await_free(v_empty, number, V_SLOTS, K_SLOTS, CONSUMERS, NAMED, PAIRED, BEHIND)
    if PAIRED:
        meet(1)
