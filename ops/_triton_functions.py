"""The functions of `triton` and `triton_varlen`: our kernels on a GPU, plain PyTorch with the same results on a CPU.

triton itself is imported by the first call on a GPU, or when the backend is set: `import compiled_attn` never does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from compiled_attn.operators import Kernels
from compiled_attn.spec import Call

from ._native_dense import Backward, Forward, math_backward, math_forward
from ._native_varlen import math_varlen_backward, math_varlen_forward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
# device types that plain PyTorch serves; meta tensors have shapes alone
_PLAIN = ("cpu", "meta")
MIN_CAPABILITY = (8, 0)


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if q.device.type in _PLAIN:
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, return_lse=return_lse)
    from ._triton_launch import forward

    return *forward(q, k, v, mask, key_padding, None, causal, scale, window, return_lse), None


def triton_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if q.device.type in _PLAIN:
        return math_backward(
            grad_out, q, k, v, mask, key_padding, out, lse, state, 0.0, causal, scale, gqa, window, deterministic,
            mask_gradient,
        )  # fmt: skip
    from ._triton_launch import backward

    return *backward(grad_out, q, k, v, mask, key_padding, None, out, lse, causal, scale, window), None


def triton_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    """Nothing depends on the maxima: the grid is bound by the packed lengths and the number of sequences."""
    if q.device.type in _PLAIN:
        return math_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, scale, gqa, window,
            deterministic, return_lse,
        )  # fmt: skip
    from ._triton_launch import forward

    starts = (cu_seqlens_q, cu_seqlens_k)
    return *forward(q, k, v, None, None, starts, causal, scale, window, return_lse), None


def triton_varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    if q.device.type in _PLAIN:
        return math_varlen_backward(
            grad_out, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out, lse, state, 0.0, causal,
            scale, gqa, window, deterministic, mask_gradient,
        )  # fmt: skip
    from ._triton_launch import backward

    starts = (cu_seqlens_q, cu_seqlens_k)
    return *backward(grad_out, q, k, v, None, None, starts, out, lse, causal, scale, window), None


DENSE = Kernels(triton_forward, triton_backward, inlined=True)
VARLEN = Kernels(triton_varlen_forward, triton_varlen_backward, inlined=True)


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


# as torch.compiler.assume_constant_result does: Dynamo cannot trace find_spec, and what is installed does not change
has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]

MISSING = "module 'triton' is not installed; pip install triton (PyTorch's own wheels for Linux bring it)"


def needs_triton(call: Call) -> str | None:
    """A rule for Limits: on a GPU triton must be there."""
    return None if has_triton() else MISSING


def unavailable() -> list[str]:
    """Reasons why neither kernels nor plain PyTorch can run; imports triton where it will be needed."""
    if not torch.cuda.is_available():
        return []
    if not has_triton():
        return [MISSING]
    from . import _triton_launch  # noqa: F401  1 s, not in the first call

    return []


def serves_varlen(q: Tensor, v: Tensor) -> bool:
    """Whether the packed kernels take these tensors (what they do not: float64, value heads of another width)."""
    return (
        q.device.type == "cuda"
        and q.dtype in DTYPES
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] <= MAX_HEAD_DIM
        and torch.cuda.get_device_capability(q.device) >= MIN_CAPABILITY
        and has_triton()
    )
