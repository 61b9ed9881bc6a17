"""PyTorch's own kernels: `native` (scaled_dot_product_attention's choice) and its four kernels, pinned.

The dense ones are composite operators over the fused aten operator itself. Never an ``sdpa_kernel`` context:
torch.export forgets it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, LOW_PRECISION, LOWER_RIGHT, UPPER_LEFT, Call, Limits

from . import _triton_functions
from ._native_dense import (
    Backward,
    Forward,
    additive_bias,
    aligned,
    aligned_bias,
    cudnn_backward,
    cudnn_forward,
    efficient_backward,
    efficient_forward,
    flash_backward,
    flash_forward,
    grouped,
    is_empty,
    math_backward,
    math_forward,
    needs_gradient,
    repeat_heads,
    same_layout_gradient,
)
from ._native_varlen import flash_varlen_backward, flash_varlen_forward, math_varlen_backward, math_varlen_forward

ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALL_MASKS = ("none", "key_padding", "bool", "float")

# SDPBackend, as torch._fused_sdp_choice returns it
_CHOICES = {0: "_native_math", 1: "_native_flash", 2: "_native_efficient", 3: "_native_cudnn"}


def native_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    """scaled_dot_product_attention: PyTorch chooses, in compiled code on the machine that lowers the graph."""
    if causal & ALIGN_LOWER_RIGHT and q.shape[1] == k.shape[1]:
        causal &= CAUSAL  # one and the same, and a kernel's own mode
    if return_lse:
        name = native_choice(q, k, v, mask, key_padding, causal, scale, window)
        if dropout_p > 0.0 and name == "_native_flash" and not q.is_cuda:
            name = "_native_math"  # the CPU's flash kernel has no dropout
        forward = KERNELS[name].forward
        return forward(q, k, v, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, True)  # type: ignore[return-value]
    if q.numel() == 0 or k.numel() == 0:  # is_empty, without a call
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window)
    if mask is not None or key_padding is not None or window is not None or causal & ALIGN_LOWER_RIGHT:
        return _native_masked(q, k, v, mask, key_padding, dropout_p, causal, scale, window), None, None
    if q.is_cuda:
        q, k, v = _aligned_rows(q), _aligned_rows(k), _aligned_rows(v)
    if scale is None and not gqa:  # 0.5 us less than with the keywords
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, dropout_p, causal == CAUSAL
        )
    else:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, dropout_p, causal == CAUSAL, scale=scale,
            enable_gqa=grouped(q, k),
        )  # fmt: skip
    if q.is_cuda:
        same_layout_gradient(out)
    return out.transpose(1, 2), None, None


def _aligned_rows(tensor: Tensor) -> Tensor:
    """:func:`aligned`, but head dims are padded by PyTorch itself."""
    return tensor if tensor.shape[-1] % 8 else aligned(tensor)


def _native_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, dropout_p: float, causal: int, scale: float | None,
    window: Any,
) -> Tensor:  # fmt: skip
    full = masks.combined(mask, key_padding, masks.positions(q.shape[1], k.shape[1], causal, window, q.device))
    assert full is not None
    bias = masks.additive(full, q.dtype)
    if q.is_cuda:
        q, k, v = _aligned_rows(q), _aligned_rows(k), _aligned_rows(v)
        bias = aligned_bias(bias)
    gqa = grouped(q, k)
    if gqa and _choice(q, k, v, bias, False, scale) == "_native_math" and q.device.type != "cpu":
        # PyTorch has only its math kernel left for this, with Sq x Sk scores for each head (9 GiB at 16k tokens);
        # copies of K and V keep the fused kernels.
        (k, v), gqa = repeat_heads(q, k, v), False
    if needs_gradient(bias) and q.is_cuda and q.dtype != torch.float64:
        # cuDNN has no gradient for a bias
        return efficient_forward(q, k, v, bias, None, dropout_p, 0, scale)[0]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, dropout_p, scale=scale, enable_gqa=gqa
    )
    if q.is_cuda:
        same_layout_gradient(out)
    return out.transpose(1, 2)


def _choice(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None) -> str:
    number = torch._fused_sdp_choice(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, 0.0, is_causal, scale=scale,
        enable_gqa=grouped(q, k),
    )  # fmt: skip
    return _CHOICES.get(int(number), "_native_math")


def native_choice(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, causal: int, scale: float | None, window: Any
) -> str:
    """The pinned backend that PyTorch's choice for this call amounts to, for calls that need lse."""
    if causal & ALIGN_LOWER_RIGHT and q.shape[1] == k.shape[1]:
        causal &= CAUSAL
    if is_empty(q, k) or window is not None or causal & ALIGN_LOWER_RIGHT or q.device.type == "meta":
        return "_native_math"
    bias = additive_bias(q, mask, key_padding)
    if bias is not None:
        k, v = repeat_heads(q, k, v)
    return _choice(q, k, v, bias, bias is None and bool(causal & CAUSAL), scale)


def _varlen_kernels(q: Tensor, v: Tensor, causal: int, window: Any) -> Kernels:
    """`native` on packed sequences: flash where it serves the call, else our Triton kernels, else math."""
    if q.device.type == "cpu":
        return VARLEN_KERNELS["_native_flash"]
    flash = (
        q.device.type == "cuda"
        and q.dtype in LOW_PRECISION
        and q.shape[-1] <= 256
        and q.shape[-1] == v.shape[-1]
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        # it aligns at the lower right, and the lengths of the sequences are on the device
        and (causal & ALIGN_LOWER_RIGHT or (causal == 0 and window is None))
    )
    if not flash and _triton_functions.serves_varlen(q, v):
        return _triton_functions.VARLEN
    return VARLEN_KERNELS["_native_flash" if flash else "_native_math"]


def native_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    forward = _varlen_kernels(q, v, causal, window).forward
    return forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, scale, gqa, window,
        deterministic, return_lse,
    )  # type: ignore[return-value]  # fmt: skip


def native_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    backward = _varlen_kernels(q, v, causal, window).backward
    assert backward is not None
    return backward(
        grad_out, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out, lse, state, dropout_p, causal,
        scale, gqa, window, deterministic, mask_gradient,
    )  # fmt: skip


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


def _cudnn_rules(call: Call) -> str | None:
    """Calls whose plan cuDNN cannot build: the second identical one would crash the process."""
    if max(call.query[-1], call.value[-1]) > 128 and call.capability is not None and call.capability < (9, 0):
        return f"head_dim={call.query[-1]} over 128 needs compute capability (9, 0), not {call.capability}"
    if call.gradient and call.key[-3] == 1:
        # no plan for Sq == 1; with a bias and Sq == 17, dQ off by 10 (cuDNN 9.19)
        return "has no right backward for Sk == 1"
    return None


def _flash_rules(call: Call) -> str | None:
    """FlashAttention-2 knows no window that is open at the right, or reaches past the last key, when Sq > Sk.

    It takes the one for Sk keys wide and the other for open; rows are aligned at the lower right.
    """
    if call.window is None or call.causal or call.query[-3] <= call.key[-3]:
        return None
    left, right = call.window
    if right >= call.key[-3] or right < 0 <= left:
        return (
            f"has no window of {call.window} when Sq > Sk ({call.query[-3]} > {call.key[-3]}) and its right part is "
            "open or >= Sk"
        )
    return None


def _everywhere(limits: Limits, on_accelerators: str) -> tuple[Limits, ...]:
    """Limits of a CPU, and the same on CUDA and on devices that nobody ran this on."""
    cuda = replace(limits, devices=("cuda",), deterministic=on_accelerators)
    return limits, cuda, replace(cuda, devices=("xpu", "mps"), verified="not run")


_DENSE = Limits(
    ("cpu",), ANY_DTYPE, value_head_dim=True, masks=ALL_MASKS, mask_gradient=True, window=True, dropout=True
)

register_backend(
    Backend(
        "native",
        "scaled_dot_product_attention, PyTorch's own choice of kernel",
        family="PyTorch",
        limits=_everywhere(_DENSE, "global"),
        dense=Kernels(native_forward, composite=True, random=True),
        varlen_limits=_everywhere(Limits(("cpu",), ANY_DTYPE, window=True), "global"),
        varlen=Kernels(native_varlen_forward, native_varlen_backward),
        delegate=native_choice,
    )
)
register_backend(
    Backend(
        "_native_math",
        "plain matrix products and softmax, in float32 or better; O(Sq * Sk) memory",
        family="PyTorch",
        limits=_everywhere(_DENSE, "always"),
        dense=KERNELS["_native_math"],
        varlen_limits=_everywhere(
            Limits(("cpu",), ANY_DTYPE, value_head_dim=True, window=True, dropout=True), "always"
        ),
        varlen=VARLEN_KERNELS["_native_math"],
    )
)
register_backend(
    Backend(
        "_native_flash",
        "PyTorch's flash-attention kernel (CUDA: FlashAttention-2; CPU: its own)",
        family="PyTorch",
        limits=(
            Limits(
                ("cuda",), (torch.bfloat16, torch.float16), min_capability=(8, 0), max_head_dim=256,
                alignments=(LOWER_RIGHT,), window=True, dropout=True, deterministic="global", also=(_flash_rules,),
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
                ("cuda",), (torch.bfloat16, torch.float16), min_capability=(8, 0), max_head_dim=256, masks=ALL_MASKS,
                alignments=(UPPER_LEFT,), value_head_dim=True, dropout=True, deterministic="never",
                also=(_cudnn_rules,),
            ),
        ),
        dense=KERNELS["_native_cudnn"],
    )
)  # fmt: skip
