"""Attention in plain float64: what "right" means here, and how far off a kernel may be.

Slow, O(Sq * Sk) memory, never dispatched to.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import masks
from .spec import ALIGN_LOWER_RIGHT, CAUSAL, LOWER_RIGHT


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T + mask) V in float64 (Vaswani et al. 2017, eq. 1).

    ``query`` (B, Sq, H, D), ``key`` (B, Sk, Hk, D), ``value`` (B, Sk, Hk, Dv), H a multiple of Hk. Returns ``out``
    (B, Sq, H, Dv) and ``lse`` (B, H, Sq), natural log, both float64; a row with nothing to attend to gives 0 and -inf.
    """
    mask, key_padding = masks.canonical(attn_mask, key_padding_mask, query, key)
    causal = _causal(is_causal, causal_alignment)
    keep = masks.positions(query.shape[1], key.shape[1], causal, window_size, query.device)
    mask = masks.combined(mask, key_padding, keep)
    group = query.shape[2] // key.shape[2]
    q = query.double().transpose(1, 2)
    k = key.double().transpose(1, 2).repeat_interleave(group, 1)
    v = value.double().transpose(1, 2).repeat_interleave(group, 1)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + masks.additive(mask, torch.float64)
    lse = torch.logsumexp(scores.detach(), -1)
    empty = (lse == -math.inf).unsqueeze(-1)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return (weights @ v).transpose(1, 2), lse


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` on packed (T, H, D) sequences, one by one. Returns (Tq, H, Dv) and lse (H, Tq), float64."""
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        out, lse = attention(
            query[None, q0:q1],
            key[None, k0:k1],
            value[None, k0:k1],
            is_causal=is_causal,
            causal_alignment=causal_alignment,
            scale=scale,
            window_size=window_size,
        )
        outs.append(out[0])
        lses.append(lse[0])
    rest = query.shape[0] - starts_q[-1]  # rows behind the last sequence belong to none
    heads, width = query.shape[1], value.shape[2]
    outs.append(query.new_zeros(rest, heads, width, dtype=torch.float64))
    lses.append(query.new_full((heads, rest), -math.inf, dtype=torch.float64))
    return torch.cat(outs), torch.cat(lses, -1)


def plain(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention as plain PyTorch writes it, every step in the dtype of the inputs: the yardstick of :func:`judge`.

    (B, S, H, D) or (T, H, D), as many heads of keys as of queries. Returns out, of that shape, and lse (B, H, Sq) or
    (H, T), in the dtype of the inputs.
    """
    q, k, v = (tensor.transpose(-3, -2) for tensor in (query, key, value))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v).transpose(-3, -2), scores.logsumexp(-1)


class Verdict(NamedTuple):
    """Largest differences from float64 of a kernel and of the yardstick, and what is wrong ("" if nothing)."""

    error: float
    plain: float
    wrong: str


def judge(actual: Tensor, yardstick: Tensor, right: Tensor, rounding: float = 0.0) -> Verdict:
    """Whether ``actual`` is right: its error is at most twice that of ``yardstick``, plus rounding of its dtype.

    ``yardstick`` is what plain PyTorch gives in the dtype of ``actual``, ``right`` the float64 result. ``rounding``
    (``Limits.rounding``) allows a quantised kernel that share of the root mean square of ``right``.

    >>> import torch
    >>> from compiled_attn import reference
    >>> right = torch.ones(3, dtype=torch.float64)
    >>> reference.judge(right.float() * 1.1, right.float(), right).wrong
    'off by 1.00e-01 from float64, allowed 9.54e-07'
    >>> reference.judge(right.float() * 1.1, right.float(), right, rounding=0.2).wrong
    ''
    """
    if actual.shape != right.shape:
        return Verdict(math.inf, 0.0, f"of shape {tuple(actual.shape)}, not {tuple(right.shape)}")
    # not every device has float64
    actual, yardstick, right = (tensor.detach().cpu() for tensor in (actual, yardstick, right))
    error, plainly = (float((tensor.double() - right).abs().max()) for tensor in (actual, yardstick))
    allowed = 2.0 * plainly + 4 * torch.finfo(actual.dtype).eps * (1.0 + float(right.abs().max()))
    if error <= allowed:
        return Verdict(error, plainly, "")
    found, most, of = error, allowed, ""
    if rounding:
        found, most = (float(tensor.pow(2).mean().sqrt()) for tensor in (actual.double() - right, right))
        most, of = rounding * most, " in root mean square"
    return Verdict(error, plainly, "" if found <= most else f"off by {found:.2e} from float64, allowed {most:.2e}{of}")


def _causal(is_causal: bool, alignment: str) -> int:
    return (CAUSAL if is_causal else 0) | (ALIGN_LOWER_RIGHT if alignment == LOWER_RIGHT else 0)
