"""`triton_hopper` and `triton_hopper_varlen`: our forward kernel for compute capability 9.0 (H100, H200), in Gluon.

Opaque operators: torch.compile calls the kernel, it cannot take it in (Inductor knows no Gluon). The backward is
`triton`'s, with its results.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from compiled_attn.operators import Kernels
from compiled_attn.packages import Package, Unfit, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import LOW_PRECISION, Call, Limits

from ._flash_common import padding_and_positions
from ._native_dense import Forward
from ._triton_functions import triton_backward, triton_forward, triton_varlen_backward, triton_varlen_forward

CAPABILITY = (9, 0)
MAX_HEAD_DIM = 256


def bind(module: Any) -> Any:
    """Our launcher, if Triton's Gluon is the one it was written for (3.6 to 3.8 are); Unfit otherwise."""
    try:
        _require_gluon(module)
    except Unfit as lacking:
        raise Unfit(f"{lacking}; the kernel is written for triton 3.6 to 3.8, use backend 'triton'") from None
    return importlib.import_module("._hopper_launch", __package__)


def _require_gluon(module: Any) -> None:
    language = importlib.import_module("triton.experimental.gluon.language")
    require(language, "warp_specialize", "functions_and_args", "worker_num_warps", "worker_num_regs")
    require(language, "NVMMASharedLayout.get_default_for")
    require(module, "warpgroup_mma", "use_acc", "is_async")
    require(module, "warpgroup_mma_wait", "num_outstanding", "deps")
    require(module, "fence_async_shared")
    require(module, "mbarrier.arrive", "count")
    require(module, "mbarrier.wait", "phase")
    require(module, "tma.async_copy_global_to_shared", "tensor_desc", "coord", "barrier", "result", "pred")
    require(module, "tma.async_copy_shared_to_global", "tensor_desc", "coord", "src")
    require(module, "tma.store_wait", "pendings")
    host = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    require(host, "TensorDescriptor", "base", "shape", "strides", "block_shape", "layout")


PACKAGE = Package(
    "triton.experimental.gluon.language.nvidia.hopper", "triton",
    install="pip install 'triton>=3.6,<3.9' (PyTorch's wheels for Linux bring it from 2.10 to 2.14)", bind=bind,
)  # fmt: skip


def hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    if q.device.type == "meta":
        return triton_forward(q, k, v, None, key_padding, 0.0, causal, scale, gqa, window, return_lse=return_lse)
    return *PACKAGE.load().forward(q, k, v, key_padding, None, causal, scale, window, return_lse), None


def hopper_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    """Nothing depends on the maxima: the plan of tiles is made on the device."""
    starts = (cu_seqlens_q, cu_seqlens_k)
    if q.device.type == "meta":
        return triton_varlen_forward(
            q, k, v, *starts, max_seqlen_q, max_seqlen_k, 0.0, causal, scale, gqa, window, return_lse=return_lse
        )
    return *PACKAGE.load().forward(q, k, v, None, starts, causal, scale, window, return_lse), None


def not_rocm(call: Call) -> str | None:
    """A rule for Limits: a gfx90a says compute capability (9, 0) too."""
    if call.devices[0] == "cuda" and torch.version.hip is not None:
        return "is written for NVIDIA's compute capability (9, 0), not for ROCm; use backend 'triton'"
    return None


def unavailable() -> list[str]:
    """Reasons why no GPU of this process can run the kernel."""
    if not torch.cuda.is_available():
        return []
    if torch.version.hip is not None:
        return ["needs an NVIDIA GPU of compute capability (9, 0), this is ROCm"]
    seen = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if CAPABILITY not in seen:
        return [f"needs a GPU of compute capability {CAPABILITY} (H100, H200), there are {sorted(seen)}"]
    return []


def fastest(call: Call) -> bool:
    """Where docs/triton_hopper.md has no faster forward without a kernel library: not for training, whose backward is
    the portable one, nor under positions, measured too little.
    """
    return (
        call.capability == CAPABILITY
        and (64 <= call.query[-1] <= 128 or call.query[-1] == 256)
        and not call.causal
        and call.window is None
        and not call.gradient
    )


LIMITS = Limits(
    ("cuda",), tuple(reversed(LOW_PRECISION)), capabilities=(CAPABILITY,), max_head_dim=MAX_HEAD_DIM,
    head_dim_multiple=8, masks=("none", "key_padding"), window=True, also=(not_rocm, padding_and_positions),
)  # fmt: skip
VARLEN_LIMITS = Limits(
    ("cuda",), LIMITS.dtypes, capabilities=(CAPABILITY,), max_head_dim=MAX_HEAD_DIM, head_dim_multiple=8, window=True,
    also=(not_rocm,),
)  # fmt: skip

DENSE = Kernels(hopper_forward, triton_backward)
VARLEN = Kernels(hopper_varlen_forward, triton_varlen_backward)

register_backend(
    Backend(
        "triton_hopper_varlen",
        "our Gluon forward for H100 and H200, packed sequences; opaque to compilers",
        family="ours",
        limits=(LIMITS,),
        dense=DENSE,
        varlen_limits=(VARLEN_LIMITS,),
        varlen=VARLEN,
        packages=(PACKAGE,),
        available=unavailable,
        fastest=fastest,
        packed=True,
    )
)
register_backend(
    Backend(
        "triton_hopper",
        "our Gluon forward for H100 and H200; opaque to compilers",
        family="ours",
        limits=(LIMITS,),
        dense=DENSE,
        packages=(PACKAGE,),
        available=unavailable,
        fastest=fastest,
        partner="triton_hopper_varlen",
    )
)
