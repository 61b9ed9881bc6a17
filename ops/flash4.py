"""FlashAttention-4, the package flash-attn-4 (flash_attn.cute): `_flash_4`, dense and packed.

Its kernels are compiled by CuTe DSL when they are called first, one for each head_dim, dtype and sort of mask.
:func:`bind` serves whoever loads the same library from elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.packages import Package, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Call

from . import _flash_common
from ._flash_common import KeyLengths, Lengths, Window, padding_and_positions
from ._quick_launch import capability_of, on


class Flash4:
    """The raw functions of flash-attn-4; see :class:`compiled_attn.ops._flash_common.Library`.

    Betas differ in what they take and in how many results they give: keywords only, and the first two or three results.
    """

    empty_lse = -math.inf
    # There its kernels for packed queries are slower: another scheduler, and results that do not leave by TMA. On 10.0
    # and 11.0 betas up to 32 read other keys then, at head_dim 256; nothing but 9.0 was run.
    dense_queries_on = ((9, 0),)

    def __init__(self, module: Any) -> None:
        # the package holds the interface as a submodule
        module = getattr(module, "interface", module)
        shared = (
            "q", "k", "v", "softmax_scale", "causal", "window_size_left", "window_size_right", "cu_seqlens_q",
            "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
        )  # fmt: skip
        self._forward = require(module, "_flash_attn_fwd", *shared, "return_lse")
        self._backward = require(
            module, "_flash_attn_bwd", *shared, "out", "dout", "lse", "deterministic", "dq", "dk", "dv"
        )

    def packs(self, q_length: int, k_length: int, window: Window) -> bool:
        return False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | KeyLengths | None, scale: float, causal: bool,
        window: Window, dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
        with on(q.device):
            out, lse, *_ = self._forward(
                q=q, k=k, v=v, softmax_scale=scale, causal=causal, return_lse=return_lse, **_sides(window),
                **_packed(lengths),
            )  # fmt: skip
        return out, lse, None

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths | None,
        scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if capability_of(q) == (9, 0) and 0 < q.shape[-1] % 32 <= 16 and q.shape[-1] < 128:
            # Its kernels there hold dq and dk in rows of a multiple of 16, those that convert them expect one of 32
            # (beta 36): with head_dim 72 dq was off by its own size (H200). 64 and 128 are right.
            more = (64 if q.shape[-1] < 64 else 128) - q.shape[-1]
            grad_out, q, k, v, out = (F.pad(tensor, (0, more)) for tensor in (grad_out, q, k, v, out))
        # no kernel writes the rows behind the last sequence
        allocate = torch.empty_like if lengths is None else torch.zeros_like
        dq, dk, dv = (allocate(one, memory_format=torch.contiguous_format) for one in (q, k, v))
        with on(q.device):
            dq, dk, dv, *_ = self._backward(
                q=q, k=k, v=v, out=out, dout=grad_out, lse=lse, softmax_scale=scale, causal=causal,
                deterministic=deterministic, dq=dq, dk=dk, dv=dv, **_sides(window), **_packed(lengths),
            )  # fmt: skip
        return dq, dk, dv


def _sides(window: Window) -> dict[str, int | None]:
    """Open sides are None here: a single -1 would be taken for one key less."""
    left, right = (None if side < 0 else side for side in window)
    return {"window_size_left": left, "window_size_right": right}


def _packed(lengths: Lengths | KeyLengths | None) -> dict[str, Any]:
    if lengths is None:
        return {}
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = lengths
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": None if cu_seqlens_q is None else max(longest_q, 1),
        "max_seqlen_k": max(longest_k, 1),
    }


def bind(module: Any) -> Flash4:
    """The library in ``module``, flash_attn.cute or its interface; Unfit if a function is not as expected."""
    return Flash4(module)


def architectures(call: Call) -> str | None:
    """What the library asserts of the compute capability (beta 36)."""
    if call.capability is None:
        return None
    major = call.capability[0]
    width = -(-call.query[-1] // 8) * 8
    if major == 8 and call.gradient:
        return f"has no backward on compute capability {call.capability}; use flash"
    if major == 12 and call.gradient and call.deterministic:
        return f"has no deterministic backward on compute capability {call.capability}"
    if major in (10, 11) and 128 < width != 256:
        return f"takes head_dim up to 128, or 256, on compute capability {call.capability}, not {call.query[-1]}"
    if major in (8, 12) and width > 128:
        # shared memory of a block; the library checks nothing there
        return f"takes head_dim up to 128 on compute capability {call.capability}, not {call.query[-1]}"
    return None


CAPABILITIES: tuple[tuple[int, int | None], ...] = tuple((major, None) for major in range(8, 13))
LIMITS = _flash_common.limits(capabilities=CAPABILITIES, also=(padding_and_positions, architectures))
VARLEN_LIMITS = _flash_common.limits(capabilities=CAPABILITIES, masks=("none",), also=(architectures,))

PACKAGE = Package(
    "flash_attn.cute",
    "flash-attn-4",
    minimum="4.0.0b20",
    install="pip install --pre flash-attn-4, with [cu13] on CUDA 13, and after flash-attn, which brings an old copy",
    bind=bind,
)
_dense, _, _varlen = _flash_common.kernels(PACKAGE)

register_backend(
    Backend(
        "_flash_4",
        "FlashAttention-4 (flash-attn-4)",
        family="FlashAttention",
        limits=(LIMITS,),
        dense=_dense,
        varlen_limits=(VARLEN_LIMITS,),
        varlen=_varlen,
        packages=(PACKAGE,),
    )
)
