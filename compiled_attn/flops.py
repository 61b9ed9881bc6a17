"""FLOP formulas of our operators, for ``torch.utils.flop_counter.FlopCounterMode``.

That module imports triton, where it is installed (0.4 s), so that ours cannot import it. The formulas are handed over
when somebody does: a counter copies the registry when it is made, and later would be too late.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[str, Callable[..., int]]] = []


def register(name: str, varlen: bool, backward: bool) -> None:
    """Tell PyTorch's counter what ``compiled_attn::<name>`` computes."""
    _waiting.append((name, _formula(varlen, backward)))
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _hand_over(counter: ModuleType) -> None:
    while _waiting:
        name, formula = _waiting.pop()
        counter.register_flop_formula(getattr(torch.ops.compiled_attn, name), get_raw=True)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the counter as Python would, once, and hands the formulas over when its code has run."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_hand_over(module: ModuleType) -> None:
            execute(module)
            _hand_over(module)

        spec.loader.exec_module = execute_and_hand_over  # type: ignore[method-assign]
        return spec


def _formula(varlen: bool, backward: bool) -> Callable[..., int]:
    """2 FLOP for each multiply-add of the matrix products over every query/key pair.

    Forward: QK^T (D) and PV (Dv). Backward: QK^T, dQ, dK (D) and dP, dV (Dv), after the argument grad_out. Masks are
    not subtracted, as in ``torch.utils.flop_counter``.
    """
    first = 1 if backward else 0

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        q, k, v = args[first : first + 3]
        head_dim, value_dim = q.shape[-1], v.shape[-1]
        width = 3 * head_dim + 2 * value_dim if backward else head_dim + value_dim
        if not varlen:
            return 2 * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * width
        cu_seqlens_q, cu_seqlens_k = args[first + 3 : first + 5]
        pairs = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())
        return 2 * q.shape[1] * pairs * width

    return count
