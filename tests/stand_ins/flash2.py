"""flash_attn.flash_attn_interface as flash-attn 2 ships it, in float64 on a CPU, by csrc/flash_attn/flash_api.cpp."""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from recorded import as_recorded
from torch import Tensor

from . import flash_exact
from .flash_exact import Batch

MODULE = "flash_attn.flash_attn_interface"


def span(batch: Batch, causal: bool, left: int, right: int) -> tuple[int | None, int | None]:
    """The window that the kernels go by: what is open, or as long as the keys, becomes the number of keys."""
    longest = batch.longest_k
    left, right = (-1 if side >= longest else side for side in (left, right))
    if batch.longest_q == 1:
        causal = False
    if causal:
        right = 0
    if left < 0 and right >= 0:
        left = longest
    elif left >= 0 and right < 0:
        right = longest
    return None if left < 0 else left, None if right < 0 else right


class Library:
    """Counts its calls in ``calls``; ``asked`` has the arguments of the last one."""

    def __init__(self, distribution: str = "flash-attn") -> None:
        self.old = distribution == "flash-attn-2.6.3"
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.module = types.ModuleType(MODULE)
        for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"):
            self._add(distribution, name, self.forward)
        for name in ("_flash_attn_backward", "_flash_attn_varlen_backward"):
            self._add(distribution, name, self.backward)

    def _add(self, distribution: str, name: str, function: Any) -> None:
        def call(**arguments: Any) -> Any:
            self.calls.append(name)
            self.asked = dict(arguments)
            if self.old:
                arguments["window_size_left"], arguments["window_size_right"] = arguments.pop("window_size")
            return function(**arguments)

        setattr(self.module, name, as_recorded(distribution, f"{MODULE}:{name}")(call))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: None, return_softmax: bool,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None, block_table: None = None, leftpad_k: None = None, seqused_k: None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        flash_exact.demand_layout(q, k, v)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        assert softcap == 0.0
        assert not return_softmax or dropout_p > 0.0
        batch = Batch(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        if batch.packed and max_seqlen_q == 1 and q.shape[1] > k.shape[1] and dropout_p == 0.0:
            # grouped heads become queries: one for each sequence, so it believes
            if window_size_left < 0 and window_size_right < 0:
                assert q.shape[0] == len(batch.pieces), "shape is invalid for input"
        assert batch.longest_q > 0, "invalid configuration argument"
        rng = torch.randint(1 << 31, (2,)) if dropout_p > 0.0 else torch.full((2,), -1)
        out, lse = flash_exact.forward(
            batch, q, k, v, softmax_scale, span(batch, causal, window_size_left, window_size_right), math.inf, rng,
            dropout_p,
        )  # fmt: skip
        probabilities = q.new_empty(0)
        if self.old:
            return out, q, k, v, out, lse, probabilities, rng
        return out, lse, probabilities, rng

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
        dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: None, deterministic: bool, rng_state: Tensor | None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None, zero_tensors: bool = False,
    ) -> Any:  # fmt: skip
        flash_exact.demand_layout(dout, q, k, v, out, dq, dk, dv)
        assert softmax_lse.is_contiguous()
        assert isinstance(deterministic, bool)
        batch = Batch(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert batch.longest_q > 0
        assert batch.longest_k > 0, "invalid configuration argument"
        for gradient, like in ((dq, q), (dk, k), (dv, v)):
            assert gradient.shape == like.shape
            assert gradient.dtype == like.dtype
            gradient.fill_(math.nan)
        if dropout_p > 0.0:
            assert rng_state is not None
            assert rng_state.shape == (2,)
        flash_exact.backward(
            batch, dout, q, k, v, out, softmax_lse, softmax_scale,
            span(batch, causal, window_size_left, window_size_right), (dq, dk, dv), rng_state, dropout_p,
        )  # fmt: skip
        softmax_d = softmax_lse.new_empty(0)
        return (dq, dk, dv, softmax_d) if self.old else softmax_d
