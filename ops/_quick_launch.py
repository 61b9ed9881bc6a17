"""Triton kernels launched from eager calls without what Triton asks at each launch.

For NVIDIA GPUs and kernels that are not specialised on any integer: Triton then finds the compiled form by what
:func:`_form` looks at, in 0.1 ms and more where TMA descriptors are among the arguments. (On ROCm it also asks whether
a tensor is larger than 2 GB.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current, and the one of before again afterwards; nothing to do, in a tenth of the time, if it is.

    Triton launches on the current device, and so do libraries in Python, whose launches have no guard: SageAttention
    1.0.6 launches there whatever q's device is, 2.x calls torch.cuda.set_device with q's and leaves it so,
    FlashAttention-4 asks the current one what it is.
    """
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():  # there is a tensor: CUDA is initialised
        return _NOTHING
    return torch.cuda.device(device)


def capability_of(q: Tensor) -> tuple[int, int] | None:
    """Compute capability of q's device; None for one that has none."""
    return _capability(q.device.index) if q.is_cuda else None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


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
    index: int | None, paired: Callable[[str], bool] | None = None,
) -> bool:  # fmt: skip
    """``kernel`` on the current stream of the current device, ``index``; ``constants`` in the order of its parameters,
    which they end.

    ``paired``: ``grid`` counts clusters of two programs, for a kernel that deals with them in PTX of its own, while
    Triton compiles it for programs that are alone. Called with the PTX before it first runs; if it says no, nothing is
    launched, and the result is False.
    """
    key = (kernel, index, warps, *map(_form, arguments), *constants.values())
    compiled = _compiled.get(key)
    if compiled is None:
        if paired is None:
            compiled = kernel[grid](*arguments, **constants, num_warps=warps)
            if compiled is not None:  # by Triton's interpreter it is
                _compiled[key] = compiled
            return True
        from triton.compiler import make_backend

        compiled = kernel.warmup(*arguments, grid=grid, **constants, num_warps=warps)
        if not paired(compiled.asm["ptx"]):
            return False
        metadata = compiled.metadata._replace(num_ctas=2)
        compiled.packed_metadata = make_backend(metadata.target).pack_metadata(metadata)
        _compiled[key] = compiled
    compiled[grid](*arguments, *constants.values())
    return True
