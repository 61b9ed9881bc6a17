"""Checks of values: on demand, and inside the graph.

``set_checks(True)``, ``COMPILED_ATTN_CHECKS=1`` or ``DIFFUSERS_ATTN_CHECKS=yes`` adds an operator in front of every
attention call that reads its inputs (a device sync) and raises ValueError with all reasons. The operator has an
ORDERED effect: a plain operator without outputs would silently vanish from compiled graphs (torch 2.13).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from . import registry
from .operators import NAMESPACE, VERSION
from .spec import report

_TRUE = ("1", "on", "yes", "true")


def set_checks(enabled: bool) -> None:
    """Switch checks of values on or off, for the whole process; compiled models compile once more.

    Checked are: NaN or Inf in query, key or value; float masks of only 0 and 1 (a bool mask in the wrong dtype), NaN
    or +Inf in a float mask; cu_seqlens that do not start at 0, decrease, exceed the packed length or the maximum.

    >>> import compiled_attn
    >>> compiled_attn.set_checks(True)
    >>> compiled_attn.registry.checks_enabled
    True
    >>> compiled_attn.set_checks(False)
    """
    registry.checks_enabled = bool(enabled)


def _from_environment() -> bool:
    return any(
        os.environ.get(variable, "").lower() in _TRUE for variable in ("COMPILED_ATTN_CHECKS", "DIFFUSERS_ATTN_CHECKS")
    )


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Check the values of a dense call when it runs."""
    _dense_op(q, k, v, mask)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int) -> None:
    """Check the values of a varlen call when it runs."""
    _varlen_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k)


def _not_finite(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    found = []
    for name, tensor in (("query", q), ("key", k), ("value", v)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            found.append(f"{name} holds {bad} NaN or Inf among {tensor.numel()} values")
    return found


def _check_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    found = _not_finite(q, k, v)
    if mask is not None and mask.dtype != torch.bool and mask.numel() > 0:
        if bool(torch.isnan(mask).any()) or bool((mask == torch.inf).any()):
            found.append("attn_mask holds NaN or +Inf")
        elif bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 1).any()):
            found.append(
                "attn_mask is a float mask that holds only 0 and 1, which are *added* to the scores; for a mask "
                "of what to attend to give bool: mask.bool()"
            )
    if found:
        raise ValueError(report("attention was called with bad values:", found))


def _check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
) -> None:
    found = _not_finite(q, k, v)
    for name, lengths, total, most in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_q),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_k),
    ):
        starts = lengths.tolist()
        if starts[0] != 0:
            found.append(f"{name} starts with {starts[0]}, not 0")
        steps = [after - before for before, after in zip(starts, starts[1:], strict=False)]
        if min(steps) < 0:
            found.append(f"{name} decreases")
        if starts[-1] > total:
            found.append(f"{name} ends with {starts[-1]}, over the packed length {total}")
        if max(steps) > most:
            found.append(f"{name} has a sequence of {max(steps)}, over max_seqlen {most}")
    if found:
        raise ValueError(report("attention was called with bad values:", found))


def _define(name: str, schema: str, check: object) -> torch._ops.OpOverload:
    _library.define(f"{name}.{VERSION}{schema} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(f"{name}.{VERSION}", check, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}.{VERSION}"
    torch.library.register_fake(qualified, lambda *args: None, lib=_library)
    operator = getattr(getattr(torch.ops.compiled_attn, name), VERSION)
    _register_effectful_op(operator, _EffectType.ORDERED)
    return operator


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_dense_op = _define("check_values", "(Tensor q, Tensor k, Tensor v, Tensor? mask)", _check_dense)
_varlen_op = _define(
    "check_values_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k)",
    _check_varlen,
)
set_checks(_from_environment())
