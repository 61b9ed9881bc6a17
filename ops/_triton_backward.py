"""The two backward kernels, for dense and packed tensors: kernels only, see _triton_tiles.py.

No atomics, so the same inputs give the same bits: each program owns the rows it writes. dQ walks over keys as the
forward does and leaves what dK/dV needs of each row; dK/dV walks over queries, all heads of its group included.
That is seven products where five with atomic adds would do.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import bounds, hide, kernel, keys_seen, load_rows, mask_start, store_rows


@triton.jit
def walk_keys(
    dq_a, dq_b, q_a, q_b, do_a, do_b, lse, delta, K, V, Order, Mask, begin, end, limit, rows, mask_rows, k_row, v_row,
    mask_k, left, right, scale,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    GATHER: tl.constexpr, CHECK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys ``begin`` to ``end`` added to a tile's dQ; ``lse`` and ``scale`` in base 2."""
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
        v_a = load_rows(v_base, v_offsets, inside, 0, A, D, CHECK)
        slope = tl.dot(do_a, tl.trans(v_a), input_precision="ieee")
        if B > 0:
            v_b = load_rows(v_base, v_offsets, inside, A, B, D, CHECK)
            slope = tl.dot(do_b, tl.trans(v_b), slope, input_precision="ieee")
        if CHECK:
            scores = hide(scores, rows[:, None], keys[None, :], inside[None, :], left, right, LEFT, RIGHT)
        weights = tl.math.exp2(scores * scale - lse[:, None])
        dscores = (weights * (slope - delta[:, None])).to(k_a.dtype)
        dq_a = tl.dot(dscores, k_a, dq_a, input_precision="ieee")
        if B > 0:
            dq_b = tl.dot(dscores, k_b, dq_b, input_precision="ieee")
    return dq_a, dq_b


@kernel
def attention_dq(
    Q, K, V, Out, Grad, Lse, Rows, DQ, Mask, Order, Rank, StartsQ, StartsK,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head, mask_batch,
    mask_head, mask_q, mask_k, batch, heads, q_length, k_length, tiles, left, right, scale,
    GROUP: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, GATHER: tl.constexpr, VARLEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DQ, laid out as Out (contiguous), and for attention_dkv, laid out as Lse, four numbers of which two are
    used: lse in base 2 (inf for an empty row) and rowsum(Grad * Out).

    Grid: as the forward.
    """
    program = tl.program_id(0)
    tile = program % tiles
    if RIGHT and not VARLEN:
        tile = tiles - 1 - tile
    head = program // tiles
    factor = tl.cast(scale, tl.float32)
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
        q_from = tl.cast(q_begin + first, tl.int64)
        lse_from = tl.cast(head, tl.int64) * q_length + q_from
        out_from = (q_from * heads + head) * D
        shift = keys - (q_end - q_begin)
    else:
        number = tl.cast(head // heads, tl.int64)
        head = head % heads
        first = tile * BLOCK_Q
        rows_left = q_length - first
        keys = k_length
        K += number * k_batch * UNIT
        V += number * v_batch * UNIT
        Q += number * q_batch * UNIT
        Grad += number * g_batch * UNIT
        Mask += number * mask_batch + tl.cast(head, tl.int64) * mask_head + tl.cast(first, tl.int64) * mask_q
        Order += number * k_length
        Rank += number * (k_length + 1)
        q_from = tl.cast(first, tl.int64)
        lse_from = (number * heads + head) * q_length + q_from
        out_from = ((number * q_length + q_from) * heads + head) * D
        shift = k_length - q_length
    if rows_left <= 0:
        return
    if not LOWER_RIGHT:
        shift = 0
    K += tl.cast(head // GROUP, tl.int64) * k_head * UNIT
    V += tl.cast(head // GROUP, tl.int64) * v_head * UNIT
    Q += q_from * (q_row * UNIT) + tl.cast(head, tl.int64) * q_head * UNIT
    Grad += q_from * (g_row * UNIT) + tl.cast(head, tl.int64) * g_head * UNIT
    within = tl.arange(0, BLOCK_Q)
    inside = within < rows_left
    q_offsets = within * (q_row * UNIT)
    g_offsets = within * (g_row * UNIT)
    out_offsets = within * (heads * D)
    q_a = load_rows(Q, q_offsets, inside, 0, A, D, True)
    do_a = load_rows(Grad, g_offsets, inside, 0, A, D, True)
    out_a = load_rows(Out + out_from, out_offsets, inside, 0, A, D, True)
    delta = tl.sum(do_a.to(tl.float32) * out_a.to(tl.float32), 1)
    dq_a = tl.zeros([BLOCK_Q, A], tl.float32)
    q_b, do_b, dq_b = q_a, do_a, 0.0
    if B > 0:
        q_b = load_rows(Q, q_offsets, inside, A, B, D, True)
        do_b = load_rows(Grad, g_offsets, inside, A, B, D, True)
        out_b = load_rows(Out + out_from, out_offsets, inside, A, B, D, True)
        delta += tl.sum(do_b.to(tl.float32) * out_b.to(tl.float32), 1)
        dq_b = tl.zeros([BLOCK_Q, B], tl.float32)
    lse = tl.load(Lse + lse_from + within, mask=inside, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty row weighs nothing
    lse *= 1.4426950408889634
    tl.store(Rows + (lse_from + within) * 4, lse, mask=inside)
    tl.store(Rows + (lse_from + within) * 4 + 1, delta, mask=inside)
    last = first + tl.minimum(rows_left, BLOCK_Q) - 1
    begin, whole_begin, whole_end, end = keys_seen(
        first, last, shift, left, right, keys, Rank, LEFT, RIGHT, GATHER, BLOCK_K
    )
    rows = first + within + shift
    mask_rows = tl.minimum(within, rows_left - 1) * mask_q
    scale_2 = factor * 1.4426950408889634
    if LEFT:
        dq_a, dq_b = walk_keys(
            dq_a, dq_b, q_a, q_b, do_a, do_b, lse, delta, K, V, Order, Mask, begin, tl.minimum(whole_begin, end), end,
            rows, mask_rows, k_row * UNIT, v_row * UNIT, mask_k, left, right, scale_2,
            D, A, B, MASK, LEFT, RIGHT, GATHER, True, BLOCK_Q, BLOCK_K, STAGES,
        )  # fmt: skip
    dq_a, dq_b = walk_keys(
        dq_a, dq_b, q_a, q_b, do_a, do_b, lse, delta, K, V, Order, Mask, whole_begin, whole_end, end, rows, mask_rows,
        k_row * UNIT, v_row * UNIT, mask_k, left, right, scale_2,
        D, A, B, MASK, LEFT, RIGHT, GATHER, False, BLOCK_Q, BLOCK_K, STAGES,
    )  # fmt: skip
    dq_a, dq_b = walk_keys(
        dq_a, dq_b, q_a, q_b, do_a, do_b, lse, delta, K, V, Order, Mask, whole_end, end, end, rows, mask_rows,
        k_row * UNIT, v_row * UNIT, mask_k, left, right, scale_2,
        D, A, B, MASK, LEFT, RIGHT, GATHER, True, BLOCK_Q, BLOCK_K, STAGES if B > 0 else 1,
    )  # fmt: skip
    store_rows(DQ + out_from, out_offsets, inside, dq_a * factor, 0, A, D)
    if B > 0:
        store_rows(DQ + out_from, out_offsets, inside, dq_b * factor, A, B, D)


@triton.jit
def walk_queries(
    dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, Q, Grad, Rows, Mask, begin, end, limit, shift, keys, mask_keys,
    q_row, g_row, mask_q, left, right, scale,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, MASK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    CHECK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Queries ``begin`` to ``end`` added to dK and dV of a tile of keys; everything (keys, queries)."""
    step = tl.arange(0, BLOCK_Q)
    for first in tl.range(begin, end, BLOCK_Q):
        inside = first + step < limit
        q_base = Q + tl.cast(first, tl.int64) * q_row
        g_base = Grad + tl.cast(first, tl.int64) * g_row
        q_a = load_rows(q_base, step * q_row, inside, 0, A, D, CHECK)
        # lse and delta of a row: the first two of four numbers. Loaded as vectors they would come in the layout of the
        # products, 16 addresses for each thread, and spill at head_dim 128; a tile with as many numbers as there are
        # threads is loaded once and handed round.
        pairs = Rows + (first + step)[:, None] * 4 + tl.arange(0, 4)[None, :]
        if CHECK:
            pair = tl.load(pairs, mask=inside[:, None], other=0.0)
        else:
            pair = tl.load(pairs)
        lse = tl.sum(tl.where(tl.arange(0, 4)[None, :] == 0, pair, 0.0), 1)
        start = mask_start(
            Mask + tl.cast(first, tl.int64) * mask_q, mask_keys[:, None] + (step * mask_q)[None, :], inside[None, :],
            scale, BLOCK_K, BLOCK_Q, MASK, CHECK,
        )  # fmt: skip
        scores = tl.dot(k_a, tl.trans(q_a), start, input_precision="ieee")
        if B > 0:
            q_b = load_rows(q_base, step * q_row, inside, A, B, D, CHECK)
            scores = tl.dot(k_b, tl.trans(q_b), scores, input_precision="ieee")
        if CHECK:
            rows = first + step + shift
            scores = hide(scores, rows[None, :], keys[:, None], inside[None, :], left, right, LEFT, RIGHT)
        weights = tl.math.exp2(scores * scale - lse[None, :])
        do_a = load_rows(g_base, step * g_row, inside, 0, A, D, CHECK)
        low = weights.to(do_a.dtype)
        dv_a = tl.dot(low, do_a, dv_a, input_precision="ieee")
        slope = tl.dot(v_a, tl.trans(do_a), input_precision="ieee")
        if B > 0:
            do_b = load_rows(g_base, step * g_row, inside, A, B, D, CHECK)
            dv_b = tl.dot(low, do_b, dv_b, input_precision="ieee")
            slope = tl.dot(v_b, tl.trans(do_b), slope, input_precision="ieee")
        delta = tl.sum(tl.where(tl.arange(0, 4)[None, :] == 1, pair, 0.0), 1)
        dscores = (weights * (slope - delta[None, :])).to(q_a.dtype)
        dk_a = tl.dot(dscores, q_a, dk_a, input_precision="ieee")
        if B > 0:
            dk_b = tl.dot(dscores, q_b, dk_b, input_precision="ieee")
    return dk_a, dk_b, dv_a, dv_b


@kernel
def attention_dkv(
    Q, K, V, Grad, Rows, DK, DV, Mask, Order, Rank, StartsQ, StartsK,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, g_batch, g_row, g_head, mask_batch,
    mask_head, mask_q, mask_k, batch, key_heads, q_length, k_length, tiles, left, right, scale,
    GROUP: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNIT: tl.constexpr, MASK: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LOWER_RIGHT: tl.constexpr, GATHER: tl.constexpr, VARLEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DK and DV, contiguous and shaped as K. Grid: tiles * key heads, times batch unless VARLEN."""
    program = tl.program_id(0)
    tile = program % tiles
    key_head = program // tiles
    factor = tl.cast(scale, tl.float32)
    if VARLEN:
        low = 0
        high = batch
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(StartsK + middle) // BLOCK_K + middle <= tile:
                low = middle
            else:
                high = middle - 1
        k_begin, k_end = bounds(
            tl.load(StartsK + low), tl.load(StartsK + low + 1, mask=low < batch, other=k_length), k_length
        )
        first = (tile - k_begin // BLOCK_K - low) * BLOCK_K
        keys_left = k_end - k_begin - first
        q_begin, q_end = bounds(tl.load(StartsQ + low), tl.load(StartsQ + low + 1, mask=low < batch, other=0), q_length)
        rows = q_end - q_begin
        Q += tl.cast(q_begin, tl.int64) * (q_row * UNIT)
        Grad += tl.cast(q_begin, tl.int64) * (g_row * UNIT)
        k_from = tl.cast(k_begin, tl.int64)
        lse_from = tl.cast(q_begin, tl.int64)
        out_from = k_from
        shift = k_end - k_begin - rows
        number = tl.cast(0, tl.int64)
    else:
        number = tl.cast(key_head // key_heads, tl.int64)
        key_head = key_head % key_heads
        first = tile * BLOCK_K
        keys_left = k_length - first
        rows = q_length
        Q += number * q_batch * UNIT
        Grad += number * g_batch * UNIT
        K += number * k_batch * UNIT
        V += number * v_batch * UNIT
        Order += number * k_length
        Rank += number * (k_length + 1)
        k_from = tl.cast(0, tl.int64)
        lse_from = number * key_heads * GROUP * q_length
        out_from = number * k_length
        shift = k_length - q_length
    if keys_left <= 0:
        return
    if not LOWER_RIGHT:
        shift = 0
    K += k_from * (k_row * UNIT) + tl.cast(key_head, tl.int64) * k_head * UNIT
    V += k_from * (v_row * UNIT) + tl.cast(key_head, tl.int64) * v_head * UNIT
    within = tl.arange(0, BLOCK_K)
    inside = within < keys_left
    visible = keys_left
    if GATHER:
        places = tl.load(Order + first + within, mask=inside, other=0)
        visible = tl.load(Rank + k_length) - first
        lowest, highest = (
            tl.load(Order + first),
            tl.load(Order + first + tl.maximum(tl.minimum(visible, BLOCK_K), 1) - 1),
        )
        k_offsets, v_offsets = places.to(tl.int64) * (k_row * UNIT), places.to(tl.int64) * (v_row * UNIT)
    else:
        places = first + within
        lowest, highest = first, first + tl.minimum(keys_left, BLOCK_K) - 1
        K += tl.cast(first, tl.int64) * (k_row * UNIT)
        V += tl.cast(first, tl.int64) * (v_row * UNIT)
        k_offsets, v_offsets = within * (k_row * UNIT), within * (v_row * UNIT)
    real = within < visible
    k_a = load_rows(K, k_offsets, real, 0, A, D, True)
    v_a = load_rows(V, v_offsets, real, 0, A, D, True)
    dk_a = tl.zeros([BLOCK_K, A], tl.float32)
    dv_a = tl.zeros([BLOCK_K, A], tl.float32)
    k_b, v_b, dk_b, dv_b = k_a, v_a, 0.0, 0.0
    if B > 0:
        k_b = load_rows(K, k_offsets, real, A, B, D, True)
        v_b = load_rows(V, v_offsets, real, A, B, D, True)
        dk_b = tl.zeros([BLOCK_K, B], tl.float32)
        dv_b = tl.zeros([BLOCK_K, B], tl.float32)
    # queries that see some key of this tile, and those that see all of them
    begin = 0
    whole_begin = 0
    whole_end = rows
    end = rows
    if RIGHT:
        begin = tl.minimum(tl.maximum(lowest - shift - right, 0), rows)
        whole_begin = tl.minimum(tl.maximum(highest - shift - right, 0), rows)
    if LEFT:
        end = tl.minimum(tl.maximum(highest - shift + left + 1, begin), rows)
        whole_end = tl.minimum(tl.maximum(lowest - shift + left + 1, begin), rows)
    if GATHER:
        end = tl.where(visible > 0, end, begin)
    if RIGHT:
        whole_begin = begin + (whole_begin - begin + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    whole_end = whole_begin + tl.maximum(tl.minimum(whole_end, end) - whole_begin, 0) // BLOCK_Q * BLOCK_Q
    mask_keys = tl.minimum(places, k_length - 1) * mask_k
    Mask += number * mask_batch
    scale_2 = factor * 1.4426950408889634
    for member in range(GROUP):
        head = tl.cast(key_head * GROUP + member, tl.int64)
        q_base, g_base = Q + head * q_head * UNIT, Grad + head * g_head * UNIT
        row_base = (lse_from + head * q_length) * 4
        mask_base = Mask + head * mask_head
        if RIGHT:
            dk_a, dk_b, dv_a, dv_b = walk_queries(
                dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, q_base, g_base, Rows + row_base, mask_base,
                begin, tl.minimum(whole_begin, end), end, shift, places, mask_keys, q_row * UNIT, g_row * UNIT, mask_q,
                left, right, scale_2, D, A, B, MASK, LEFT, RIGHT, True, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        # whole blocks last: what the others need would lie in registers beside them
        dk_a, dk_b, dv_a, dv_b = walk_queries(
            dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, q_base, g_base, Rows + row_base, mask_base,
            whole_end, end, end, shift, places, mask_keys, q_row * UNIT, g_row * UNIT, mask_q,
            left, right, scale_2, D, A, B, MASK, LEFT, RIGHT, True, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        dk_a, dk_b, dv_a, dv_b = walk_queries(
            dk_a, dk_b, dv_a, dv_b, k_a, k_b, v_a, v_b, q_base, g_base, Rows + row_base, mask_base,
            whole_begin, whole_end, end, shift, places, mask_keys, q_row * UNIT, g_row * UNIT, mask_q,
            left, right, scale_2, D, A, B, MASK, LEFT, RIGHT, False, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    DK += out_from * (key_heads * D) + tl.cast(key_head, tl.int64) * D
    DV += out_from * (key_heads * D) + tl.cast(key_head, tl.int64) * D
    if GATHER:
        # keys that count for nothing are written too, with zeros
        dk_a, dv_a = tl.where(real[:, None], dk_a, 0.0), tl.where(real[:, None], dv_a, 0.0)
        if B > 0:
            dk_b, dv_b = tl.where(real[:, None], dk_b, 0.0), tl.where(real[:, None], dv_b, 0.0)
        out_offsets = tl.load(Order + first + within, mask=inside, other=0).to(tl.int64) * (key_heads * D)
    else:
        DK += tl.cast(first, tl.int64) * (key_heads * D)
        DV += tl.cast(first, tl.int64) * (key_heads * D)
        out_offsets = within * (key_heads * D)
    store_rows(DK, out_offsets, inside, dk_a * factor, 0, A, D)
    store_rows(DV, out_offsets, inside, dv_a, 0, A, D)
    if B > 0:
        store_rows(DK, out_offsets, inside, dk_b * factor, A, B, D)
        store_rows(DV, out_offsets, inside, dv_b, A, B, D)
