"""Masks: what the caller gave, in one canonical form; key compaction; lengths and cu_seqlens.

Canonical: ``mask`` is None or a 4-D (B|1, H|1, Sq|1, Sk) bool (True = attend) or additive float tensor, and
``key_padding`` None or a (B, Sk) bool tensor (True = a real key).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import ALIGN_LOWER_RIGHT, CAUSAL, report


def canonical(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """``attn_mask`` and ``key_padding_mask`` of the public calls as ``(mask, key_padding)``.

    Raises ValueError, with all reasons, for a wrong dtype, device or shape and for an ambiguous 2-D or 3-D mask.
    """
    batch, q_length, heads, _ = query.shape
    k_length = key.shape[1]
    found: list[str] = []
    if key_padding_mask is not None:
        found += _wrong(key_padding_mask, "key_padding_mask", query)
        if key_padding_mask.dtype != torch.bool:
            found.append(f"key_padding_mask is {key_padding_mask.dtype}; give bool, True = a real key")
        if key_padding_mask.dim() != 2 or not _fits(key_padding_mask.shape, (batch, k_length), (True, False)):
            found.append(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected (B, Sk) = {(batch, k_length)}"
            )
    if attn_mask is not None:
        found += _wrong(attn_mask, "attn_mask", query)
        if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
            found.append(f"attn_mask is {attn_mask.dtype}; give bool (True = attend) or an additive float mask")
        found += _shape_mistakes(attn_mask, batch, heads, q_length, k_length)
    if found:
        raise ValueError(report("attention masks make no sense:", found))
    if attn_mask is None:
        return None, None if key_padding_mask is None else key_padding_mask.expand(batch, k_length)
    if attn_mask.dim() == 2:
        attn_mask = attn_mask[:, None, None, :]
    elif attn_mask.dim() == 3:
        attn_mask = attn_mask[:, None, :, :]
    if attn_mask.dtype == torch.bool and attn_mask.shape[1] == 1 and attn_mask.shape[2] == 1:
        # one bit for each key: the same thing as a key-padding mask, which more kernels take
        padding = attn_mask[:, 0, 0, :].expand(batch, k_length)
        if key_padding_mask is not None:
            padding = padding & key_padding_mask
        return None, padding
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        if attn_mask.dtype == torch.bool:
            attn_mask = attn_mask & padding
        else:
            attn_mask = attn_mask.masked_fill(~padding, -math.inf)
    return attn_mask, None


def _wrong(mask: Tensor, name: str, query: Tensor) -> list[str]:
    if mask.device != query.device:
        return [f"{name} is on {mask.device}, query on {query.device}; move it there"]
    return []


def _fits(shape: tuple[int, ...], full: tuple[int, ...], broadcast: tuple[bool, ...]) -> bool:
    for size, expected, may_be_one in zip(shape, full, broadcast, strict=True):
        if size != expected and not (may_be_one and size == 1):
            return False
    return True


def _shape_mistakes(mask: Tensor, batch: int, heads: int, q_length: int, k_length: int) -> list[str]:
    shape = tuple(mask.shape)
    if len(shape) == 4:
        if not _fits(shape, (batch, heads, q_length, k_length), (True, True, True, False)):
            return [
                f"attn_mask has shape {shape}, expected (B|1, H|1, Sq|1, Sk) = {(batch, heads, q_length, k_length)}"
            ]
        return []
    if len(shape) == 3:
        if not _fits(shape, (batch, q_length, k_length), (True, False, False)):
            return [f"attn_mask has shape {shape}, expected (B, Sq, Sk) = {(batch, q_length, k_length)}"]
        if batch == heads and batch != 1 and shape[0] != 1:
            return [
                f"attn_mask with shape {shape} could be (B, Sq, Sk) or (H, Sq, Sk), as B == H == {batch}; "
                "give 4-D: mask[:, None] for (B, 1, Sq, Sk) or mask[None] for (1, H, Sq, Sk)"
            ]
        return []
    if len(shape) == 2:
        if batch == q_length and batch != 1 and _fits(shape, (batch, k_length), (False, False)):
            return [
                f"attn_mask with shape {shape} could be (B, Sk) or (Sq, Sk), as B == Sq == {batch}; "
                "give 4-D: mask[:, None, None] or mask[None, None], or key_padding_mask=mask for (B, Sk)"
            ]
        if not _fits(shape, (batch, k_length), (True, False)):
            return [
                f"attn_mask has shape {shape}, expected (B, Sk) = {(batch, k_length)} for a 2-D mask; "
                "a mask over (Sq, Sk) is given as mask[None, None]"
            ]
        return []
    return [f"attn_mask has {len(shape)} dimensions; give (B|1, H|1, Sq|1, Sk), (B, Sq, Sk) or (B, Sk)"]


def positions(
    q_length: int, k_length: int, causal: int, window: tuple[int, int] | None, device: torch.device
) -> Tensor | None:
    """Bool (Sq, Sk), True = attend, of a causal and/or window mask; None if there is neither."""
    if not causal & CAUSAL and window is None:
        return None
    shift = k_length - q_length if causal & ALIGN_LOWER_RIGHT else 0
    rows = torch.arange(q_length, device=device)[:, None] + shift
    columns = torch.arange(k_length, device=device)[None, :]
    left, right = (-1, -1) if window is None else window
    if causal & CAUSAL:
        right = 0
    keep = None
    if right >= 0:
        keep = columns <= rows + right
    if left >= 0:
        bound = columns >= rows - left
        keep = bound if keep is None else keep & bound
    return keep


def combined(mask: Tensor | None, key_padding: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """One 4-D mask, bool or float, of a mask, a key-padding mask and a bool (Sq, Sk) mask; None if there is none."""
    parts = [] if key_padding is None else [key_padding[:, None, None, :]]
    if keep is not None:
        parts.append(keep[None, None])
    for part in parts:
        if mask is None:
            mask = part
        elif mask.dtype == torch.bool:
            mask = mask & part
        else:
            mask = mask.masked_fill(~part, -math.inf)
    return mask


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as an additive one of ``dtype``: a bool mask's False becomes -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    return mask.to(dtype)


def empty_rows(mask: Tensor) -> Tensor:
    """Bool (B|1, H|1, Sq|1, 1): rows of a 4-D mask with nothing to attend to."""
    if mask.dtype == torch.bool:
        return ~mask.any(-1, keepdim=True)
    return (mask == -math.inf).all(-1, keepdim=True)


def empty_causal_rows(mask: Tensor, q_length: int) -> Tensor:
    """:func:`empty_rows` of a (B|1, 1, 1, Sk) mask together with an upper-left causal one: (B|1, 1, Sq, 1)."""
    attended = mask if mask.dtype == torch.bool else mask != -math.inf
    seen = attended[:, :, 0, :].cumsum(-1) > 0
    last = torch.arange(q_length, device=mask.device).clamp(max=mask.shape[-1] - 1)
    return ~seen[:, :, last].unsqueeze(-1)


def packing(key_padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How the real keys of a batch are packed behind one another, for libraries that take cu_seqlens.

    ``key_padding`` (B, Sk) bool. Returns ``source`` and ``target``, flat int32 (B * Sk,), and int32 cu_seqlens
    (B + 1,): ``rows.index_select(0, source)`` packs the real ones of the B * Sk rows of K or V, and behind them comes
    the last of them again: kernels load tiles past the end of a sequence and multiply what is there by 0, which NaN and
    infinity of a masked row would survive. ``packed.index_select(0, target)`` brings gradients back, if the packed rows
    behind the last sequence hold 0. No host sync, static shapes. Positions change with it, so causal masks and windows
    do not survive. ``index_select`` on flat rows moves K or V at the speed of a copy; ``take_along_dim`` is 6-8 times
    slower (2x4608x24x128 bf16, CPU).
    """
    flat = key_padding.flatten()
    places = torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device)
    front = flat.cumsum(0, dtype=torch.int32) - 1
    target = torch.where(flat, front, max(flat.shape[0] - 1, 0))  # behind the real ones, if any is masked
    last = torch.where(flat, places, 0).amax() if flat.numel() else places.new_zeros(())
    # the rows of masked keys are written one behind the last, where nobody looks
    source = last.expand(flat.shape[0] + 1).clone().scatter_(0, torch.where(flat, front, flat.shape[0]).long(), places)
    cu_seqlens = torch.zeros(key_padding.shape[0] + 1, dtype=torch.int32, device=flat.device)
    torch.cumsum(key_padding.sum(1), 0, dtype=torch.int32, out=cu_seqlens[1:])
    return source[:-1], target, cu_seqlens


def dense_cu_seqlens(batch: int, length: int, device: torch.device) -> Tensor:
    """int32 (B + 1,): sequences of one length, as a dense (B, S, ...) tensor packs them."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * length


def segments(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 (T,): the sequence that each packed row belongs to; rows behind the last one get the number B."""
    rows = torch.arange(total, device=cu_seqlens.device)
    return torch.bucketize(rows, cu_seqlens[1:].to(torch.int64), right=True)


def behind(packed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Bool (T,): rows of ``packed`` (T, ...) behind the last sequence, which most kernels never write."""
    return torch.arange(packed.shape[0], device=packed.device) >= cu_seqlens[-1]


def clear_behind(packed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``packed`` (T, H, D) with 0 in the rows behind the last sequence, in place."""
    return packed.masked_fill_(behind(packed, cu_seqlens)[:, None, None], 0.0)


def lonely(packed: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Bool (T,): rows of ``packed`` behind the last sequence, or in one that has nothing on the other side.

    ``own`` are the cu_seqlens of these rows, ``other`` those of the other side.
    """
    sequence, count = segments(own, packed.shape[0]), own.shape[0] - 1
    return (sequence == count) | (other.diff() == 0)[sequence.clamp(max=count - 1)]


def varlen_mask(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_total: int,
    k_total: int,
    causal: int,
    window: tuple[int, int] | None,
) -> Tensor:
    """Bool (Tq, Tk), True = attend, of packed sequences; rows behind the last sequence attend to nothing."""
    sequence_q, sequence_k = segments(cu_seqlens_q, q_total), segments(cu_seqlens_k, k_total)
    last = cu_seqlens_q.shape[0] - 1
    keep = (sequence_q[:, None] == sequence_k[None, :]) & (sequence_q[:, None] < last)
    if not causal & CAUSAL and window is None:
        return keep
    starts_q, starts_k = cu_seqlens_q.to(torch.int64), cu_seqlens_k.to(torch.int64)
    of_q = sequence_q.clamp(max=last - 1)
    of_k = sequence_k.clamp(max=last - 1)
    rows = torch.arange(q_total, device=keep.device) - starts_q[of_q]
    columns = torch.arange(k_total, device=keep.device) - starts_k[of_k]
    if causal & ALIGN_LOWER_RIGHT:
        rows = rows + (starts_k.diff() - starts_q.diff())[of_q]
    left, right = (-1, -1) if window is None else window
    if causal & CAUSAL:
        right = 0
    if right >= 0:
        keep = keep & (columns[None, :] <= rows[:, None] + right)
    if left >= 0:
        keep = keep & (columns[None, :] >= rows[:, None] - left)
    return keep


def require_lengths(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None, max_seqlen_k: int | None
) -> None:
    """Raise ValueError, with all reasons, for cu_seqlens of a wrong dtype, shape or device, or a negative maximum."""
    found = []
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if lengths.dtype != torch.int32:
            found.append(f"{name} is {lengths.dtype}; give int32")
        if lengths.dim() != 1 or lengths.shape[0] < 2:
            found.append(f"{name} has shape {tuple(lengths.shape)}, expected (B + 1,) with B >= 1")
        if lengths.device != query.device:
            found.append(f"{name} is on {lengths.device}, query on {query.device}; move it there")
    if not found and cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        found.append(
            f"cu_seqlens_q is for {cu_seqlens_q.shape[0] - 1} sequences, cu_seqlens_k for {cu_seqlens_k.shape[0] - 1}"
        )
    for name, most in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if most is not None and most < 0:
            found.append(f"{name}={most} is negative")
    if found:
        raise ValueError(report("packed sequences make no sense:", found))
