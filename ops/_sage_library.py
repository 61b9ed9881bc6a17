"""What a release of SageAttention offers, found by signature when it is loaded."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from compiled_attn.packages import Unfit, accepts, require

INSTALL = "pip install sageattention gives 1.0.6; for 2.x, pip install git+https://github.com/thu-ml/SageAttention"
LACKING = (
    "this build of sageattention lacks, or cannot load: build it on this machine, or with its capability in "
    "TORCH_CUDA_ARCH_LIST"
)
TRITON_ENTRY = "sageattn_qk_int8_pv_fp16_triton"
# Rows of Q and keys that share one scale; the attention kernels of every release have them as constants.
BLOCK_Q, BLOCK_K = 128, 64
WIDTHS = (64, 128)
# What sageattn of 2.x chooses; for the rest it takes its Triton kernel, which is always there.
_CHOSEN = {
    (8, 0): "sageattn_qk_int8_pv_fp16_cuda",
    (8, 9): "sageattn_qk_int8_pv_fp8_cuda",
    (9, 0): "sageattn_qk_int8_pv_fp8_cuda_sm90",
    (12, 0): "sageattn_qk_int8_pv_fp8_cuda",
    (12, 1): "sageattn_qk_int8_pv_fp8_cuda",
}


@dataclasses.dataclass
class Facts:
    """What the rules need to know about a release. Until one is loaded: what the newest can do."""

    lse: bool = True
    mask: bool = True
    packs: bool = True
    on_hopper: str = ""
    chooses_for: tuple[tuple[int, int], ...] = ()  # capabilities; () if the entry does not choose by them
    not_built: tuple[tuple[int, int], ...] = ()  # capabilities whose kernels this build lacks

    def reasons(
        self, capability: tuple[int, int] | None, return_lse: bool, mask: str, masked_entry: bool = False
    ) -> list[str]:
        """Why this release cannot serve such a call; empty when it can."""
        found = []
        if return_lse and not self.lse:
            found.append("returns no lse in this release; sageattention 2.x does")
        elif return_lse and mask == "key_padding" and not masked_entry:
            found.append("returns no lse with a key-padding mask: the library's packed kernels have none")
        if mask != "none" and masked_entry and not self.mask:
            found.append("takes no mask in this release; sageattention 2.2 does")
        if mask == "key_padding" and not masked_entry and not self.packs:
            found.append("takes no key-padding mask: this build has no packed kernels")
        if self.on_hopper and capability == (9, 0):
            found.append(self.on_hopper)
        chooses = self.chooses_for and mask == "none"  # key padding goes to the packed kernels, whatever the GPU
        if mask == "none" and capability in self.not_built:
            found.append(f"chooses a kernel for compute capability {capability} that {LACKING}")
        if chooses and capability is not None and capability not in self.chooses_for:
            found.append(
                f"chooses no kernel for compute capability {capability} in this release, only for {self.chooses_for}; "
                "use a pinned one, '_sage_...'"
            )
        return found


class Dense(NamedTuple):
    """One dense entry of the library, and how it wants to be called."""

    entry: Callable[..., Any]
    facts: Facts
    packed: Packed | None
    blocks: Blocks | None
    counts_padding: bool
    takes_smooth_k: bool
    per_warp_on_12: bool
    triton_for: tuple[tuple[int, int], ...] | None  # capabilities whose calls go to its Triton kernels; None: all

    def by_triton(self, capability: tuple[int, int] | None) -> bool:
        """Whether a call on a GPU of ``capability`` goes to its Triton kernels."""
        return self.triton_for is None or capability in self.triton_for


class Blocks(NamedTuple):
    """The kernels below ``sageattn`` of 1.x: int8 Q and K with their scales, float16 V."""

    full: Callable[..., Tensor]
    causal: Callable[..., Tensor]


class Packed(NamedTuple):
    """The kernels below ``sageattn_varlen``."""

    full: Callable[..., Tensor]
    causal: Callable[..., Tensor]
    counts_padding: bool


def bind_dense(module: Any, facts: Facts) -> Dense:
    """``sageattn``, the library's own choice of kernel."""
    entry = require(module, "sageattn", "q", "k", "v", "tensor_layout", "is_causal", "sm_scale")
    first = not accepts(entry, "return_lse")  # 1.x
    blocks = None
    if first:
        arguments = ("q", "k", "v", "q_scale", "k_scale", "tensor_layout", "output_dtype")
        blocks = Blocks(*(require(module, f"core.attn_{causal}", *arguments) for causal in ("false", "true")))
    packed = None
    facts.packs = getattr(module, "sageattn_varlen", None) is not None
    if facts.packs:
        packed = bind_packed(module)
    facts.lse = not first
    facts.on_hopper = _fault_on_hopper(module)
    facts.chooses_for = _architectures(entry)
    chosen = {of: getattr(module, name, None) for of, name in _CHOSEN.items() if of in facts.chooses_for}
    facts.not_built = tuple(of for of, kernel in chosen.items() if kernel is not None and not _built(kernel))
    return Dense(
        entry, facts, packed, blocks,
        counts_padding=_counts_padding(module),
        takes_smooth_k=accepts(entry, "smooth_k"),
        per_warp_on_12=False,
        triton_for=tuple(of for of in facts.chooses_for if of not in _CHOSEN),
    )  # fmt: skip


def bind_pinned(module: Any, facts: Facts, name: str) -> Dense:
    """The entry called ``name``, which 2.0 brought."""
    if getattr(module, name, None) is None:
        raise Unfit(f"has no {name}, which came with 2.0; {INSTALL}")
    entry = require(
        module, name, "q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "smooth_k", "return_lse"
    )  # fmt: skip
    if not _built(entry):
        raise Unfit(f"has a {name} whose extension {LACKING}")
    facts.mask = accepts(entry, "attn_mask")
    facts.on_hopper = _fault_on_hopper(module) if name.endswith("_sm90") else ""
    return Dense(
        entry, facts, None, None,
        counts_padding=name == TRITON_ENTRY and _counts_padding(module),
        takes_smooth_k=True,
        per_warp_on_12=name == "sageattn_qk_int8_pv_fp8_cuda",
        triton_for=None if name == TRITON_ENTRY else (),
    )  # fmt: skip


def bind_packed(module: Any) -> Packed:
    """The kernels that ``sageattn_varlen`` launches."""
    require(module, "sageattn_varlen", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "smooth_k")
    arguments = (
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "q_scale", "k_scale", "cu_seqlens_q_scale",
        "cu_seqlens_k_scale", "output_dtype",
    )  # fmt: skip
    full = require(module, "core.attn_false_varlen", *arguments)
    causal = require(module, "core.attn_true_varlen", *arguments)
    for name in ("per_block_int8_varlen_triton", "per_block_int8_varlen"):  # 2.x, 1.x
        around = getattr(module.core, name, None)
        if around is not None:
            break
    else:
        raise Unfit("has no per_block_int8_varlen, which says how many rows share a scale")
    blocks = tuple(inspect.signature(around).parameters[side].default for side in ("BLKQ", "BLKK"))
    if blocks != (BLOCK_Q, BLOCK_K):
        raise Unfit(f"quantises blocks of {blocks} rows, not {(BLOCK_Q, BLOCK_K)}")
    return Packed(full, causal, _counts_padding(module))


def _counts_padding(module: Any) -> bool:
    """Whether the Triton kernels give the keys that fill the last block of 64 a score of 0 instead of -inf.

    Releases before 2.2 do, for other than causal calls: with 33 keys the result is off by 0.4. The fix came together
    with the mask argument (August 2025). Builds from the Hub have no Triton kernels.
    """
    if not accepts(module.sageattn, "return_lse"):
        return True
    entry = getattr(module, TRITON_ENTRY, None)
    return entry is not None and not accepts(entry, "attn_mask")


def _architectures(entry: Any) -> tuple[tuple[int, int], ...]:
    """What ``sageattn`` of 2.x compares the GPU with ("sm89") before it raises ValueError; no signature says it."""
    code = getattr(inspect.unwrap(entry), "__code__", None)
    found = []
    for constant in getattr(code, "co_consts", ()):
        members = constant if isinstance(constant, (tuple, frozenset)) else (constant,)  # of == and of in
        found += [one for one in members if isinstance(one, str) and re.fullmatch(r"sm\d\d+", one)]
    return tuple(sorted((int(one[2:-1]), int(one[-1])) for one in found))


def _built(entry: Any) -> bool:
    """Whether the CUDA extension of a 2.x entry is there.

    An import that fails sets SM80_ENABLED, SM89_ENABLED or SM90_ENABLED to False and is forgotten; the entry asserts
    its own when it is called.
    """
    function = inspect.unwrap(entry)
    read = getattr(getattr(function, "__code__", None), "co_names", ())
    return all(function.__globals__.get(name, True) for name in read if re.fullmatch(r"SM\d+_ENABLED", name))


def _fault_on_hopper(module: Any) -> str:
    """2.2.0 as released: its fake has the operator's name, core.py calls that, and nothing ever fills the output."""
    operator = getattr(
        getattr(module, "sm90_compile", None), "qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf", None
    )
    if not inspect.isfunction(operator):  # a CustomOpDef, or a release without these operators
        return ""
    return "returns uninitialised memory on compute capability (9, 0): it lacks thu-ml/SageAttention#307; " + INSTALL
