"""FlashAttention-2, the package flash-attn: `flash` and `flash_varlen` (Dao 2023, https://arxiv.org/abs/2307.08691).

:func:`bind` serves whoever loads the same library from elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.packages import Package, accepts, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Call

from . import _flash_common
from ._flash_common import Lengths, Window, padding_and_positions

_WINDOW = ("window_size_left", "window_size_right")
# compute capabilities with 100 KB of shared memory or less for a block
_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))


class Flash2:
    """The raw functions of flash-attn 2.6.3 and later; see :class:`compiled_attn.ops._flash_common.Library`."""

    empty_lse = math.inf
    dense_queries_on = ()

    def __init__(self, module: Any) -> None:
        # the Hub's package and flash_attn itself hold the interface as a submodule
        module = getattr(module, "flash_attn_interface", module)
        forward = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "softcap", "alibi_slopes", "return_softmax")
        gradients = (
            "dout", "out", "softmax_lse", "dq", "dk", "dv", "dropout_p", "softmax_scale", "causal", "softcap",
            "alibi_slopes", "deterministic", "rng_state",
        )  # fmt: skip
        packed = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        # up to 2.6 the window is a pair
        self._paired = accepts(require(module, "_flash_attn_forward"), "window_size")
        window = ("window_size",) if self._paired else _WINDOW
        self._forward = require(module, "_flash_attn_forward", *forward, *window)
        self._packed_forward = require(module, "_flash_attn_varlen_forward", *forward, *packed, *window)
        self._backward = require(module, "_flash_attn_backward", *gradients, *window)
        self._packed_backward = require(module, "_flash_attn_varlen_backward", *gradients, *packed, *window)

    def packs(self, q_length: int, k_length: int, window: Window) -> bool:
        # The library takes a right part as long as the keys for an open one, and replaces an open one beside a limited
        # left one by the number of keys: with Sq > Sk the first rows then see all, or too little. The packed entry goes
        # by max_seqlen_k instead, where _bounds helps.
        left, right = window
        return q_length > k_length and (left >= 0 or right >= 0) and (right < 0 or right >= k_length)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, scale: float, causal: bool, window: Window,
        dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        options = {"softcap": 0.0, "alibi_slopes": None, "return_softmax": False}
        if lengths is None:
            results = self._forward(
                q, k, v, dropout_p=dropout_p, softmax_scale=scale, causal=causal, **self._window(window), **options
            )
        else:
            lengths, window = _bounds(lengths, causal, window)
            results = self._packed_forward(
                q, k, v, *lengths, dropout_p=dropout_p, softmax_scale=scale, causal=causal, **self._window(window),
                **options,
            )  # fmt: skip
        # out first, lse, the probabilities and the random state last; 2.6 has four inputs between
        return results[0], results[-3], results[-1]

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths | None,
        scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in (q, k, v))
        options: dict[str, Any] = {
            "dropout_p": dropout_p, "softmax_scale": scale, "causal": causal, "softcap": 0.0, "alibi_slopes": None,
            "deterministic": deterministic,
            # without dropout nobody reads it, but the source does not say so
            "rng_state": state if dropout_p > 0.0 else state.new_zeros(2),
        }  # fmt: skip
        if lengths is None:
            self._backward(grad_out, q, k, v, out, lse, dq, dk, dv, **self._window(window), **options)
            return dq, dk, dv
        lengths, window = _bounds(lengths, causal, window)
        self._packed_backward(grad_out, q, k, v, out, lse, dq, dk, dv, *lengths, **self._window(window), **options)
        # cleared afterwards: with grouped heads the sum over a group overwrites what was there before
        starts_q, starts_k = lengths[:2]
        return masks.clear_behind(dq, starts_q), masks.clear_behind(dk, starts_k), masks.clear_behind(dv, starts_k)

    def _window(self, window: Window) -> dict[str, Any]:
        return {"window_size": window} if self._paired else dict(zip(_WINDOW, window, strict=True))


def _bounds(lengths: Lengths, causal: bool, window: Window) -> tuple[Lengths, Window]:
    """Bounds of the lengths that the packed kernels take rightly, and the window to go with them.

    With max_seqlen_q == 1 and grouped heads they believe that every sequence has one query; with 0 they start an empty
    grid. A window's right part is made explicit, see :meth:`Flash2.packs`: no row sees further than max_seqlen_q.
    """
    cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = lengths
    longest_q, longest_k = max(longest_q, 2), max(longest_k, 1)
    left, right = window
    if not causal and (left >= 0 or right >= 0):
        right = longest_q if right < 0 else min(right, longest_q)
        longest_k = max(longest_k, right + 1)
    return (cu_seqlens_q, cu_seqlens_k, longest_q, longest_k), (left, right)


def bind(module: Any) -> Flash2:
    """The library in ``module``, the interface or a package that holds it; Unfit if a function is not as expected."""
    return Flash2(module)


def wide_dropout(call: Call) -> str | None:
    """The library launches no kernel at all for this, and leaves the gradients as they were allocated."""
    if call.gradient and call.dropout_p > 0.0 and call.query[-1] > 192 and call.capability in _SMALL:
        return (
            f"has no dropout in the backward for head_dim={call.query[-1]} over 192 on compute capability "
            f"{call.capability}: a block's shared memory is too small"
        )
    return None


LIMITS = _flash_common.limits(dropout=True, also=(padding_and_positions, wide_dropout))
VARLEN_LIMITS = _flash_common.limits(dropout=True, masks=("none",), also=(wide_dropout,))

PACKAGE = Package(
    "flash_attn.flash_attn_interface",
    "flash-attn",
    minimum="2.6.3",
    install="pip install flash-attn --no-build-isolation",
    bind=bind,
)
_dense, _packed_dense, _varlen = _flash_common.kernels(PACKAGE, dropout=True)

register_backend(
    Backend(
        "flash_varlen",
        "FlashAttention-2 on packed sequences (flash-attn)",
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
        "flash",
        "FlashAttention-2 (flash-attn)",
        family="FlashAttention",
        limits=(LIMITS,),
        dense=_dense,
        packages=(PACKAGE,),
        partner="flash_varlen",
    )
)
