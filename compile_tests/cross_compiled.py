"""Compiles the Triton kernels, as shipped, for GPUs that are not here, and prints what ptxas made of them.

A program of its own: ``python cross_compiled.py sm_80,sm_90 64,128 plain,packed`` prints one JSON object, case to
findings; a fourth argument names the kernels (``hopper``: the Gluon one; ``helpers``: what packs and rounds for other
libraries, in all its variants). No GPU is needed: triton brings ptxas and cuobjdump, and LLVM for AMD.
"""

from __future__ import annotations

import collections
import inspect
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from compiled_attn.ops import _hopper_launch, _packing_kernels, _sage_rounding, _triton_launch
from compiled_attn.ops._triton_configs import KINDS, Config, choose, parts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "forward": _triton_launch.attention_forward,
    "dq": _triton_launch.attention_dq,
    "dkv": _triton_launch.attention_dkv,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"RIGHT": True},
    "packed": {"VARLEN": True},
    "gather": {"GATHER": True},
    "window": {"LEFT": True, "RIGHT": True},
    "bool": {"MASK": 1},
}
HOPPER: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"RIGHT": True},
    "packed": {"VARLEN": True},
    "listed": {"LISTED": True},
    "alone": {},
    "alone_listed": {"LISTED": True},
    "window": {"LEFT": True, "RIGHT": True, "LOWER_RIGHT": True, "VARLEN": True},
}
# Kernels that serve other libraries, and what they are compiled for beside the width
HELPERS: list[tuple[Any, dict[str, Any], int]] = [
    (_packing_kernels.place_keys, {"BLOCK": 4096}, 16),
    (_packing_kernels.pack_rows, {"UNIT": 8, "BLOCK": 64}, 4),
    (_sage_rounding.round_dense, {"UNIT": 8, "BLOCK_Q": 128, "BLOCK_K": 64}, 8),
    (_sage_rounding.round_packed, {"UNIT": 8, "BLOCK_Q": 128, "BLOCK_K": 64, "GATHER": True}, 8),
    (_sage_rounding.round_packed, {"UNIT": 1, "BLOCK_Q": 128, "BLOCK_K": 64, "GATHER": False}, 8),
    (_sage_rounding.sum_keys, {"UNIT": 8, "ROWS": 256, "BLOCK": 64}, 4),
]
POINTERS = {
    "Keep": "*i1", "Q8": "*i8", "K8": "*i8", "V16": "*fp16", "Mean": "*fp32", "Sums": "*fp32", "ScaleQ": "*fp32",
    "ScaleK": "*fp32", "BlocksQ": "*i64", "BlocksK": "*i64",
}  # fmt: skip
ROWS_OF = ("Q", "K", "V", "PackedK", "PackedV")
FLAGS = ("LEFT", "RIGHT", "LOWER_RIGHT", "GATHER", "VARLEN")
TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kind: str, target: str, head_dim: int, variant: str) -> tuple[Any, Config]:
    """The kernel in the configuration shipped for bfloat16, specialised as the launcher's arguments are."""
    kernel, more = KERNELS[kind], VARIANTS[variant]
    masked = "MASK" in more or "LEFT" in more
    config = choose(kind, target, head_dim, torch.bfloat16, masked)
    first, second = parts(head_dim)
    constants: dict[str, Any] = {
        "GROUP": 1, "D": head_dim, "A": first, "B": second, "UNIT": 8, "MASK": 0, **dict.fromkeys(FLAGS, False), **more,
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "STAGES": config.stages, "mask_k": int("MASK" in more),
    }  # fmt: skip
    if kind == "forward":
        constants["LSE"] = True
    if not constants["mask_k"]:
        del constants["mask_k"]
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        pointer = name[0].isupper()
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("Lse", "Rows"):
            signature[name] = "*fp32"
        elif name in ("Order", "Rank", "StartsQ", "StartsK"):
            signature[name] = "*i32"
        elif name == "Mask" and constants["MASK"] == 1:
            signature[name] = "*i1"
        elif pointer:
            signature[name] = "*bf16"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name not in constants and (pointer or name == "mask_q"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return triton.compile(source, target=TARGETS[target], options=options), config


def hopper(head_dim: int, variant: str) -> tuple[Any, Any]:
    """The Gluon kernel in the configuration shipped, with the descriptors that its launcher makes; dense calls in
    pairs, if there are any, unless they are ``alone``.
    """
    kernel, more = _hopper_launch.hopper_forward, HOPPER[variant]
    alone = "VARLEN" in more or variant.startswith("alone")
    config = _hopper_launch.choose(head_dim, "RIGHT" in more or "LEFT" in more, alone)
    width = _hopper_launch.width_of(head_dim)
    flags = ("LEFT", "RIGHT", "LOWER_RIGHT", "VARLEN", "LISTED")
    constants: dict[str, Any] = {
        "GROUP": 1, **dict.fromkeys(flags, False), "LSE": True, **config.constants(), **more, "WIDTH": width,
    }  # fmt: skip
    if not constants["LISTED"]:
        constants.update(k_copies=None, v_copies=None)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith(("_rows", "_copies")):
            rows = config.block_k if name[0] in "kv" else _hopper_launch.ROWS
            signature[name] = f"tensordesc<bf16[1, 1, 1, {rows}, {width}],{_hopper_launch.layout(width)!r}>"
        elif name[0].isupper():
            signature[name] = "*fp32" if name == "Lse" else "*i32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = GluonASTSource(kernel, signature, constants, {})
    return triton.compile(source, target=TARGETS["sm_90"], options={"num_warps": 4}), config


def helper(kernel: Any, more: dict[str, Any], warps: int, head_dim: int, target: str) -> Any:
    """One of HELPERS, for bfloat16 rows that start at multiples of 16 bytes."""
    width = triton.next_power_of_2(head_dim)
    widths = {"D": head_dim, "D_K": head_dim, "D_V": head_dim, "WIDTH": width, "WIDTH_K": width, "WIDTH_V": width}
    constants = {**more, **{name: value for name, value in widths.items() if name in kernel.arg_names}}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name[0].isupper():
            signature[name] = "*bf16" if name in ROWS_OF else POINTERS.get(name, "*i32")
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": warps})


def beside_the_product(code: str) -> list[tuple[int, int]]:
    """Of each stretch of machine code in which only the product with the values is in flight: steps of the row maxima,
    and accesses to spilled registers. ptxas 12.8 moves the wait for that product up if it may.
    """
    stretches = re.findall(r"DEPBAR\.LE gsb0, 0x1\b(.*?)DEPBAR\.LE gsb0, 0x0\b", code, re.S)
    return [(one.count("FMNMX"), len(re.findall(r"\b(?:LDL|STL)\b", one))) for one in stretches]


def barriers(code: str) -> dict[str, int]:
    """How often each named barrier is waited at and arrived at: 8 to 10 for turns at the tensor cores, "slot" those
    whose number is computed, lower ones are Triton's own. LLVM does not know that the inline PTX of a barrier may
    neither be doubled nor moved into a branch.
    """
    found = re.findall(r"BAR\.(SYNC|ARV)\S* (?:0x([0-9a-f]+)|R\d+)", code)
    return collections.Counter(f"{kind} {int(number, 16) if number else 'slot'}" for kind, number in found)


def copies(code: str) -> list[tuple[str, bool]]:
    """Copies of keys and values in ttgir, those in a loop over steps, and whether the row is one of the loop's own.

    Otherwise each step would load one block: Triton 3.6 and 3.7 leave a variable out of a loop's state if it enters the
    loop as the same value as another one and takes that one's place there. Seen on an H200: right results for one block
    of keys, wrong ones for more.
    """
    found, own, over = [], set(), ""
    for line in code.splitlines():
        loop = re.search(r"scf\.for (%\w+) = .*?(?:iter_args\((.*?)\) ->|:)", line)
        if loop:
            over = loop[1]
            own = {over, *re.findall(r"(%\w+) =", loop[2] or "")}
        own |= set(re.findall(r"^\s*(%\w+)(?::\d+)? =", line))
        copy = re.search(r"async_tma_copy_global_to_local %\w+\[(.*?)\]", line)
        if copy and over.startswith("%step"):
            found.append((line.strip()[:120], copy[1].split(", ")[3].split("#")[0] in own))
    return found


def shared_copies(code: str) -> list[tuple[str, bool]]:
    """What :func:`copies` says, of programs in pairs, whose copies are inline PTX: of ptx, the parameters with tensor
    maps, and whether the innermost loop around the copy writes the register of the row.
    """
    lines = code.splitlines()
    places = {line.split(":")[0]: index for index, line in enumerate(lines) if line.startswith("$L__BB")}
    loops = []
    for index, line in enumerate(lines):
        jump = re.search(r"\bbra(?:\.uni)? \t?(\$L__BB\w+);", line)
        if jump and places[jump[1]] < index:
            loops.append((places[jump[1]], index))
    found = []
    for index, line in enumerate(lines):
        copy = re.search(r"multicast::cluster \[d\], \[m, \{%r\d+, (%r\d+), ", line)
        if copy:
            begin, end = min((loop for loop in loops if loop[0] < index < loop[1]), key=lambda loop: loop[1] - loop[0])
            written = any(re.match(rf"\s*[\w.]+\s+{copy[1]}, ", one) for one in lines[begin:end])
            found.append(("/".join(re.findall(r"mov\.b64 [mn], hopper_forward_param_(\d+);", line)), written))
    return found


def nvidia(kernel: Any, target: str) -> dict[str, Any]:
    """Spilled bytes, ptxas's warnings about serialised wgmma, descriptors made of a register that nobody set."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        architecture = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.M)
        assert architecture is not None
        command = [ptxas_for(TARGETS[target].arch), "-v", "--gpu-name", architecture[1], str(ptx), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dump = [str(TOOLS / "cuobjdump"), "-sass", str(cubin)]
        code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None, said
    return {
        "spilled": int(spilled[1]),
        "warnings": sorted(set(re.findall(r"C75\d\d", said))),
        "descriptors": wrong_descriptors(code),
        "beside": beside_the_product(code),
        "barriers": barriers(code),
    }


def ptxas_for(arch: int) -> str:
    """The ptxas that triton itself takes: it brings up to two, and which one serves sm_90 changed with 3.9."""
    by_arch = inspect.signature(nvidia_compiler.get_ptxas).parameters
    return (nvidia_compiler.get_ptxas(arch) if by_arch else nvidia_compiler.get_ptxas()).path


def wrong_descriptors(code: str) -> list[str]:
    """Upper halves of wgmma descriptors that are added to a register which is not zero.

    ptxas 12.8 (triton 3.6) does so where a loop without a pipeline follows one with, in a head_dim of two parts: the
    product then reads anywhere in shared memory. compute-sanitizer found it, results looked right: the weights were 0.
    """
    found, last = [], {}
    for line in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?(.*?);", code):
        high = re.match(r"UIADD3\.X UR\d+, (UR\w+), (-?0x[0-9a-f]+), ", line)
        if high and abs(int(high[2], 16)) > 1 << 28 and high[1] != "URZ":
            if not re.match(r"UMOV UR\d+, URZ", last.get(high[1], "")):
                found.append(line.strip())
        written = re.match(r"[\w.]+ (?:UP\d, )?(UR\d+)", line)
        if written:
            last[written[1]] = line
    return found


def amd(kernel: Any) -> dict[str, Any]:
    spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])
    assert spilled is not None
    return {"spilled": int(spilled[1]), "warnings": [], "descriptors": []}


def examined(kernel: Any, target: str) -> dict[str, Any]:
    """What the machine code and the metadata of a kernel say."""
    report = amd(kernel) if target == "gfx" else nvidia(kernel, target)
    return report | {
        "scratch": getattr(kernel.metadata, "global_scratch_size", 0),
        "shared": kernel.metadata.shared,
    }


def main(targets: list[str], widths: list[int], variants: list[str], kinds: list[str]) -> None:
    found = {}
    for target in targets:
        for head_dim in widths:
            for kind in kinds:
                if kind == "helpers":
                    for number, (function, more, warps) in enumerate(HELPERS):
                        kernel = helper(function, more, warps, head_dim, target)
                        found[f"{target} {function.__name__} {number} {head_dim}"] = examined(kernel, target)
                    continue
                for variant in variants:
                    if kind == "hopper":
                        kernel, config = hopper(head_dim, variant)
                    else:
                        kernel, config = compiled(kind, target, head_dim, variant)
                    report = examined(kernel, target)
                    report["config"] = str(config)
                    if kind == "hopper":
                        if config.paired:
                            report["copies"] = shared_copies(kernel.asm["ptx"])
                            assert _hopper_launch.check_pairs(config, 128, variant == "listed", kernel.asm["ptx"])
                        else:
                            report["copies"] = copies(kernel.asm["ttgir"])
                    found[f"{target} {kind} {head_dim} {variant}"] = report
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    asked = [argument.split(",") for argument in sys.argv[1:]]
    main(asked[0], [int(width) for width in asked[1]], asked[2], asked[3] if len(asked) > 3 else list(KINDS))
