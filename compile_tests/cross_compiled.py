"""Compiles the Triton kernels, as shipped, for GPUs that are not here, and prints what ptxas made of them.

A program of its own: ``python cross_compiled.py sm_80,sm_90 64,128 plain,packed`` prints one JSON object, case to
findings. No GPU is needed: triton brings ptxas and cuobjdump, and LLVM for AMD.
"""

from __future__ import annotations

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
from triton.compiler import ASTSource

from compiled_attn.ops import _triton_launch
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


def nvidia(kernel: Any, target: str) -> dict[str, Any]:
    """Spilled bytes, ptxas's warnings about serialised wgmma, descriptors made of a register that nobody set."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = pathlib.Path(folder, "kernel.ptx"), pathlib.Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        architecture = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.M)
        assert architecture is not None
        blackwell = TOOLS / "ptxas-blackwell"
        ptxas = blackwell if target == "sm_100" and blackwell.exists() else TOOLS / "ptxas"
        command = [str(ptxas), "-v", "--gpu-name", architecture[1], str(ptx), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        dump = [str(TOOLS / "cuobjdump"), "-sass", str(cubin)]
        code = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None, said
    return {
        "spilled": int(spilled[1]),
        "warnings": sorted(set(re.findall(r"C75\d\d", said))),
        "descriptors": wrong_descriptors(code),
    }


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


def main(targets: list[str], widths: list[int], variants: list[str]) -> None:
    found = {}
    for target in targets:
        for head_dim in widths:
            for kind in KINDS:
                for variant in variants:
                    kernel, config = compiled(kind, target, head_dim, variant)
                    report = amd(kernel) if target == "gfx" else nvidia(kernel, target)
                    report["scratch"] = getattr(kernel.metadata, "global_scratch_size", 0)
                    report["shared"] = kernel.metadata.shared
                    report["config"] = str(config)
                    found[f"{target} {kind} {head_dim} {variant}"] = report
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main(sys.argv[1].split(","), [int(width) for width in sys.argv[2].split(",")], sys.argv[3].split(","))
