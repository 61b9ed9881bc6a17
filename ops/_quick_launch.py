"""Triton kernels launched from eager calls without what Triton asks at each launch.

For NVIDIA GPUs: Triton finds the compiled form by what :func:`_form` looks at, in 20 us and, where TMA descriptors are
among the arguments, in 0.1 ms and more. (On ROCm it also asks whether a tensor is larger than 2 GB.)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton_functions import has_triton


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current, and the one of before again afterwards; nothing to do, in a tenth of the time, if it is.

    Triton launches on the current device, and so do libraries in Python, whose launches have no guard: SageAttention
    1.0.6 launches there whatever q's device is, 2.x calls torch.cuda.set_device with q's and leaves it so,
    FlashAttention-4 asks the current one what it is.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _form(argument: Any) -> Any:
    """What Triton compiles in of an argument: dtype, alignment, the width of an integer."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        return -(1 << 31) <= argument < 1 << 31
    base = getattr(argument, "base", None)
    return type(argument) if base is None else base.dtype  # of a TensorDescriptor


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int,
    index: int | None,
) -> None:  # fmt: skip
    """``kernel`` on the current stream of the current device, ``index``; ``constants`` in the order of its parameters,
    which they end. Of kernels that are not specialised on any integer.
    """
    key = (kernel, index, warps, *map(_form, arguments), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = kernel[grid](*arguments, **constants, num_warps=warps)
        if compiled is not None:  # by Triton's interpreter it is
            _compiled[key] = compiled
        return
    compiled[grid](*arguments, *constants.values())


class Quick:
    """A library's ``triton.jit`` function, to be launched as that is: ``Quick(kernel)[grid](...)``.

    It may be specialised on integers: Triton compiles in which are 1, and which are multiples of 16. All parameters
    must be given, and the grid as numbers: the libraries that are taken in here do so.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._names = dict.fromkeys(kernel.arg_names)
        self._constant = [parameter.is_constexpr for parameter in kernel.params]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, *arguments: Any, **named: Any) -> None:
        given = {**self._names, **dict(zip(self._names, arguments, strict=False)), **named}
        values = [given.pop(name) for name in self._names]
        key = (
            torch.cuda.current_device(), *given.items(),  # num_warps and the like
            *(one if constant else _specialised(one) for one, constant in zip(values, self._constant, strict=True)),
        )  # fmt: skip
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.kernel[grid](*arguments, **named)
            return
        compiled[grid](*values)


def _specialised(argument: Any) -> Any:
    if type(argument) is int:
        return _form(argument), argument == 1, argument % 16 == 0
    return _form(argument)


def quickened(item: Any) -> Any:
    """A library's Triton kernel as :class:`Quick`, or a copy of its plain Python function that launches kernels so.

    The function's code stays the library's, and so does its module: the copy has globals of its own, in which kernels
    and functions of the same package are replaced. Anything else comes back as it is.
    """
    if torch.version.hip is not None or not has_triton():
        return item
    from triton.runtime.jit import JITFunction

    if isinstance(item, JITFunction):
        return Quick(item)
    if not inspect.isfunction(item) or hasattr(item, "__wrapped__"):
        return item
    scope, package = dict(item.__globals__), item.__module__.partition(".")[0]
    for name in item.__code__.co_names:
        used = scope.get(name)
        if isinstance(used, JITFunction) or (getattr(used, "__module__", None) or "").partition(".")[0] == package:
            scope[name] = quickened(used)
    copy = types.FunctionType(item.__code__, scope, item.__name__, item.__defaults__, item.__closure__)
    copy.__kwdefaults__ = item.__kwdefaults__
    return copy
