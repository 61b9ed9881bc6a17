"""flash_attn.cute as flash-attn-4 ships it, in float64 on a CPU, by flash_attn/cute/interface.py (beta 36)."""

from __future__ import annotations

import math
import types
from typing import Any

from recorded import as_recorded
from torch import Tensor

from . import flash_exact
from .flash_exact import Batch

MODULE = "flash_attn.cute.interface"


def span(causal: bool, left: int | None, right: int | None) -> tuple[int | None, int | None]:
    """As _resolve_causal_local_window: two negative sides are open, a single one is a bound like any other."""
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    return left, 0 if causal else right


class Library:
    """``asked`` has the last call's arguments, ``history`` all calls'; betas differ in how many ``extra`` results they
    give.
    """

    def __init__(self, extra: int = 3) -> None:
        self.extra = extra
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.history: list[tuple[str, dict[str, Any]]] = []
        self.module = types.ModuleType("flash_attn.cute")
        self.module.interface = types.ModuleType(MODULE)  # type: ignore[attr-defined]
        for name, function in (("_flash_attn_fwd", self.forward), ("_flash_attn_bwd", self.backward)):
            self._add(name, function)

    def _add(self, name: str, function: Any) -> None:
        def call(**arguments: Any) -> Any:
            self.calls.append(name)
            self.asked = arguments
            self.history.append((name, arguments))
            return function(arguments)

        setattr(self.module.interface, name, as_recorded("flash-attn-4", f"{MODULE}:{name}")(call))

    def forward(self, given: dict[str, Any]) -> tuple[Any, ...]:
        q, k, v = given["q"], given["k"], given["v"]
        flash_exact.demand_layout(q, k, v)
        batch = _batch(given)
        sides = span(given["causal"], given["window_size_left"], given["window_size_right"])
        out, lse = flash_exact.forward(batch, q, k, v, given["softmax_scale"], sides, -math.inf)
        return out, lse if given["return_lse"] else None, *(None,) * self.extra

    def backward(self, given: dict[str, Any]) -> tuple[Tensor, ...]:
        q, k, v, out, dout, lse = (given[name] for name in ("q", "k", "v", "out", "dout", "lse"))
        into = given["dq"], given["dk"], given["dv"]
        flash_exact.demand_layout(q, k, v, out, dout, *into)
        for gradient, like in zip(into, (q, k, v), strict=True):
            assert gradient.shape == like.shape
            assert gradient.is_contiguous()
        sides = span(given["causal"], given["window_size_left"], given["window_size_right"])
        # flash_bwd_preprocess.py: an empty row's lse becomes 0, and its scores are -inf
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        flash_exact.backward(_batch(given), dout, q, k, v, out, lse, given["softmax_scale"], sides, into)
        return into


def _batch(given: dict[str, Any]) -> Batch:
    names = ("q", "k", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    batch = Batch(*(given[name] for name in names), tile=128)  # as FlashAttention-3
    assert batch.longest_q > 0
    assert batch.longest_k > 0
    return batch
