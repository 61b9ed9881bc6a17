"""Which tensors PyTorch thinks that each of our Triton kernels writes to; what it names is copied in compiled code.

A program of its own, as it gives Triton a driver for a GPU that is not here. Prints JSON: kernel, names.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
import triton
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from compiled_attn.ops import _triton_launch


class Driver(CudaDriver):
    """As much of a driver as a kernel's first stage of compilation asks for."""

    def __init__(self) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def written_to(kernel: Any, given: dict[str, Any]) -> list[str]:
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):  # torch 2.13
        accesses = triton_kernel_wrap.identify_accessed_tensors(kernel, given, {})
        return [access.name for access in accesses.read_writes.writes]
    return triton_kernel_wrap.identify_mutated_tensors(kernel, given, {})


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    found: dict[str, set[str]] = {}

    def record(self: Any, kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        names = inspect.signature(kernel.fn).parameters
        given = dict(zip(names, arguments, strict=False)) | {key: constants[key] for key in constants if key in names}
        found.setdefault(kernel.fn.__name__, set()).update(written_to(kernel, given))

    _triton_launch._Plan.launch = record  # type: ignore[method-assign]
    q, k, v, grad = torch.randn(4, 2, 40, 2, 64)
    keep, starts = torch.rand(2, 40) > 0.5, (torch.tensor([0, 10, 40], dtype=torch.int32),) * 2
    for inputs, padding, packed in (((q, k, v), keep, None), ((q[0], k[0], v[0]), None, starts)):
        out, lse = _triton_launch.forward(*inputs, None, padding, packed, 3, None, (4, 3), True)
        _triton_launch.backward(grad.view(*out.shape) if packed is None else grad[0], *inputs, None, padding, packed,
                                out, lse, 3, None, (4, 3))  # fmt: skip
    print(json.dumps({kernel: sorted(names) for kernel, names in found.items()}))


if __name__ == "__main__":
    main()
