"""PyTorch's own kernels: `native` (scaled_dot_product_attention's choice) and its four kernels, pinned.

All are composite operators over the fused aten operator itself. Never an ``sdpa_kernel`` context: torch.export
forgets it. What the composite of PyTorch does around its kernels is done here: bool masks become additive ones (aten's
math *adds* a bool mask as 0/1, the CPU kernel refuses it), head dims are padded where the kernel wants it, rows with
nothing to attend to give 0 and lse -inf.

B, S, H, D as in compiled_attn/spec.py. Kernels want (B, H, S, D): a transposed view, no copy. Their outputs are stored
as (B, S, H, D) when the inputs are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, LOW_PRECISION, LOWER_RIGHT, UPPER_LEFT, Limits

aten = torch.ops.aten
ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALL_MASKS = ("none", "key_padding", "bool", "float")

# SDPBackend, as torch._fused_sdp_choice returns it
_CHOICES = {0: "_native_math", 1: "_native_flash", 2: "_native_efficient", 3: "_native_cudnn"}

Forward = tuple[Tensor, Tensor | None, None]
Backward = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def _grouped(q: Tensor, k: Tensor) -> bool:
    # a plain bool: enable_gqa refuses the SymBool of a comparison of shapes
    return True if q.shape[2] != k.shape[2] else False


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """Nothing to compute: the fused CPU kernel divides by zero (SIGFPE) on Sq == 0 or Sk == 0."""
    return q.shape[0] == 0 or q.shape[1] == 0 or k.shape[1] == 0


# --------------------------------------------------------------------------------------------------- _native_math


def _math_mask(q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any) -> Tensor | None:
    return masks.combined(mask, key_padding, masks.positions(q.shape[1], k.shape[1], causal, window, q.device))


def _math_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, Hk, G, Sq, Sk) masked scores; key and value heads are broadcast over their group, not copied."""
    heads, key_heads = q.shape[2], k.shape[2]
    grouped = q.transpose(1, 2).unflatten(1, (key_heads, heads // key_heads))
    scores = (grouped @ k.transpose(1, 2).unsqueeze(2).transpose(-1, -2)) * scale
    if mask is None:
        return scores
    if mask.shape[1] == 1:
        mask = mask.unsqueeze(2)
    else:
        mask = mask.unflatten(1, (key_heads, heads // key_heads))
    return scores + masks.additive(mask, scores.dtype)


def _upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.float() if tensor.dtype in LOW_PRECISION else tensor for tensor in tensors)


def _math_weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    # exp(s - lse), not softmax: Inductor rewrites bmm-softmax-bmm into the fused flash kernel, and the pin would be
    # lost without a word. lse is a constant to autograd (its gradient is NaN for an empty row), so the sum, which is
    # 1 up to rounding, or 0 for an empty row, carries the gradient of the normalisation.
    lse = torch.logsumexp(scores.detach(), -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0.0, 1.0), lse


def math_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    full = _math_mask(q, k, mask, key_padding, causal, window)
    high_q, high_k, high_v = _upcast(q, k, v)
    weights, lse = _math_weights(_math_scores(high_q, high_k, full, _scale(q, scale)))
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    out = (weights @ high_v.transpose(1, 2).unsqueeze(2)).flatten(1, 2)
    return out.transpose(1, 2).to(q.dtype), lse.flatten(1, 2) if return_lse else None, None


def math_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    """dV = P^T dO, dS = P * (dO V^T - rowsum(dO * O)), dQ = dS K, dK = dS^T Q (Dao et al. 2022, appendix B.2)."""
    full = _math_mask(q, k, mask, key_padding, causal, window)
    high_q, high_k, high_v, high_out, high_grad = _upcast(q, k, v, out, grad_out)
    group = (k.shape[2], q.shape[2] // k.shape[2])
    weights, _ = _math_weights(_math_scores(high_q, high_k, full, _scale(q, scale)))
    upstream = high_grad.transpose(1, 2).unflatten(1, group)
    delta = (upstream * high_out.transpose(1, 2).unflatten(1, group)).sum(-1, keepdim=True)
    dv = (weights.transpose(-1, -2) @ upstream).sum(2)
    dscores = weights * (upstream @ high_v.transpose(1, 2).unsqueeze(2).transpose(-1, -2) - delta)
    dq = (dscores @ high_k.transpose(1, 2).unsqueeze(2)).flatten(1, 2) * _scale(q, scale)
    dk = (dscores.transpose(-1, -2) @ high_q.transpose(1, 2).unflatten(1, group)).sum(2) * _scale(q, scale)
    dmask = dscores.flatten(1, 2).sum_to_size(mask.shape).to(mask.dtype) if mask_gradient else None
    back = [gradient.transpose(1, 2).to(q.dtype) for gradient in (dq, dk, dv)]
    return back[0], back[1], back[2], dmask


# ----------------------------------------------------------------------------------------- masks for fused kernels


def _bias(q: Tensor, mask: Any, key_padding: Any) -> tuple[Tensor | None, Tensor | None]:
    """Additive mask in q's dtype, broadcast strides kept, and the bool (B|1, H|1, Sq|1, 1) empty rows."""
    full = masks.combined(mask, key_padding, None)
    if full is None:
        return None, None
    return masks.additive(full, q.dtype), masks.empty_rows(full)


def _expanded(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(B, H, Sq, Sk) view of a bias whose rows start at multiples of 16 elements, as the CUDA kernels want them."""
    length = k.shape[1]
    padding = -length % 16
    if padding:
        bias = F.pad(bias, (0, padding))[..., :length]
    return bias.expand(q.shape[0], q.shape[2], q.shape[1], length)


def _padded(multiple: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, S, D) views of (B, S, H, D) tensors, D filled up with zeros to a multiple; QK^T and PV do not change."""
    padding = -tensors[0].shape[-1] % multiple
    if padding:
        tensors = tuple(F.pad(tensor, (0, padding)) for tensor in tensors)
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _unpadded(out: Tensor, width: int) -> Tensor:
    return (out if out.shape[-1] == width else out[..., :width]).transpose(1, 2)


def _fill_empty(out: Tensor, lse: Tensor | None, empty: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows (B, H, S, .) with nothing to attend to: 0 and -inf."""
    if empty is None:
        return out, lse
    out = out.masked_fill(empty, 0.0)
    return out, None if lse is None else lse.masked_fill(empty.squeeze(-1), -math.inf)


def _finite(lse: Tensor) -> Tensor:
    """lse for a backward kernel: exp(-inf - -inf) would spread NaN into every gradient."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def _repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V copied for each query head, for a kernel without grouped heads."""
    if not _grouped(q, k):
        return k, v
    group = q.shape[2] // k.shape[2]
    return k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


def _sum_heads(gradient: Tensor, heads: int) -> Tensor:
    """Gradient of :func:`_repeat_heads` for (B, S, H, D)."""
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, gradient.shape[2] // heads)).sum(3)


# -------------------------------------------------------------------------------------------------- _native_flash


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if _is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, deterministic, return_lse)
    if q.device.type != "cuda":
        bias, is_causal = _cpu_bias(q, k, mask, key_padding, causal, window)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, is_causal, attn_mask=bias, scale=scale
        )
        if return_lse and bias is not None:  # the kernel gives 0 for an empty row's out and lse
            empty = masks.empty_causal_rows(bias, q.shape[1]) if is_causal else masks.empty_rows(bias)
            lse = lse.masked_fill(empty.squeeze(-1), -math.inf)
        return out.transpose(1, 2), lse if return_lse else None, None
    scale = _scale(q, scale)
    width = v.shape[-1]
    if window is None and not causal & ALIGN_LOWER_RIGHT:
        results = aten._scaled_dot_product_flash_attention(
            *_padded(8, q, k, v), dropout_p, bool(causal & CAUSAL), False, scale=scale
        )
        return _unpadded(results[0], width), results[1] if return_lse else None, None
    bhsd = _padded(8, q, k, v)
    out, lse, _, _, _ = aten._flash_attention_forward(
        *(tensor.transpose(1, 2) for tensor in bhsd), None, None, q.shape[1], k.shape[1], dropout_p,
        bool(causal & CAUSAL), False, scale=scale, **_window_sizes(window, causal),
    )  # fmt: skip
    return _unpadded(out.transpose(1, 2), width), lse if return_lse else None, None


def _cpu_bias(
    q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any
) -> tuple[Tensor | None, bool]:
    """The CPU kernel takes a bias together with upper-left causal; what else concerns positions goes into the bias."""
    keep = None
    if window is not None or causal & ALIGN_LOWER_RIGHT:
        keep, causal = masks.positions(q.shape[1], k.shape[1], causal, window, q.device), 0
    full = masks.combined(mask, key_padding, keep)
    return None if full is None else masks.additive(full, q.dtype), bool(causal & CAUSAL)


def _window_sizes(window: Any, causal: int) -> dict[str, int | None]:
    if window is None:
        return {}
    left, right = window
    if causal & CAUSAL:
        right = 0
    return {"window_size_left": left, "window_size_right": right}


def flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if _is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
    if q.device.type != "cuda":
        bias, is_causal = _cpu_bias(q, k, mask, key_padding, causal, window)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(tensor.transpose(1, 2) for tensor in (grad_out, q, k, v, out)), _finite(lse), 0.0, is_causal,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
        return dq, dk, dv, None
    widths = (q.shape[-1], k.shape[-1], v.shape[-1])
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # no dropout here: nobody reads the rng state
    bshd = [tensor.transpose(1, 2) for tensor in _padded(8, grad_out, q, k, v, out)]
    gradients = aten._flash_attention_backward(
        *bshd, lse, None, None, q.shape[1], k.shape[1], 0.0, bool(causal & CAUSAL), unused, unused,
        scale=_scale(q, scale), **_window_sizes(window, causal),
    )  # fmt: skip
    dq, dk, dv = (gradient[..., :width] for gradient, width in zip(gradients, widths, strict=True))
    return dq, dk, dv, None


# --------------------------------------------------------------------------- _native_efficient and _native_cudnn


def _biased_forward(
    operator: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, dropout_p: float, causal: int,
    scale: float | None, return_lse: bool,
) -> Forward:  # fmt: skip
    """A kernel of (q, k, v, bias, compute_lse, dropout_p, is_causal); bias and causal compose."""
    bias, empty = _bias(q, mask, key_padding)
    if bias is not None:
        bias = _expanded(bias.masked_fill(empty, 0.0), q, k)
    # the kernel's own backward needs lse
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v) if t is not None)
    save = save or (bias is not None and torch.is_grad_enabled() and bias.requires_grad)
    results = operator(
        *_padded(8, q, k, v), bias, return_lse or save, dropout_p, bool(causal & CAUSAL), scale=_scale(q, scale)
    )
    # efficient pads lse (B, H, S) to a multiple of 32, cuDNN returns (B, H, S, 1); sliced only when asked for,
    # as export with a dynamic length cannot prove S <= 32 * ceil(S / 32)
    lse = results[1].flatten(2)[..., : q.shape[1]] if return_lse else None
    out, lse = _fill_empty(results[0], lse, empty)
    return _unpadded(out, v.shape[-1]), lse, None


def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if _is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, deterministic, return_lse)
    k, v = _repeat_heads(q, k, v)
    operator = aten._scaled_dot_product_efficient_attention
    return _biased_forward(operator, q, k, v, mask, key_padding, dropout_p, causal, scale, return_lse)


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if _is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, deterministic, return_lse)
    operator = aten._scaled_dot_product_cudnn_attention
    return _biased_forward(operator, q, k, v, mask, key_padding, dropout_p, causal, scale, return_lse)


def _biased_inputs(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor]:
    """What the backward kernels read: an empty row has no gradient, and attended to everything in the forward."""
    bias, empty = _bias(q, mask, key_padding)
    if bias is not None:
        assert empty is not None
        grad_out = grad_out.masked_fill(empty.transpose(1, 2), 0.0)
        bias = _expanded(bias.masked_fill(empty, 0.0), q, k)
    return _padded(8, grad_out, q, k, v, out), bias, _finite(lse)


def efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if _is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
    key_heads = k.shape[2]
    widths = (q.shape[-1], k.shape[-1], v.shape[-1])
    full_k, full_v = _repeat_heads(q, k, v)
    (grad, *inputs), bias, lse = _biased_inputs(grad_out, q, full_k, full_v, mask, key_padding, out, lse)
    lse = F.pad(lse, (0, -lse.shape[-1] % 32))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    *gradients, dbias = aten._scaled_dot_product_efficient_attention_backward(
        grad, *inputs[:3], bias, inputs[3], lse, unused, unused, 0.0, [True, True, True, mask_gradient],
        bool(causal & CAUSAL), scale=_scale(q, scale),
    )  # fmt: skip
    dq, dk, dv = (_unpadded(gradient, width) for gradient, width in zip(gradients, widths, strict=True))
    dmask = dbias.sum_to_size(mask.shape).to(mask.dtype) if mask_gradient else None
    return dq, _sum_heads(dk, key_heads), _sum_heads(dv, key_heads), dmask


def cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if _is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
    widths = (q.shape[-1], k.shape[-1], v.shape[-1])
    (grad, *inputs), bias, lse = _biased_inputs(grad_out, q, k, v, mask, key_padding, out, lse)
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        grad, *inputs, lse.unsqueeze(-1), unused, unused, bias, None, None, q.shape[1], k.shape[1], 0.0,
        bool(causal & CAUSAL), scale=_scale(q, scale),
    )  # fmt: skip
    dq, dk, dv = (_unpadded(gradient, width) for gradient, width in zip(gradients, widths, strict=True))
    return dq, dk, dv, None


# --------------------------------------------------------------------------------------------------------- native


def native_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    """scaled_dot_product_attention: PyTorch chooses, in compiled code on the machine that lowers the graph."""
    if return_lse:
        forward = KERNELS[native_choice(q, k, v, mask, key_padding, causal, scale, window)].forward
        return forward(q, k, v, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse)  # type: ignore[return-value]
    if mask is None and key_padding is None and window is None and causal <= CAUSAL and not _is_empty(q, k):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, dropout_p, causal == CAUSAL, scale=scale,
            enable_gqa=_grouped(q, k),
        )  # fmt: skip
        return out.transpose(1, 2), None, None
    return _native_masked(q, k, v, mask, key_padding, dropout_p, causal, scale, window)


def _native_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, dropout_p: float, causal: int, scale: float | None,
    window: Any,
) -> Forward:  # fmt: skip
    if _is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, False, window)
    keep = masks.positions(q.shape[1], k.shape[1], causal, window, q.device)
    full = masks.combined(mask, key_padding, keep)
    assert full is not None
    bias, empty = masks.additive(full, q.dtype), None
    if q.device.type != "cpu":  # the CPU's kernels give 0 for empty rows, and right gradients
        empty = masks.empty_rows(full)
        bias = bias.masked_fill(empty, 0.0)
        # With a mask and grouped heads PyTorch has only its math kernel left, with S x S scores for each head
        # (9 GiB at 16k tokens); copies of K and V keep the fused ones.
        k, v = _repeat_heads(q, k, v)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, dropout_p, scale=scale,
        enable_gqa=_grouped(q, k),
    )  # fmt: skip
    return _fill_empty(out, None, empty)[0].transpose(1, 2), None, None


def native_choice(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, causal: int, scale: float | None, window: Any
) -> str:
    """The pinned backend that PyTorch's choice for this call amounts to, for calls that need lse."""
    if _is_empty(q, k) or window is not None or causal & ALIGN_LOWER_RIGHT or q.device.type == "meta":
        return "_native_math"
    bias = _bias(q, mask, key_padding)[0]
    if bias is not None:
        k, v = _repeat_heads(q, k, v)
    number = torch._fused_sdp_choice(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, 0.0,
        bias is None and bool(causal & CAUSAL), scale=scale, enable_gqa=_grouped(q, k),
    )  # fmt: skip
    return _CHOICES.get(int(number), "_native_math")


# --------------------------------------------------------------------------------------------------------- varlen


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


def flash_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    """The flash kernel: over the packed batch on CUDA, sequence by sequence on a CPU."""
    if q.device.type == "cuda":
        width = v.shape[-1]
        q, k, v, scale = *_packed_padded(q, k, v), _scale(q, scale)
        out, lse, _, _, _ = aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, bool(causal & CAUSAL), False,
            scale=scale, **_window_sizes(window, causal),
        )  # fmt: skip
        return out[..., :width], lse if return_lse else None, None
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float64 if q.dtype == torch.float64 else None)
    lse = lse if q.dtype == torch.float64 else lse.float()
    for rows, keys in _pieces(cu_seqlens_q, cu_seqlens_k):
        one, one_lse, _ = flash_forward(
            q[None, rows],
            k[None, keys],
            v[None, keys],
            None,
            None,
            0.0,
            causal,
            scale,
            gqa,
            window,
            deterministic,
            True,
        )
        assert one_lse is not None
        out[rows], lse[:, rows] = one[0], one_lse[0]
    return out, lse if return_lse else None, None


def _packed_padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    padding = -tensors[0].shape[-1] % 8
    return tuple(F.pad(tensor, (0, padding)) for tensor in tensors) if padding else tensors


def flash_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    if q.device.type == "cuda":
        widths = (q.shape[-1], k.shape[-1], v.shape[-1])
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        gradients = aten._flash_attention_backward(
            *_packed_padded(grad_out, q, k, v, out), lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
            bool(causal & CAUSAL), unused, unused, scale=_scale(q, scale), **_window_sizes(window, causal),
        )  # fmt: skip
        dq, dk, dv = (gradient[..., :width] for gradient, width in zip(gradients, widths, strict=True))
        return dq, dk, dv, None
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _pieces(cu_seqlens_q, cu_seqlens_k):
        one_q, one_k, one_v, _ = flash_backward(
            grad_out[None, rows], q[None, rows], k[None, keys], v[None, keys], None, None, out[None, rows],
            lse[None, :, rows], state, 0.0, causal, scale, gqa, window, deterministic, False,
        )  # fmt: skip
        dq[rows], dk[keys], dv[keys] = one_q[0], one_k[0], one_v[0]
    return dq, dk, dv, None


def _varlen_choice(q: Tensor) -> str:
    """`native` on packed sequences: flash where it takes the dtype, else math."""
    if q.device.type == "cpu":
        return "_native_flash"
    flash = q.device.type == "cuda" and q.dtype in LOW_PRECISION and q.shape[-1] <= 256
    return "_native_flash" if flash and torch.cuda.get_device_capability(q.device) >= (8, 0) else "_native_math"


def native_varlen_forward(q: Tensor, *args: Any) -> Any:
    return VARLEN_KERNELS[_varlen_choice(q)].forward(q, *args)


def native_varlen_backward(grad_out: Tensor, q: Tensor, *args: Any) -> Any:
    backward = VARLEN_KERNELS[_varlen_choice(q)].backward
    assert backward is not None
    return backward(grad_out, q, *args)


# --------------------------------------------------------------------------------------------------- registration

KERNELS = {
    "_native_math": Kernels(math_forward, math_backward, composite=True, random=True),
    "_native_flash": Kernels(flash_forward, flash_backward, composite=True, random=True),
    "_native_efficient": Kernels(efficient_forward, efficient_backward, composite=True, random=True),
    "_native_cudnn": Kernels(cudnn_forward, cudnn_backward, composite=True, random=True),
}
VARLEN_KERNELS = {
    "_native_math": Kernels(math_varlen_forward, math_varlen_backward, composite=True, random=True),
    "_native_flash": Kernels(flash_varlen_forward, flash_varlen_backward),
}

_EVERYWHERE = ("cpu", "cuda", "xpu", "mps", "meta")

register_backend(
    Backend(
        "native",
        "scaled_dot_product_attention, PyTorch's own choice of kernel",
        family="PyTorch",
        limits=(
            Limits(
                _EVERYWHERE, ANY_DTYPE, value_head_dim=True, masks=ALL_MASKS, mask_gradient=True, window=True,
                dropout=True, deterministic="global",
            ),
        ),
        dense=Kernels(native_forward, composite=True, random=True),
        varlen_limits=(Limits(_EVERYWHERE, ANY_DTYPE, window=True, deterministic="global"),),
        varlen=Kernels(native_varlen_forward, native_varlen_backward),
        delegate=native_choice,
    )
)  # fmt: skip
register_backend(
    Backend(
        "_native_math",
        "plain matrix products and softmax, in float32 or better; O(Sq * Sk) memory",
        family="PyTorch",
        limits=(
            Limits(
                _EVERYWHERE, ANY_DTYPE, value_head_dim=True, masks=ALL_MASKS, mask_gradient=True, window=True,
                dropout=True,
            ),
        ),
        dense=KERNELS["_native_math"],
        varlen_limits=(Limits(_EVERYWHERE, ANY_DTYPE, value_head_dim=True, window=True, dropout=True),),
        varlen=VARLEN_KERNELS["_native_math"],
    )
)  # fmt: skip
register_backend(
    Backend(
        "_native_flash",
        "PyTorch's flash-attention kernel (CUDA: FlashAttention-2; CPU: its own)",
        family="PyTorch",
        limits=(
            Limits(
                ("cuda",), (torch.bfloat16, torch.float16), min_capability=(8, 0), max_head_dim=256,
                alignments=(LOWER_RIGHT,), window=True, dropout=True, deterministic="global",
            ),
            Limits(("cpu",), ANY_DTYPE, masks=ALL_MASKS, window=True),
        ),
        dense=KERNELS["_native_flash"],
        varlen_limits=(
            Limits(
                ("cuda",), (torch.bfloat16, torch.float16), min_capability=(8, 0), max_head_dim=256,
                alignments=(LOWER_RIGHT,), window=True, deterministic="global",
            ),
            Limits(("cpu",), ANY_DTYPE, window=True),
        ),
        varlen=VARLEN_KERNELS["_native_flash"],
    )
)  # fmt: skip
register_backend(
    Backend(
        "_native_efficient",
        "PyTorch's memory-efficient kernel (CUTLASS)",
        family="PyTorch",
        limits=(
            Limits(
                ("cuda",), (torch.bfloat16, torch.float16, torch.float32), min_capability=(5, 0), masks=ALL_MASKS,
                mask_gradient=True, alignments=(UPPER_LEFT,), value_head_dim=True, dropout=True,
                deterministic="never",
            ),
        ),
        dense=KERNELS["_native_efficient"],
    )
)  # fmt: skip
register_backend(
    Backend(
        "_native_cudnn",
        "cuDNN's fused attention",
        family="PyTorch",
        limits=(
            Limits(
                ("cuda",), (torch.bfloat16, torch.float16), min_capability=(8, 0), max_head_dim=128, masks=ALL_MASKS,
                alignments=(UPPER_LEFT,), dropout=True, deterministic="never",
            ),
        ),
        dense=KERNELS["_native_cudnn"],
    )
)  # fmt: skip
