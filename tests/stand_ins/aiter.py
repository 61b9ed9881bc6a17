"""aiter.ops.mha of amd-aiter 0.1.7.post2.dev18 on a CPU, in float64, by mha.py and csrc/py_itfs_ck/*.cu.

What its dispatch gets wrong is wrong here: the assembly kernels know no windows, and their backward aligns causal at
the upper left. CK divides by a sum of 0 in a row that a bias leaves empty.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from recorded import as_recorded
from torch import Tensor

from . import flash_exact
from .flash_exact import Batch

MODULE = "aiter.ops.mha"
NAMES = (
    "_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward", "_flash_attn_varlen_backward",
    "mha_fwd", "mha_varlen_fwd", "mha_bwd", "mha_varlen_bwd",
)  # fmt: skip


def span(batch: Batch, causal: bool, left: int, right: int) -> tuple[int | None, int | None]:
    """Open are -1 and what is as long as the keys; causal is a right part of 0."""
    sides = [None if side < 0 or side >= batch.longest_k else side for side in (left, right)]
    return sides[0], 0 if causal and batch.longest_q > 1 else sides[1]


class Library:
    """Counts its calls in ``calls``; ``asked`` has the arguments of the last one."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.module = types.ModuleType(MODULE)
        for name in NAMES:
            setattr(self.module, name, as_recorded("amd-aiter", f"{MODULE}:{name}")(self._named(name)))

    def _named(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            self.calls.append(name)
            self.asked = dict(arguments)
            for renamed, known in (("is_causal", "causal"), ("return_softmax_lse", "return_lse")):
                if renamed in arguments:
                    arguments[known] = arguments.pop(renamed)
            assert arguments["alibi_slopes"] is None
            for unused in (
                "min_seqlen_q",
                "logits_soft_cap",
                "zero_tensors",
                "return_softmax",
                "return_dropout_randval",
            ):
                assert not arguments.get(unused)
            if not name.startswith("mha"):
                assert (arguments["window_size_left"], arguments["window_size_right"]) == (-1, -1), "asm has no windows"
            return (self._backward if "dout" in arguments else self._forward)(name, **arguments)

        return call

    def _forward(
        self, name: str, *, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, return_lse: bool, cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, bias: Any = None, **rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        flash_exact.demand_layout(q, k, v)
        assert q.shape[-1] <= 256
        batch = Batch(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rng = torch.randint(1 << 31, (2,))
        nothing = q.new_empty(0)
        if bias is None:
            wide = span(batch, causal, window_size_left, window_size_right)
            out, lse = flash_exact.forward(batch, q, k, v, softmax_scale, wide, -math.inf, rng, dropout_p)
        else:
            assert not causal and dropout_p == 0.0
            scores, _, high_v = self._biased(q, k, v, bias, softmax_scale)
            lse = scores.logsumexp(-1)
            out = ((scores - lse[..., None]).exp() @ high_v).transpose(1, 2).to(q.dtype)  # NaN in an empty row
        return out, lse if return_lse else nothing, nothing, rng

    def _biased(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        assert bias.shape == (q.shape[1], k.shape[1]), "bias shape should be [sq, sk]"
        assert bias.stride(-1) == 1
        assert bias.dtype == q.dtype
        group = q.shape[2] // k.shape[2]
        high_k, high_v = (one.double().transpose(1, 2).repeat_interleave(group, 1) for one in (k, v))
        return q.double().transpose(1, 2) @ high_k.transpose(-1, -2) * scale + bias.double(), high_k, high_v

    def _backward(
        self, name: str, *, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int, window_size_right: int, deterministic: bool, rng_state: Any, cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, bias: Any = None, **rest: Any,
    ) -> Any:  # fmt: skip
        flash_exact.demand_layout(dout, q, k, v, out, dq, dk, dv)
        assert isinstance(deterministic, bool)
        assert rng_state is not None and rng_state.shape == (2,), "mha_bwd reads it without dropout too"
        assert softmax_lse.is_contiguous()
        batch = Batch(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lse = softmax_lse.masked_fill(softmax_lse == -math.inf, 0.0)  # get_validated_lse
        for gradient in (dq, dk, dv):
            gradient.fill_(math.nan)
        if bias is None:
            wide = span(batch, causal, window_size_left, window_size_right)
            if causal and not name.startswith("mha"):
                assert not batch.packed and batch.longest_q == batch.longest_k, "asm is causal from the upper left"
            flash_exact.backward(
                batch, dout, q, k, v, out, lse, softmax_scale, wide, (dq, dk, dv), rng_state, dropout_p
            )
            return softmax_lse.new_empty(0)
        scores, high_k, high_v = self._biased(q, k, v, bias, softmax_scale)
        weights = (scores - lse[..., None]).exp()
        upstream, result, high_q = (one.double().transpose(1, 2) for one in (dout, out, q))
        dscores = weights * (upstream @ high_v.transpose(-1, -2) - (upstream * result).sum(-1, keepdim=True))
        found = (
            dscores @ high_k * softmax_scale, dscores.transpose(-1, -2) @ high_q * softmax_scale,
            weights.transpose(-1, -2) @ upstream,
        )  # fmt: skip
        for gradient, one in zip((dq, dk, dv), found, strict=True):
            gradient.copy_(one.unflatten(1, (gradient.shape[2], -1)).sum(2).transpose(1, 2))
        return softmax_lse.new_empty(0)


def hub(library: Library) -> types.ModuleType:
    """kernels-community/aiter-flash-attn-ck: two public functions over the CK forward; windows are triples."""
    module = types.ModuleType("aiter_flash_attn_ck")

    def options(arguments: dict[str, Any]) -> dict[str, Any]:
        left, right, sink = arguments.pop("window_size")
        assert sink == 0
        arguments.update(
            is_causal=arguments.pop("causal"), window_size_left=left, window_size_right=right,
            return_softmax_lse=arguments.pop("return_lse"), return_dropout_randval=False,
        )  # fmt: skip
        return {
            name: value for name, value in arguments.items() if name not in ("return_attn_probs", "s_aux", "kwargs")
        }

    def dense(**arguments: Any) -> Any:
        wants = arguments["return_lse"]
        results = library.module.mha_fwd(**options(arguments))
        return results[:2] if wants else results[0]

    def packed(**arguments: Any) -> Any:
        wants = arguments["return_lse"]
        results = library.module.mha_varlen_fwd(**options(arguments))
        return results[:2] if wants else results[0]

    for name, function in (("flash_attn_func", dense), ("flash_attn_varlen_func", packed)):
        setattr(module, name, as_recorded("aiter-flash-attn-ck", f"aiter_flash_attn_ck.mha:{name}")(function))
    return module
