"""torch_xla 2.9.0's Pallas flash attention on a CPU, by custom_kernel.py and JAX's TPU kernel, in float64.

(B, H, S, D); blocks must divide the lengths; causal aligns at the upper left; segments that differ get a score of
-0.7 of float32's largest number, so that a row which sees nothing gets the mean of all values.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from recorded import as_recorded
from torch import Tensor

MODULE = "torch_xla.experimental.custom_kernel"
MASK_VALUE = -0.7 * torch.finfo(torch.float32).max


class Library:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.guards = 0
        self.module = types.ModuleType(MODULE)
        self.module.requires_jax = self.requires_jax  # type: ignore[attr-defined]
        for name, function in (("fa_custom_forward", self.forward), ("fa_custom_backward", self.backward)):
            setattr(self.module, name, as_recorded("torch_xla", f"{MODULE}:{name}")(self._noted(name, function)))

    def requires_jax(self, function: Any) -> Any:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.guards += 1
            return function(*args, **kwargs)

        return guarded

    def _noted(self, name: str, function: Any) -> Any:
        def call(**arguments: Any) -> Any:
            self.calls.append(name)
            self.asked = arguments
            assert len(self.calls) == self.guards, "JAX was not guarded"
            assert arguments["ab"] is None
            assert arguments["partition_spec"] == arguments["mesh"] == "None"
            assert len(arguments["ctx_grad"]) == 10
            assert all(one.is_contiguous() for one in arguments.values() if isinstance(one, Tensor))
            return function(**arguments)

        return call

    def _scores(self, given: dict[str, Any]) -> Tensor:
        q, k, v = given["q"], given["k"], given["v"]
        assert q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape == v.shape and q.shape[-1] == k.shape[-1]
        assert q.shape[-1] <= 128 or q.shape[-1] % 128 == 0
        for length, blocks in ((q.shape[2], (512, 1024)), (k.shape[2], (256, 512))):
            assert all(length % min(block, length) == 0 for block in blocks), "a block does not divide the length"
        scores = q.double() @ k.double().transpose(-1, -2) * given["sm_scale"]
        q_ids, k_ids = given["q_segment_ids"], given["kv_segment_ids"]
        assert (q_ids is None) == (k_ids is None)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if given["causal"]:
            seen = seen.tril()
        if q_ids is not None:
            assert q_ids.dtype == k_ids.dtype == torch.int32
            assert q_ids.shape == (q.shape[0], q.shape[2]) and k_ids.shape == (k.shape[0], k.shape[2])
            seen = seen & (q_ids[:, None, :, None] == k_ids[:, None, None, :])
        return scores.masked_fill(~seen, MASK_VALUE)

    def forward(self, **given: Any) -> tuple[Any, ...]:
        scores = self._scores(given)
        highest = scores.amax(-1)
        weights = (scores - highest[..., None]).exp()
        total = weights.sum(-1)
        out = (weights @ given["v"].double() / total[..., None]).to(given["q"].dtype)
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        sums = (total.to(dtype), highest.to(dtype)) if any(given["ctx_grad"][:3]) else (None, None)
        return out, given["q"].clone(), given["k"].clone(), given["v"].clone(), *sums, None

    def backward(self, **given: Any) -> tuple[Any, ...]:
        q, k, v = given["q"], given["k"], given["v"]
        assert given["q_full_shape"] == list(q.shape) and given["kv_full_shape"] == list(k.shape)
        assert given["ab_full_shape"] is None and given["ctx_grad"][:3] == [True] * 3
        weights = (self._scores(given) - given["m"].double()[..., None]).exp() / given["l"].double()[..., None]
        assert weights.isfinite().all()
        upstream, out = given["grad_output"].double(), given["o"].double()
        dscores = weights * (upstream @ v.double().transpose(-1, -2) - (upstream * out).sum(-1, keepdim=True))
        dscores = dscores * given["sm_scale"]
        found = (dscores @ k.double(), dscores.transpose(-1, -2) @ q.double(), weights.transpose(-1, -2) @ upstream)
        return *(one.to(q.dtype) for one in found), None
