"""The kernels of PyTorch that take packed (T, H, D) sequences, forward and backward: functions only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import lse_dtype
from compiled_attn.spec import CAUSAL

from ._native_dense import (
    Backward,
    Forward,
    aligned,
    aten,
    empty_to,
    fit,
    flash_backward,
    flash_forward,
    flash_windows,
    math_backward,
    math_forward,
    resolved_scale,
)


def math_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    """One block-diagonal (Tq, Tk) mask: no host sync, but memory for Tq * Tk scores of each head."""
    keep = masks.varlen_mask(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal, window)[None, None]
    out, lse, _ = math_forward(q[None], k[None], v[None], keep, None, dropout_p, 0, scale, return_lse=return_lse)
    return out[0], None if lse is None else lse[0], None


def math_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    keep = masks.varlen_mask(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal, window)[None, None]
    dq, dk, dv, _ = math_backward(
        grad_out[None], q[None], k[None], v[None], keep, None, out[None], lse[None], state, dropout_p, 0, scale, gqa,
        None, deterministic, False,
    )  # fmt: skip
    return dq[0], dk[0], dv[0], None


def _pieces(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """Rows of each sequence that has queries and keys. Reads the lengths: for the CPU only."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    pairs = zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
    return [(slice(q0, q1), slice(k0, k1)) for q0, q1, k0, k1 in pairs if q1 > q0 and k1 > k0]


def _past_window(max_seqlen_q: int, max_seqlen_k: int, window: Any) -> int:
    """A bound of the key lengths that is over the window's right part, and over the query lengths.

    FlashAttention-2 takes a right part >= max_seqlen_k for an open one, and an open one beside a limited left part for
    max_seqlen_k keys. Both are wrong for a sequence with more queries than keys, as it aligns at the lower right. A
    bound too large costs nothing.
    """
    return max_seqlen_k if window is None else max(max_seqlen_k, max_seqlen_q, window[1] + 1)


def flash_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    """The flash kernel: over the packed batch on CUDA, sequence by sequence on a CPU."""
    if q.numel() == 0 or k.numel() == 0:
        return math_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, scale, return_lse=return_lse
        )
    if q.device.type == "cuda":
        max_seqlen_k = _past_window(max_seqlen_q, max_seqlen_k, window)
        out, lse, _, _, _ = aten._flash_attention_forward(
            aligned(q), aligned(k), aligned(v), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            bool(causal & CAUSAL), False, scale=resolved_scale(q, scale), **flash_windows(window, causal),
        )  # fmt: skip
        out = fit(masks.clear_behind(out, cu_seqlens_q), v.shape[-1])
        if not return_lse:
            return out, None, None
        return out, empty_to(lse, math.inf, -math.inf).masked_fill_(masks.behind(out, cu_seqlens_q), -math.inf), None
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=lse_dtype(q.dtype))
    for rows, keys in _pieces(cu_seqlens_q, cu_seqlens_k):
        one, one_lse, _ = flash_forward(
            q[None, rows], k[None, keys], v[None, keys], None, None, 0.0, causal, scale, gqa, window, deterministic,
            True,
        )  # fmt: skip
        assert one_lse is not None
        out[rows], lse[:, rows] = one[0], one_lse[0]
    return out, lse if return_lse else None, None


def flash_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    if q.device.type == "cuda" and q.numel() and k.numel():
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        max_seqlen_k = _past_window(max_seqlen_q, max_seqlen_k, window)
        gradients = aten._flash_attention_backward(
            *(aligned(tensor) for tensor in (grad_out, q, k, v, out)), empty_to(lse, -math.inf, math.inf),
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, bool(causal & CAUSAL), unused, unused,
            scale=resolved_scale(q, scale), **flash_windows(window, causal),
        )  # fmt: skip
        lengths = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k)
        dq, dk, dv = (
            fit(masks.clear_behind(gradient, ends), q.shape[-1])
            for gradient, ends in zip(gradients, lengths, strict=True)
        )
        return dq, dk, dv, None
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _pieces(cu_seqlens_q, cu_seqlens_k):
        one_q, one_k, one_v, _ = flash_backward(
            grad_out[None, rows], q[None, rows], k[None, keys], v[None, keys], None, None, out[None, rows],
            lse[None, :, rows], state, 0.0, causal, scale, gqa, window, deterministic, False,
        )  # fmt: skip
        dq[rows], dk[keys], dv[keys] = one_q[0], one_k[0], one_v[0]
    return dq, dk, dv, None
