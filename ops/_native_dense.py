"""The four kernels of scaled_dot_product_attention on (B, S, H, D), forward and backward: functions only.

What PyTorch's composite does around its kernels is done here: bool masks become additive ones (aten's math *adds* a
bool mask as 0/1, the CPU kernel refuses it), head dims are padded where the kernel wants it, rows with nothing to
attend to give 0 and lse -inf. B, S, H, D as in compiled_attn/spec.py. The kernels want (B, H, S, D): a transposed view.

Forward functions are differentiable through aten's own formulas; the backward functions serve ``switch``, and take no
dropout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn import masks
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, LOW_PRECISION

aten = torch.ops.aten
Forward = tuple[Tensor, Tensor | None, None]
Backward = tuple[Tensor, Tensor, Tensor, Tensor | None]


def resolved_scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def grouped(q: Tensor, k: Tensor) -> bool:
    # a plain bool: enable_gqa refuses the SymBool of a comparison of shapes
    return True if q.size(2) != k.size(2) else False


def is_empty(q: Tensor, k: Tensor) -> bool:
    """Nothing to compute: the fused CPU kernel divides by zero (SIGFPE) on Sq == 0 or Sk == 0."""
    return q.numel() == 0 or k.numel() == 0


# --------------------------------------------------------------------------------------------------- _native_math


def _math_mask(q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any) -> Tensor | None:
    return masks.combined(mask, key_padding, masks.positions(q.shape[1], k.shape[1], causal, window, q.device))


def _math_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(B, Hk, G, Sq, Sk) masked scores; key and value heads are broadcast over their group, not copied."""
    heads, key_heads = q.shape[2], k.shape[2]
    group = heads // max(key_heads, 1)
    by_group = q.transpose(1, 2).unflatten(1, (key_heads, group))
    scores = (by_group @ k.transpose(1, 2).unsqueeze(2).transpose(-1, -2)) * scale
    if mask is None:
        return scores
    if mask.shape[1] == 1:
        mask = mask.unsqueeze(2)
    else:
        mask = mask.unflatten(1, (key_heads, group))
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
    weights, lse = _math_weights(_math_scores(high_q, high_k, full, resolved_scale(q, scale)))
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
    group = (k.shape[2], q.shape[2] // max(k.shape[2], 1))
    weights, _ = _math_weights(_math_scores(high_q, high_k, full, resolved_scale(q, scale)))
    upstream = high_grad.transpose(1, 2).unflatten(1, group)
    delta = (upstream * high_out.transpose(1, 2).unflatten(1, group)).sum(-1, keepdim=True)
    dv = (weights.transpose(-1, -2) @ upstream).sum(2)
    dscores = weights * (upstream @ high_v.transpose(1, 2).unsqueeze(2).transpose(-1, -2) - delta)
    dq = (dscores @ high_k.transpose(1, 2).unsqueeze(2)).flatten(1, 2) * resolved_scale(q, scale)
    dk = (dscores.transpose(-1, -2) @ high_q.transpose(1, 2).unflatten(1, group)).sum(2) * resolved_scale(q, scale)
    dmask = dscores.flatten(1, 2).sum_to_size(mask.shape).to(mask.dtype) if mask_gradient else None
    back = [gradient.transpose(1, 2).to(q.dtype) for gradient in (dq, dk, dv)]
    return back[0], back[1], back[2], dmask


# ------------------------------------------------------------------------------------------ for the fused kernels


def additive_bias(q: Tensor, mask: Any, key_padding: Any) -> Tensor | None:
    """Additive mask in q's dtype, broadcast strides kept. cuDNN reads a bias of another dtype as garbage."""
    full = masks.combined(mask, key_padding, None)
    return None if full is None else masks.additive(full, q.dtype)


def aligned_bias(bias: Tensor) -> Tensor:
    """A (B|1, H|1, Sq|1, Sk) bias whose rows are dense and start at multiples of 8 elements.

    The efficient kernel wants that and cuDNN computes garbage without it. PyTorch's own check looks at the strides and
    not at where the storage begins: ``mask[..., 7:]`` ends the CUDA context in plain SDPA (H200, torch 2.11).
    """
    length = bias.shape[-1]
    if isinstance(length, torch.SymInt):
        return _aligned_for_any_length(bias)
    padding = -length % 8
    if padding:
        return F.pad(bias, (0, padding))[..., :length]
    if bias.storage_offset() % 8:
        return bias.clone(memory_format=torch.contiguous_format)
    if bias.is_contiguous():  # asked first: products of dynamic lengths would become conditions of an exported graph
        return bias
    if bias.stride(-1) != 1 or any(stride % 8 for stride in bias.stride()[:-1]):
        return bias.contiguous()
    return bias


def _aligned_for_any_length(bias: Tensor) -> Tensor:
    """:func:`aligned_bias` in a graph whose lengths vary, where a question about them becomes a condition.

    torch.export refuses conditions that do not hold for all lengths, and PyTorch asks by itself whether padded rows are
    contiguous, and in scaled_dot_product_attention whether they are aligned. One row of keys is stored 8 times as wide,
    which answers both. Many rows get 1 to 8 elements more; before torch 2.15 only the first answer can be proved then.
    """
    for dimension in range(3):  # broadcast ones are not written out
        if bias.stride(dimension) == 0:
            bias = bias.narrow(dimension, 0, 1)
    length, rows = bias.shape[-1], bias.shape[2]
    padding = 7 * length if isinstance(rows, int) and rows == 1 else 8 - length % 8
    return F.pad(bias, (0, padding))[..., :length]


def _expanded(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """(B, H, Sq, Sk) view of a bias as the fused kernels can read it."""
    if bias is None:
        return None
    return aligned_bias(bias).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


def aligned(tensor: Tensor) -> Tensor:
    """A (B, S, H, D) or (T, H, D) tensor as the CUDA kernels can read it.

    D filled up with zeros to a multiple of 8 (QK^T and PV do not change), stored densely in this order of dimensions,
    rows at multiples of 16 bytes. cuDNN 9.19 computes garbage from misaligned rows without a word, flash and efficient
    end the CUDA context; a strided last dimension makes cuDNN's second call crash.
    """
    width = tensor.shape[-1]
    # Half the time of what follows, three times a call. Not for traced tensors: is_contiguous would tie their lengths.
    if type(tensor) is Tensor and tensor.is_contiguous() and width % 8 == 0 and tensor.storage_offset() % 8 == 0:
        return tensor
    padding = -width % 8
    if padding:
        return F.pad(tensor, (0, padding))
    unit = 16 // tensor.element_size()
    *outer, columns = tensor.stride()
    if tensor.storage_offset() % unit:
        return tensor.clone(memory_format=torch.contiguous_format)
    if columns != 1 or outer[-2] < outer[-1]:
        return tensor.contiguous()
    for stride in outer:  # takes half the time of any(), and a call does this three times
        if stride % unit:
            return tensor.contiguous()
    return tensor


def _bhsd(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(aligned(tensor).transpose(1, 2) for tensor in tensors)


def fit(out: Tensor, width: int) -> Tensor:
    return out if out.shape[-1] == width else out[..., :width]


def same_layout_gradient(out: Tensor) -> None:
    """Give a cuDNN result's gradient the strides of the result.

    cuDNN's cache of backward plans does not look at the layout of grad_out: the first one seen for a shape is used for
    all, and gradients are wrong by 140 % without a word (torch 2.11, cuDNN 9.19; plain SDPA too).
    """
    strides = out.stride()
    if out.requires_grad:
        out.register_hook(lambda gradient: _with_strides(gradient, strides))


def _with_strides(gradient: Tensor, strides: tuple[int, ...]) -> Tensor:
    if gradient.stride() == strides:
        return gradient
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def empty_to(lse: Tensor, mark: float, other: float) -> Tensor:
    """What a kernel writes for rows with nothing to attend to, and wants to read back: +inf in flash, 0 elsewhere."""
    return lse.masked_fill(lse == mark, other)


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V copied for each query head, for a kernel without grouped heads."""
    if not grouped(q, k):
        return k, v
    group = q.shape[2] // k.shape[2]
    return k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)


def _sum_heads(gradient: Tensor, heads: int) -> Tensor:
    """Gradient of :func:`repeat_heads` for (B, S, H, D)."""
    if gradient.shape[2] == heads:
        return gradient
    return gradient.unflatten(2, (heads, gradient.shape[2] // heads)).sum(3)


def _zero_gradients(q: Tensor, k: Tensor, v: Tensor, mask: Any, mask_gradient: bool) -> Backward:
    dmask = torch.zeros_like(mask) if mask_gradient else None
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), dmask


# -------------------------------------------------------------------------------------------------- _native_flash


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, deterministic, return_lse)
    if q.device.type != "cuda":
        bias, is_causal = _cpu_bias(q, k, mask, key_padding, causal, window)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *_cpu_bhsd(q, k, v), 0.0, is_causal, attn_mask=bias, scale=scale
        )
        if return_lse and bias is not None:  # the kernel gives 0 for an empty row's out and lse
            lse = lse.masked_fill(_empty(bias, is_causal, q.shape[1]), -math.inf)
        return out.transpose(1, 2), lse if return_lse else None, None
    width = v.shape[-1]
    if window is None and not causal & ALIGN_LOWER_RIGHT:  # square, or no positions at all
        results = aten._scaled_dot_product_flash_attention(
            *_bhsd(q, k, v), dropout_p, bool(causal & CAUSAL), False, scale=resolved_scale(q, scale)
        )
        return fit(results[0], width).transpose(1, 2), results[1] if return_lse else None, None
    out, lse, _, _, _ = aten._flash_attention_forward(
        aligned(q), aligned(k), aligned(v), None, None, q.shape[1], k.shape[1], dropout_p,
        bool(causal & CAUSAL), False, scale=resolved_scale(q, scale), **flash_windows(window, causal),
    )  # fmt: skip
    return fit(out, width), empty_to(lse, math.inf, -math.inf) if return_lse else None, None


def _cpu_bhsd(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The CPU kernel reads rows of D as if they were dense: garbage, without a word, if they are not."""
    return tuple((one if one.stride(-1) == 1 else one.contiguous()).transpose(1, 2) for one in tensors)


def _empty(bias: Tensor, is_causal: bool, q_length: int) -> Tensor:
    """Bool (B|1, H|1, Sq|1): rows with nothing to attend to under a bias and, perhaps, upper-left causal."""
    empty = masks.empty_causal_rows(bias, q_length) if is_causal else masks.empty_rows(bias)
    return empty.squeeze(-1)


def _cpu_bias(
    q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any
) -> tuple[Tensor | None, bool]:
    """The CPU kernel takes a bias together with upper-left causal; what else concerns positions goes into the bias."""
    keep = None
    if causal & ALIGN_LOWER_RIGHT and q.shape[1] == k.shape[1]:
        causal &= CAUSAL
    if window is not None or causal & ALIGN_LOWER_RIGHT:
        keep, causal = masks.positions(q.shape[1], k.shape[1], causal, window, q.device), 0
    full = masks.combined(mask, key_padding, keep)
    return None if full is None else masks.additive(full, q.dtype), bool(causal & CAUSAL)


def flash_windows(window: Any, causal: int) -> dict[str, int | None]:
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
    if is_empty(q, k):
        return _zero_gradients(q, k, v, mask, mask_gradient)
    if q.device.type != "cuda":
        bias, is_causal = _cpu_bias(q, k, mask, key_padding, causal, window)
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_cpu_bhsd(grad_out, q, k, v, out), empty_to(lse, -math.inf, 0.0), 0.0, is_causal, attn_mask=bias,
            scale=scale,
        )  # fmt: skip
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
        return dq, dk, dv, None
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # no dropout here: nobody reads the rng state
    gradients = aten._flash_attention_backward(
        *(aligned(tensor) for tensor in (grad_out, q, k, v, out)), empty_to(lse, -math.inf, math.inf), None, None,
        q.shape[1], k.shape[1], 0.0, bool(causal & CAUSAL), unused, unused, scale=resolved_scale(q, scale),
        **flash_windows(window, causal),
    )  # fmt: skip
    dq, dk, dv = (fit(gradient, q.shape[-1]) for gradient in gradients)
    return dq, dk, dv, None


# --------------------------------------------------------------------------- _native_efficient and _native_cudnn
# Both take an additive bias, alone or with is_causal (upper left). An empty row gives exactly 0, no NaN anywhere and
# right gradients in both (H200, torch 2.11), so nothing is paid for correcting `out`: that would be 80 us on 440-1600.


def needs_gradient(*tensors: Tensor | None) -> bool:
    # efficient and cuDNN need lse for aten's own backward; without it cuDNN's returns garbage
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, deterministic, return_lse)
    width = v.shape[-1]
    k, v = repeat_heads(q, k, v)
    bias = additive_bias(q, mask, key_padding)
    results = aten._scaled_dot_product_efficient_attention(
        *_bhsd(q, k, v), _expanded(bias, q, k), return_lse or needs_gradient(q, k, v, bias), dropout_p,
        bool(causal & CAUSAL), scale=resolved_scale(q, scale),
    )  # fmt: skip
    lse = None
    if return_lse:
        # padded to a multiple of 32; sliced only when asked for, as export with a dynamic length cannot prove
        # S <= 32 * ceil(S / 32)
        lse = results[1][..., : q.shape[1]]
        if bias is not None:
            lse = lse.masked_fill(_empty(bias, bool(causal & CAUSAL), q.shape[1]), -math.inf)
    return fit(results[0], width).transpose(1, 2), lse, None


def efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, mask, mask_gradient)
    key_heads, widths = k.shape[2], (q.shape[-1], k.shape[-1], v.shape[-1])
    k, v = repeat_heads(q, k, v)
    grad_out, *inputs, out = _bhsd(grad_out, q, k, v, out)
    lse = F.pad(empty_to(lse, -math.inf, 0.0), (0, -lse.shape[-1] % 32))
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    *gradients, dbias = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, *inputs, _expanded(additive_bias(q, mask, key_padding), q, k), out, lse, unused, unused, 0.0,
        [True, True, True, mask_gradient], bool(causal & CAUSAL), scale=resolved_scale(q, scale),
    )  # fmt: skip
    dq, dk, dv = (fit(g, width).transpose(1, 2) for g, width in zip(gradients, widths, strict=True))
    dmask = dbias.sum_to_size(mask.shape).to(mask.dtype) if mask_gradient else None
    return dq, _sum_heads(dk, key_heads), _sum_heads(dv, key_heads), dmask


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, deterministic, return_lse)
    results = aten._scaled_dot_product_cudnn_attention(
        *_bhsd(q, k, v), _expanded(additive_bias(q, mask, key_padding), q, k), return_lse or needs_gradient(q, k, v),
        dropout_p, bool(causal & CAUSAL), scale=resolved_scale(q, scale),
    )  # fmt: skip
    out = results[0]
    same_layout_gradient(out)
    return fit(out, v.shape[-1]).transpose(1, 2), results[1].squeeze(-1) if return_lse else None, None


def cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, mask, mask_gradient)
    widths = (q.shape[-1], k.shape[-1], v.shape[-1])
    # contiguous (B, S, H, D) gradient and out, as the forward kernel stored out: see same_layout_gradient
    grad_out, *inputs, out = _bhsd(grad_out.contiguous(), q, k, v, out)
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, *inputs, out, lse.unsqueeze(-1), unused, unused,
        _expanded(additive_bias(q, mask, key_padding), q, k), None, None, q.shape[1], k.shape[1], 0.0,
        bool(causal & CAUSAL), scale=resolved_scale(q, scale),
    )  # fmt: skip
    dq, dk, dv = (fit(g, width).transpose(1, 2) for g, width in zip(gradients, widths, strict=True))
    return dq, dk, dv, None
