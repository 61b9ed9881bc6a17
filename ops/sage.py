"""SageAttention: Q and K rounded to int8, P and V to float16 or fp8. Inference only.

`sage` is the library's own choice of kernel, `sage_varlen` its packed kernels, the four others one kernel each. What a
release has is found by signature when it is loaded (`_sage_library.py`), so that 1.0.6, 2.x and builds from the Hub
take one way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiled_attn.packages import Package
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import LOW_PRECISION, Call, Limits

from ._sage_kernels import kernels, too_large, varlen_as_dense, varlen_kernels
from ._sage_library import INSTALL, TRITON_ENTRY, Facts, bind_dense, bind_packed, bind_pinned


def _offsets(call: Call) -> str | None:
    """Its kernels count elements in 32 bits."""
    if call.compiling:
        return None  # of dynamic sizes it would become a bound in the graph; the kernels look again
    found = too_large(call.query, call.key, call.mask in ("bool", "float"))
    return "; ".join(found) if found else None


def _padding_and_causal(call: Call) -> str | None:
    """Key padding and causal do not compose: packing moves the keys, and the Triton kernel takes one of the two."""
    if call.causal and call.mask == "key_padding":
        return "takes key padding or is_causal, not both"
    return None


def _sizes_on_12(call: Call) -> str | None:
    """fp8 kernels on 12.x give noise somewhere between 154k and 167k tokens."""
    if call.capability is not None and call.capability[0] == 12 and call.key[-3] > 154_000:
        return f"returns noise for {call.key[-3]} keys on capability 12.x (thu-ml/SageAttention#388); 154000 are right"
    return None


def _not_on_12(call: Call) -> str | None:
    """Not usable on compute capability 12.x."""
    if call.capability is not None and call.capability[0] == 12:
        return f"does not run on compute capability {call.capability} (Comfy-Org/ComfyUI#15263); use 'sage'"
    return None


def _triton_padding_on_12(call: Call) -> str | None:
    """Key padding goes through its Triton kernels, which are not usable on 12.x."""
    return _not_on_12(call) if call.mask == "key_padding" else None


def _release(facts: Facts, masked_entry: bool = False) -> Callable[[Call], str | None]:
    def rule(call: Call) -> str | None:
        """What the loaded release lacks: lse, a mask, packed kernels, or its fix for Hopper."""
        found = facts.reasons(call.capability, call.lse, call.mask, masked_entry)
        return "; ".join(found) if found else None

    return rule


def limits(*rules: Callable[[Call], str | None], **changes: Any) -> Limits:
    """What all of them share: causal for Sq == Sk only, no gradient, 32-bit offsets."""
    settings: dict[str, Any] = {
        "min_capability": None if "capabilities" in changes else (8, 0), "max_head_dim": 128, "alignments": (),
        "gradient": False, "rounding": INT8, **changes,
    }  # fmt: skip
    return Limits(("cuda",), LOW_PRECISION, also=(_offsets, *rules), **settings)


def dense_limits(facts: Facts, *rules: Callable[[Call], str | None], **changes: Any) -> Limits:
    """Limits of ``sageattn`` where ``facts`` are bound with it."""
    return limits(_release(facts), _sizes_on_12, *rules, **{"rounding": FP8, **changes})


KEY_PADDING = ("none", "key_padding")
# Errors as a share of the root mean square of out, twice what arithmetic says: Q and K in int8, a scale for each block,
# give 1.2 % (measured, tests/test_sage.py); P and V in fp8 (3 bits of mantissa) 2.6 % each beside that.
INT8, FP8 = 0.02, 0.08
PACKED = Package("sageattention", "sageattention", "1.0.6", INSTALL, bind_packed)
_FACTS = Facts()
SAGE = Package("sageattention", "sageattention", "1.0.6", INSTALL, lambda module: bind_dense(module, _FACTS))

register_backend(
    Backend(
        "sage_varlen",
        "SageAttention's packed kernels: int8 QK^T, float16 PV, in Triton",
        family="SageAttention",
        packages=(PACKED,),
        limits=(limits(_padding_and_causal, _not_on_12, masks=KEY_PADDING, lse=False),),
        dense=varlen_as_dense(PACKED),
        varlen_limits=(limits(_not_on_12, lse=False),),
        varlen=varlen_kernels(PACKED),
        packed=True,
    )
)
register_backend(
    Backend(
        "sage",
        "SageAttention's choice of kernel for the GPU: int8 QK^T, fp8 or float16 PV",
        family="SageAttention",
        packages=(SAGE,),
        limits=(dense_limits(_FACTS, _padding_and_causal, _triton_padding_on_12, masks=KEY_PADDING),),
        dense=kernels(SAGE, "sage"),
        partner="sage_varlen",
    )
)


# setup.py of every release until December 2025 knows these and no other
_BUILT: tuple[tuple[int, int | None], ...] = ((8, None), (9, 0), (10, None), (12, None))


def _register_pinned(name: str, summary: str, *rules: Callable[[Call], str | None], **changes: Any) -> None:
    """One kernel of the library, pinned: ``_sage_<kernel>`` is the library's ``sageattn_<kernel>``."""
    entry = "sageattn" + name.removeprefix("_sage")
    masked = entry == TRITON_ENTRY
    facts = Facts()
    package = Package(
        "sageattention", "sageattention", "2.0", INSTALL, lambda module: bind_pinned(module, facts, entry)
    )  # fmt: skip
    register_backend(
        Backend(
            name,
            summary,
            family="SageAttention",
            packages=(package,),
            limits=(limits(_release(facts, masked), *rules, **{"verified": "contract", **changes}),),
            dense=kernels(package, name, masked),
        )
    )


_register_pinned(
    "_sage_qk_int8_pv_fp8_cuda",
    "SageAttention, pinned: int8 QK^T, fp8 PV",
    _sizes_on_12,
    capabilities=((8, 9), *_BUILT[1:]),
    rounding=FP8,
)
_register_pinned(
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "SageAttention, pinned: int8 QK^T, fp8 PV, for Hopper",
    capabilities=((9, 0),),
    rounding=FP8,
)
_register_pinned(
    "_sage_qk_int8_pv_fp16_cuda",
    "SageAttention, pinned: int8 QK^T, float16 PV",
    _not_on_12,
    capabilities=_BUILT,
)
_register_pinned(
    "_sage_qk_int8_pv_fp16_triton",
    "SageAttention, pinned: int8 QK^T, float16 PV, in Triton; takes masks",
    _not_on_12,
    _padding_and_causal,
    masks=("none", "key_padding", "bool", "float"),
)
