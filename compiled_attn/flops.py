"""FLOP formulas of our operators, for ``torch.utils.flop_counter.FlopCounterMode``.

That module imports triton, where it is installed (0.4 s), so that ours cannot import it. The formulas are handed over
when somebody does: a counter copies the registry when it is made, and later would be too late.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def register(name: str, varlen: bool, backward: bool) -> None:
    """Tell PyTorch's counter what ``compiled_attn::<name>`` computes."""
    _formulas[name] = _formula(varlen, backward)
    if _COUNTER in sys.modules:
        _hand_over(importlib.import_module(_COUNTER), name)  # waits where another thread is importing it
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _hand_over(counter: ModuleType, name: str) -> None:
    operator = getattr(torch.ops.compiled_attn, name)
    if operator not in counter.flop_registry:
        counter.register_flop_formula(operator, get_raw=True)(_formulas[name])


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the counter as Python would, and hands the formulas over whenever its code has run.

    It stays: a reload empties the counter's registry, and who takes itself off the list while another thread imports
    makes that thread pass over a finder.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_hand_over(module: ModuleType) -> None:
            execute(module)
            for one in tuple(_formulas):
                _hand_over(module, one)

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
