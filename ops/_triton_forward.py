"""The forward kernel, for dense (B, S, H, D) and packed (T, H, D) tensors: kernels only, see _triton_tiles.py.

Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) in base 2. One program takes a tile of queries of one head
and walks over the keys three times: blocks cut by the left edge of a window, whole blocks without any test, and the
last ones. Only plain loads: descriptors need scratch memory, which AOTInductor of torch 2.11 allocates too small.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import bounds, hide, kernel, keys_seen, load_rows, mask_start, store_rows


@triton.jit
def walk(
    acc_a, acc_b, total, top, q_a, q_b, K, V, Order, Mask, begin, end, limit, rows, mask_rows, k_row, v_row, mask_k,
    left, right, scale,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    GATHER: tl.constexpr, CHECK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys ``begin`` to ``end`` (in blocks; ``limit`` exist, which only CHECK heeds), added to a tile's state.

    With GATHER, K and V are what :func:`compact` made, and Order says where a key was.
    """
    step = tl.arange(0, BLOCK_K)
    for place in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        inside = place + step < limit
        keys = place + step
        if GATHER and CHECK and (LEFT or RIGHT):
            keys = tl.load(Order + keys, mask=inside, other=0)
        k_base, v_base = K + tl.cast(place, tl.int64) * k_row, V + tl.cast(place, tl.int64) * v_row
        k_offsets, v_offsets = step * k_row, step * v_row
        k_a = load_rows(k_base, k_offsets, inside, 0, A, D, CHECK)
        start = mask_start(
            Mask + tl.cast(place, tl.int64) * mask_k, mask_rows[:, None] + (step * mask_k)[None, :], inside[None, :],
            scale, BLOCK_Q, BLOCK_K, MASK, CHECK,
        )  # fmt: skip
        scores = tl.dot(q_a, tl.trans(k_a), start, input_precision="ieee")
        if B > 0:
            k_b = load_rows(k_base, k_offsets, inside, A, B, D, CHECK)
            scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
        if CHECK:
            scores = hide(scores, rows[:, None], keys[None, :], inside[None, :], left, right, LEFT, RIGHT)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        safe = new_top
        if CHECK or MASK > 0:
            # a row that saw nothing yet: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        # the scale rides on the subtraction: one multiply-add for each score
        weights = tl.math.exp2(scores * scale - safe[:, None])
        fade = tl.math.exp2(top - safe)
        total = total * fade + tl.sum(weights, 1)
        v_a = load_rows(v_base, v_offsets, inside, 0, A, D, CHECK)
        acc_a = tl.dot(weights.to(v_a.dtype), v_a, acc_a * fade[:, None], input_precision="ieee")
        if B > 0:
            v_b = load_rows(v_base, v_offsets, inside, A, B, D, CHECK)
            acc_b = tl.dot(weights.to(v_b.dtype), v_b, acc_b * fade[:, None], input_precision="ieee")
        top = new_top
    return acc_a, acc_b, total, top


@kernel
def attention_forward(
    Q, K, V, Out, Lse, Mask, Order, Rank, StartsQ, StartsK,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, mask_batch, mask_head, mask_q, mask_k,
    batch, heads, q_length, k_length, tiles, left, right, scale,
    GROUP: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, GATHER: tl.constexpr, VARLEN: tl.constexpr,
    LSE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Out (B, Sq, H, D) and Lse (B, H, Sq), or packed (Tq, H, D) and (H, Tq), both contiguous.

    ``q_length`` and ``k_length`` are the rows of a sequence, or of all when VARLEN. Head columns come in two parts of
    A and B (0: none) columns, powers of two. ``scale`` is positive. Grid: tiles * heads, times batch unless VARLEN.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if RIGHT and not VARLEN:
        tile = tiles - 1 - tile  # the longest rows first
    head = program // tiles
    # Python's float arrives as fp64 under Inductor; base 2
    scale = tl.cast(scale, tl.float32) * 1.4426950408889634
    if VARLEN:
        low = 0
        high = batch
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(StartsQ + middle) // BLOCK_Q + middle <= tile:
                low = middle
            else:
                high = middle - 1
        q_begin, q_end = bounds(
            tl.load(StartsQ + low), tl.load(StartsQ + low + 1, mask=low < batch, other=q_length), q_length
        )
        first = (tile - q_begin // BLOCK_Q - low) * BLOCK_Q
        rows_left = q_end - q_begin - first
        # rows behind the last sequence, number ``batch``, have no keys
        k_begin, k_end = bounds(tl.load(StartsK + low), tl.load(StartsK + low + 1, mask=low < batch, other=0), k_length)
        keys = k_end - k_begin
        K += tl.cast(k_begin, tl.int64) * (k_row * UNIT)
        V += tl.cast(k_begin, tl.int64) * (v_row * UNIT)
        q_from = q_begin + first
        shift = keys - (q_end - q_begin)
    else:
        number = head // heads
        head = head % heads
        first = tile * BLOCK_Q
        rows_left = q_length - first
        keys = k_length
        of_batch = tl.cast(number, tl.int64)
        K += of_batch * k_batch * UNIT
        V += of_batch * v_batch * UNIT
        Q += of_batch * q_batch * UNIT
        Mask += of_batch * mask_batch + tl.cast(head, tl.int64) * mask_head + tl.cast(first, tl.int64) * mask_q
        Order += of_batch * k_length
        Rank += of_batch * (k_length + 1)
        q_from = first
        shift = k_length - q_length
    if rows_left <= 0:
        return
    if not LOWER_RIGHT:
        shift = 0
    K += tl.cast(head // GROUP, tl.int64) * k_head * UNIT
    V += tl.cast(head // GROUP, tl.int64) * v_head * UNIT
    Q += tl.cast(q_from, tl.int64) * (q_row * UNIT) + tl.cast(head, tl.int64) * q_head * UNIT
    within = tl.arange(0, BLOCK_Q)
    inside = within < rows_left
    q_offsets = within * (q_row * UNIT)
    q_a = load_rows(Q, q_offsets, inside, 0, A, D, True)
    acc_a = tl.zeros([BLOCK_Q, A], tl.float32)
    q_b, acc_b = q_a, 0.0
    if B > 0:
        q_b = load_rows(Q, q_offsets, inside, A, B, D, True)
        acc_b = tl.zeros([BLOCK_Q, B], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    last = first + tl.minimum(rows_left, BLOCK_Q) - 1
    begin, whole_begin, whole_end, end = keys_seen(
        first, last, shift, left, right, keys, Rank, LEFT, RIGHT, GATHER, BLOCK_K
    )
    rows = first + within + shift
    # rows past the end read the mask of the last one: their results are not stored
    mask_rows = tl.minimum(within, rows_left - 1) * mask_q
    if LEFT:
        acc_a, acc_b, total, top = walk(
            acc_a, acc_b, total, top, q_a, q_b, K, V, Order, Mask, begin, tl.minimum(whole_begin, end), end, rows,
            mask_rows, k_row * UNIT, v_row * UNIT, mask_k, left, right, scale,
            D, A, B, MASK, LEFT, RIGHT, GATHER, True, BLOCK_Q, BLOCK_K, STAGES,
        )  # fmt: skip
    acc_a, acc_b, total, top = walk(
        acc_a, acc_b, total, top, q_a, q_b, K, V, Order, Mask, whole_begin, whole_end, end, rows, mask_rows,
        k_row * UNIT, v_row * UNIT, mask_k, left, right, scale,
        D, A, B, MASK, LEFT, RIGHT, GATHER, False, BLOCK_Q, BLOCK_K, STAGES,
    )  # fmt: skip
    acc_a, acc_b, total, top = walk(
        acc_a, acc_b, total, top, q_a, q_b, K, V, Order, Mask, whole_end, end, end, rows, mask_rows,
        k_row * UNIT, v_row * UNIT, mask_k, left, right, scale,
        D, A, B, MASK, LEFT, RIGHT, GATHER, True, BLOCK_Q, BLOCK_K, STAGES if B > 0 else 1,
    )  # fmt: skip
    # addresses of results are made here: in registers beside the loops they would spill
    if VARLEN:
        out_row, lse_row = tl.cast(q_from, tl.int64), tl.cast(head, tl.int64)
    else:
        out_row, lse_row = tl.cast(number, tl.int64) * q_length + q_from, tl.cast(number, tl.int64) * heads + head
    if LSE:
        # an empty row: log2(0) - inf
        lse = (top + tl.math.log2(total)) * 0.6931471805599453
        lse_from = lse_row * q_length + q_from
        tl.store(Lse + lse_from + within, lse, mask=inside)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    Out += (out_row * heads + head) * D
    out_offsets = within * (heads * D)
    store_rows(Out, out_offsets, inside, acc_a * share[:, None], 0, A, D)
    if B > 0:
        store_rows(Out, out_offsets, inside, acc_b * share[:, None], A, B, D)
