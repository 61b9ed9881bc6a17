"""Eager calls that reach their kernel without the operator.

An operator with a Python kernel is 10 to 20 us of an eager call (torch 2.13, CPU). What it adds, beside being seen, is
autograd, and what the dispatcher does to tensors and numbers on the way. Where a call needs none of that, and nothing
is in force that would see the operator, :func:`run` does what the operator would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.profiler
from torch import Tensor

# looked up once: looking a name up takes longer than the call
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms = torch._C._are_functorch_transforms_active
_profiler_here = torch.autograd._profiler_enabled
_profiler = torch.autograd.profiler  # its flag is true in the other threads too
_jit_trace = torch._C._get_tracing_state
_forward_ad = torch.autograd.forward_ad
_below_autograd = torch._C._AutoDispatchBelowAutograd


def unseen(query: Tensor, key: Tensor, value: Tensor, one: Tensor | None, other: Tensor | None) -> bool:
    """Whether nothing would see the operator: no mode, transform, trace, profiler or subclass; and the dispatcher would
    not change a tensor, as it does where one only says that it is negative. ``one`` and ``other`` are masks or lengths.

    >>> import torch
    >>> x = torch.zeros(1, 3, 2, 8)
    >>> unseen(x, x, x, None, None)
    True
    >>> with torch.profiler.profile():
    ...     unseen(x, x, x, None, None)
    False
    """
    return (
        type(query) is type(key) is type(value) is Tensor
        and (one is None or (type(one) is Tensor and not one.is_neg()))
        and (other is None or type(other) is Tensor)
        and not (query.is_meta or query.is_neg() or key.is_neg() or value.is_neg())
        and not (_dispatch_modes() or _function_modes() or _transforms() or _profiler_here())
        and not _profiler._is_profiler_enabled
        and _forward_ad._current_level < 0
        and _jit_trace() is None
    )


def plain(dropout_p: Any, scale: Any, gqa: Any, window: Any, deterministic: Any) -> bool:
    """Whether the dispatcher would leave the options as they are: it makes a float of numpy's, of a tensor and of 1.

    >>> plain(0.0, 0.5, False, None, False), plain(0.0, 1, False, None, False)
    (True, False)
    """
    return (
        type(dropout_p) is float
        and (scale is None or type(scale) is float)
        and type(gqa) is type(deterministic) is bool
        and (window is None or type(window[0]) is type(window[1]) is int)
    )


def run(forward: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
    """out and lse of a kernel's ``forward``, contiguous; in place of an lse that was not asked for, out.

    Below autograd, as in an operator: what the kernel compiles for itself is guarded on that.
    """
    with _below_autograd():
        out, lse, _ = forward(*args)
        out = out.contiguous()
        return out, lse.contiguous() if args[-1] else out
