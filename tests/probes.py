"""Twelve cheap opaque backends that say who ran: out = factor * value, and the gradient of value is factor * grad.

They are wrong as attention and right as instruments: a stale graph, a context seen by the wrong thread or a backward
that ran under another backend changes a number. Self-attention shapes only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Limits

# one more than torch's own recompile limit (8), with room
PROBES = tuple(f"probe_{number:02d}" for number in range(1, 13))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def factor(name: str) -> float:
    """What probe ``name`` multiplies value with: 1.0 for probe_01, 2.0 for probe_02 and so on."""
    return float(name.removeprefix("probe_"))


def _kernels(times: float) -> Kernels:
    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, None]:
        lse = q.new_zeros(*q.shape[:-3], q.shape[-2], q.shape[-3], dtype=torch.float32) if rest[-1] else None
        return v * times, lse, None  # type: ignore[return-value]

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        return torch.zeros_like(q), torch.zeros_like(k), grad * times, None

    return Kernels(forward, backward)


for _name in PROBES:
    _limits = (Limits(("cpu", "cuda"), DTYPES, gqa=False),)
    _both = _kernels(factor(_name))
    register_backend(Backend(_name, f"{factor(_name):g} times value", _limits, _both, _limits, _both))
