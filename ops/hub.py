"""Kernels of the Hugging Face Hub, each behind an operator of ours: a graph never names a build's own operators.

See docs/hub.md. The kernels are those of the files beside this one; only where the library comes from differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Call

from . import _flash_common, _sage_blackwell, aiter, flash2, flash3, flash4, sage
from ._hub_kernel import MINIMUM, HubKernel, Loaded
from ._sage_kernels import kernels as sage_kernels
from ._sage_library import Facts, bind_dense

Rule = Callable[[Call], str | None]
INSTALL = f"pip install 'kernels>={MINIMUM}'"


def hub_kernel(repo: str, pinned: int, bind: Callable[[Any], Any] | None = None) -> HubKernel:
    """Version ``pinned`` of ``repo``, as :class:`compiled_attn.packages.Package` of a backend."""
    return HubKernel("kernels", "kernels", MINIMUM, INSTALL, bind, repo, pinned)


def _register_flash(
    library: Any, summary: str, package: HubKernel, name: str, packed_name: str | None, *rules: Rule
) -> None:
    """FlashAttention of one generation: ``library`` is the file with its glue, ``rules`` are the build's own."""
    dense, packed_dense, varlen = _flash_common.kernels(Loaded(package), library.LIMITS.dropout)
    limits, varlen_limits = (
        replace(one, verified="contract", also=(*one.also, *rules)) for one in (library.LIMITS, library.VARLEN_LIMITS)
    )
    shared: dict[str, Any] = {"family": "FlashAttention", "limits": (limits,), "packages": (package,)}
    own_varlen: dict[str, Any] = {"varlen_limits": (varlen_limits,), "varlen": varlen}
    if packed_name is not None:
        register_backend(
            Backend(
                packed_name, f"{summary} on packed sequences, from the Hub", dense=packed_dense, packed=True,
                **own_varlen, **shared,
            )
        )  # fmt: skip
        own_varlen = {"partner": packed_name}
    register_backend(Backend(name, f"{summary}, from the Hub", dense=dense, **own_varlen, **shared))


def _beta_8(call: Call) -> str | None:
    """Version 0 of the Hub's FlashAttention-4 is its beta 8."""
    if call.capability is not None and call.capability[0] in (10, 11) and call.query[-1] > 128:
        return f"takes head_dim up to 128 on compute capability {call.capability}, not {call.query[-1]}"
    return None


FLASH2 = hub_kernel("kernels-community/flash-attn2", 3, flash2.bind)
FLASH3 = hub_kernel("kernels-community/flash-attn3", 1, flash3.bind)
FLASH4 = hub_kernel("kernels-community/flash-attn4", 0, flash4.bind)
_register_flash(flash2, "FlashAttention-2", FLASH2, "flash_hub", "flash_varlen_hub")
_register_flash(flash3, "FlashAttention-3", FLASH3, "_flash_3_hub", "_flash_3_varlen_hub")
_register_flash(flash4, "FlashAttention-4", FLASH4, "flash_4_hub", None, _beta_8)


_facts = Facts()
SAGE = hub_kernel("SageAttention/sage-attention", 3, lambda module: bind_dense(module, _facts))
register_backend(
    Backend(
        "sage_hub",
        "SageAttention's choice of kernel for the GPU, from the Hub",
        family="SageAttention",
        # its build has no packed kernels, so no key-padding masks; its Python chooses among kernels for these
        limits=(sage.dense_limits(_facts, capabilities=((8, 0), (8, 9), (9, 0), (12, 0)), verified="contract"),),
        dense=sage_kernels(Loaded(SAGE), "sage_hub"),
        packages=(SAGE,),
    )
)

SAGE_BLACKWELL = hub_kernel("SageAttention/sage-blackwell", 1, _sage_blackwell.bind)
register_backend(
    Backend(
        "sage_blackwell_hub",
        "SageAttention 3 for compute capability 12.x: FP4 products, from the Hub",
        family="SageAttention",
        limits=(
            sage.limits(
                capabilities=_sage_blackwell.CAPABILITIES, gqa=False, lse=False, verified="contract",
                rounding=_sage_blackwell.FP4,
            ),
        ),
        dense=_sage_blackwell.kernels(Loaded(SAGE_BLACKWELL)),
        packages=(SAGE_BLACKWELL,),
    )
)  # fmt: skip

AITER = hub_kernel("kernels-community/aiter-flash-attn-ck", 1, aiter.AiterForward)
_dense, _varlen = aiter.hub_kernels(Loaded(AITER))
register_backend(
    Backend(
        "aiter_fa2_hub",
        "AITER's FlashAttention-2 for ROCm (Composable Kernel), from the Hub",
        family="AITER",
        limits=(aiter.HUB_LIMITS,),
        dense=_dense,
        varlen_limits=(aiter.HUB_VARLEN_LIMITS,),
        varlen=_varlen,
        packages=(AITER,),
        available=functools.partial(aiter.unsuitable, aiter.HUB_BUILDS),
    )
)
