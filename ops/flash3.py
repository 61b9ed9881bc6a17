"""FlashAttention-3 (Shah et al. 2024, https://arxiv.org/abs/2407.08608): `_flash_3` and `_flash_varlen_3`.

:func:`bind` serves whoever loads the same library from elsewhere.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from compiled_attn.packages import Package, Unfit, accepts, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Call

from . import _flash_common
from ._flash_common import Lengths, Window, padding_and_positions

_WINDOW = ("window_size_left", "window_size_right")


class Flash3:
    """The raw functions of hopper/flash_attn_interface; see :class:`compiled_attn.ops._flash_common.Library`."""

    empty_lse = -math.inf
    dense_queries_on = ()

    def __init__(self, module: Any) -> None:
        # the Hub's package and flash_attn_3 itself hold the interface as a submodule
        module = getattr(module, "flash_attn_interface", module)
        packed = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        # in the betas of 2025 the window is a pair, causal has one name, and nothing has a default
        self._paired = accepts(require(module, "_flash_attn_forward"), "window_size")
        self._causal = "is_causal" if accepts(require(module, "_flash_attn_backward"), "is_causal") else "causal"
        window = ("window_size",) if self._paired else _WINDOW
        shared = ("q", "k", "v", "softmax_scale", *packed, *window)
        self._forward = require(module, "_flash_attn_forward", *shared, "causal")
        gradients = ("dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic", self._causal)
        self._backward = require(module, "_flash_attn_backward", *shared, *gradients)
        self._forward_unused = _without_default(self._forward, *shared, "causal")
        self._backward_unused = _without_default(self._backward, *shared, *gradients)

    def packs(self, q_length: int, k_length: int, window: Window) -> bool:
        return False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, scale: float, causal: bool, window: Window,
        dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        out, lse, *_ = self._forward(
            q=q, k=k, v=v, softmax_scale=scale, causal=causal, **self._window(window), **_packed(lengths),
            **self._forward_unused,
        )  # fmt: skip
        return out, lse, None

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths | None,
        scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        # no kernel writes the rows behind the last sequence
        allocate = torch.empty_like if lengths is None else torch.zeros_like
        dq, dk, dv = (allocate(one, memory_format=torch.contiguous_format) for one in (q, k, v))
        # what it returns differs from build to build; the gradients are always written into these
        self._backward(
            dout=grad_out, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale,
            deterministic=deterministic, **{self._causal: causal}, **self._window(window), **_packed(lengths),
            **self._backward_unused,
        )  # fmt: skip
        return dq, dk, dv

    def _window(self, window: Window) -> dict[str, Any]:
        return {"window_size": window} if self._paired else dict(zip(_WINDOW, window, strict=True))


def _without_default(function: Any, *given: str) -> dict[str, None]:
    """None for every parameter that has no default and is none of ``given``."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: None for one in parameters if one.default is one.empty and one.name not in given}


def _packed(lengths: Lengths | None) -> dict[str, Any]:
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = lengths or (None, None, None, None)
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": None if longest_q is None else max(longest_q, 1),
        "max_seqlen_k": None if longest_k is None else max(longest_k, 1),
    }


def bind(module: Any) -> Flash3:
    """The library in ``module``, the interface or a package that holds it; Unfit if a function is not as expected."""
    return Flash3(module)


def _bind_here(module: Any) -> Flash3:
    """:func:`bind`; Unfit if the build lacks the kernels of the GPU in use, as builds for Hopper alone do."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 8 and _without_sm80():
        raise Unfit("was built without kernels for compute capability 8; use flash")
    return bind(module)


def _without_sm80() -> bool:
    """What flash_attn_config, written beside the library when it was built, says; builds before it had them."""
    try:
        from flash_attn_config import CONFIG  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        return False
    return bool(CONFIG["build_flags"].get("FLASHATTENTION_DISABLE_SM8x", False))


def wide_deterministic(call: Call) -> str | None:
    """The library asserts it: head dims over 192 are rounded up to 256."""
    if call.gradient and call.deterministic and call.query[-1] > 192:
        return f"has no deterministic backward for head_dim={call.query[-1]} over 192"
    return None


_SHARED: dict[str, Any] = {"capabilities": ((8, None), (9, None)), "verified": "contract"}
LIMITS = _flash_common.limits(also=(padding_and_positions, wide_deterministic), **_SHARED)
VARLEN_LIMITS = _flash_common.limits(masks=("none",), also=(wide_deterministic,), **_SHARED)

PACKAGE = Package(
    "flash_attn_interface",
    "flash_attn_3",
    install="build hopper/ of github.com/Dao-AILab/flash-attention (flash_attn_3), or use _flash_3_hub",
    bind=_bind_here,
)
_dense, _packed_dense, _varlen = _flash_common.kernels(PACKAGE)

register_backend(
    Backend(
        "_flash_varlen_3",
        "FlashAttention-3 on packed sequences (flash_attn_3)",
        family="FlashAttention",
        limits=(LIMITS,),
        dense=_packed_dense,
        varlen_limits=(VARLEN_LIMITS,),
        varlen=_varlen,
        packages=(PACKAGE,),
        packed=True,
    )
)
register_backend(
    Backend(
        "_flash_3",
        "FlashAttention-3 (flash_attn_3)",
        family="FlashAttention",
        limits=(LIMITS,),
        dense=_dense,
        packages=(PACKAGE,),
        partner="_flash_varlen_3",
    )
)
