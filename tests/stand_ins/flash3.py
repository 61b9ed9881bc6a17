"""flash_attn_interface as FlashAttention-3 ships it, in float64 on a CPU, by hopper/flash_api.cpp."""

from __future__ import annotations

import math
import types
from typing import Any

from recorded import as_recorded
from torch import Tensor

from . import flash_exact
from .flash_exact import Batch

MODULE = "flash_attn_interface"


def span(batch: Batch, causal: bool, left: int, right: int) -> tuple[int, int]:
    """As mha_fwd and set_params_fprop: what reaches the end is open, and open is as long as keys, or queries."""
    left = -1 if left >= batch.longest_k - 1 else left
    right = -1 if right >= batch.longest_q - 1 else right
    if causal:
        right = 0
    return (batch.longest_k - 1 if left < 0 else left), (batch.longest_q - 1 if right < 0 else right)


class Library:
    """``calls`` counts; ``asked`` has the arguments of the last call."""

    def __init__(self, distribution: str = "flash-attn-3") -> None:
        self.beta = distribution.endswith("beta")
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.module = types.ModuleType(MODULE)
        for name, function in (("_flash_attn_forward", self.forward), ("_flash_attn_backward", self.backward)):
            self._add(distribution, name, function)

    def _add(self, distribution: str, name: str, function: Any) -> None:
        def call(**arguments: Any) -> Any:
            self.calls.append(name)
            self.asked = dict(arguments)
            if self.beta:
                arguments["window_size_left"], arguments["window_size_right"] = arguments.pop("window_size")
            return function(arguments)

        setattr(self.module, name, as_recorded(distribution, f"{MODULE}:{name}")(call))

    def forward(self, given: dict[str, Any]) -> tuple[Any, ...]:
        q, k, v = given["q"], given["k"], given["v"]
        flash_exact.demand_layout(q, k, v)
        assert given["k_new"] is given["qv"] is given["page_table"] is None
        assert given["num_splits"] == 1
        batch = _batch(given)
        sides = span(batch, given["causal"], given["window_size_left"], given["window_size_right"])
        out, lse = flash_exact.forward(batch, q, k, v, given["softmax_scale"], sides, -math.inf)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def backward(self, given: dict[str, Any]) -> Any:
        q, k, v, out, dout, lse = (given[name] for name in ("q", "k", "v", "out", "dout", "softmax_lse"))
        into: tuple[Tensor, Tensor, Tensor] = (given["dq"], given["dk"], given["dv"])
        flash_exact.demand_layout(q, k, v, out, dout, *into)
        assert lse.is_contiguous()
        batch = _batch(given)
        causal = given["causal"] if self.beta else given["is_causal"]
        sides = span(batch, causal, given["window_size_left"], given["window_size_right"])
        # flash_bwd_preprocess_kernel.h: an empty row's lse becomes 0, and its scores are -inf
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        flash_exact.backward(batch, dout, q, k, v, out, lse, given["softmax_scale"], sides, into)
        return (*into, q.new_empty(0)) if self.beta else q.new_empty(0)


def _batch(given: dict[str, Any]) -> Batch:
    names = ("q", "k", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    batch = Batch(*(given[name] for name in names), tile=128)  # TMA knows the bounds of the whole tensor alone
    assert batch.longest_q > 0
    assert batch.longest_k > 0
    return batch
