"""The Triton kernels compiled as shipped, for GPUs that are not here, and what torch.compile and export see."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from graphs import Counter
from torch._inductor.utils import run_and_get_code
from triton_here import needs_gluon, needs_triton

import compiled_attn

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("triton", "triton_varlen")

# Bytes a thread may spill. dK/dV of head_dim 128 on sm_90 spills 5 stores a step and is still the fastest: 531 TFLOP/s
# on an H200, 443 with two stages, which spill nothing in the loop. All else is outside the loops.
MOST_SPILLED = 128


def printed(program: str, *arguments: str) -> dict:
    """What a program beside this file prints last, as JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", f"compile_tests/{program}", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def verify(found: dict[str, dict]) -> None:
    assert found
    for case, report in found.items():
        assert report["spilled"] <= MOST_SPILLED, (case, report)
        assert report["warnings"] == [], (case, report)  # C7510-C7519: serialised wgmma
        assert report["descriptors"] == [], (case, report)
        assert report["scratch"] == 0, (case, report)
        assert report["shared"] <= {"sm_80": 163, "gfx": 64}.get(case.split()[0], 227) * 1024, (case, report)


@needs_triton
@pytest.mark.parametrize(
    ("target", "width"),
    [
        ("sm_90", "72"),
        ("sm_90", "128"),
        ("gfx", "128"),
        *(
            pytest.param(target, width, marks=pytest.mark.slow)
            for target in ("sm_80", "sm_100", "gfx")
            for width in ("64", "80", "256")
        ),
        *(pytest.param(target, "128", marks=pytest.mark.slow) for target in ("sm_80", "sm_100")),
    ],
)
def test_shipped_configurations(target, width):
    verify(printed("cross_compiled.py", target, width, "plain"))


@needs_triton
def test_kernels_that_pack_and_round_for_other_libraries():
    found = printed("cross_compiled.py", "sm_80,sm_90,sm_100", "40,128", "plain", "helpers")
    verify(found)
    assert len(found) == 6 * 6


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("width", ["64", "72", "96", "128"])
def test_shipped_configurations_in_every_variant_on_hopper(width):
    verify(printed("cross_compiled.py", "sm_90", width, "plain,causal,packed,gather,window"))


@needs_triton
@needs_gluon
@pytest.mark.parametrize(
    ("width", "variants"),
    [
        ("128", "plain"),
        *(
            pytest.param(width, "plain,causal,packed,listed,window", marks=pytest.mark.slow)
            for width in ("64", "96", "256")
        ),
        pytest.param("128", "causal,packed,listed,alone,alone_listed,window", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_for_hopper(width, variants):
    """No scratch memory, no serialised wgmma, and the maxima of rows where they are meant to run, without spills."""
    found = printed("cross_compiled.py", "sm_90", width, variants, "hopper")
    verify(found)
    for case, report in found.items():
        paired = "paired=True" in report["config"]
        if paired:  # the first block of K has a copy of its own, whose row may be the same in each turn
            maps = ["11/33", "11/33", "22/44"] if case.endswith("listed") else ["11", "11", "22"]
            assert sorted(tensor for tensor, _ in report["copies"]) == maps, (case, report)
            assert all(moving for _, moving in report["copies"][1:]), (case, report)
        else:
            assert len(report["copies"]) == (4 if case.endswith("listed") else 2), (case, report)
            assert all(moving for _, moving in report["copies"]), (case, report)
        keys = 64 if width == "256" else 128
        loops = {"causal": 2, "window": 3}.get(case.split()[-1], 1)
        consumers = 3 if width == "64" and loops == 1 else 2
        assert len(report["beside"]) == consumers * loops, (case, report)
        tritons = ("0", "1", "2", "3", "4")
        ours = {name: count for name, count in report["barriers"].items() if name.split()[1] not in tritons}
        expected = {}
        if width != "256":  # each loop waits once and passes on once; the last warpgroup lets the first one begin
            for number in range(8, 8 + consumers):
                expected |= {f"SYNC {number}": loops, f"ARV {number}": loops + (number == 8)}
        if width in ("96", "128"):  # a slot of K and one of V: in each loop, in front of the first and behind the last
            expected |= {"ARV slot": consumers * (2 * loops + 2), "SYNC slot": ours.get("SYNC slot")}
            assert ours["SYNC slot"] >= 2, (case, report)
        assert ours == expected, (case, report)
        for maxima, spills in report["beside"]:
            # a thread has half a block's keys of each of two rows
            assert maxima >= keys // 2, (case, report)
            assert spills == 0, (case, report)


def block(name):
    def call(query, key, value):
        return compiled_attn.attention(query, key, value, is_causal=True, backend=name)

    return call


@needs_triton
def test_pytorch_sees_what_the_kernels_write_to():
    """With a helper that read cu_seqlens it took them for results: a copy in every call, and on torch < 2.13 compiled
    training on packed sequences of dynamic lengths failed in Inductor (replace_by_example)."""
    assert printed("written_to.py") == {
        "key_order": ["Order", "Rank"],
        "compact": ["OutK", "OutV"],
        "attention_forward": ["Lse", "Out"],
        "attention_dq": ["DQ", "Rows"],
        "attention_dkv": ["DK", "DV"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_graphs_show_the_operator_and_compiled_code_what_is_inside(name):
    inputs = [torch.randn(1, 9, 2, 16, requires_grad=True) for _ in range(3)]
    counter = Counter("inductor")

    def train():
        out = torch.compile(block(name), fullgraph=True, backend=counter)(*inputs)
        return out, torch.autograd.grad(out.sin().sum(), inputs)

    (out, gradients), code = run_and_get_code(train)
    operator = compiled_attn.backend_info(name).operator_names()[0]
    assert counter.operators() == [[operator]]
    assert len(code) == 2  # forward and backward
    for text in code:
        assert f"torch.ops.compiled_attn.{operator}" not in text
    expected = block("_native_math")(*inputs)
    torch.testing.assert_close(out, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected.sin().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_export_keeps_the_operator(name):
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return block(name)(query, key, value)

    inputs = tuple(torch.randn(1, 9, 2, 16) for _ in range(3))
    program = torch.export.export(Model(), inputs)
    targets = [str(node.target) for node in program.graph.nodes if "compiled_attn" in str(node.target)]
    assert targets == [f"compiled_attn.{compiled_attn.backend_info(name).operator_names()[0]}.v1"]


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_kernels_are_inlined_on_a_gpu(packed):
    shape = (90, 2, 64) if packed else (1, 90, 2, 64)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    starts = torch.tensor([0, 30, 90], device="cuda", dtype=torch.int32)

    def call(*tensors):
        if packed:
            return compiled_attn.varlen_attention(*tensors, starts, starts, backend="triton")
        return compiled_attn.attention(*tensors, backend="triton")

    def train():
        out = torch.compile(call, fullgraph=True)(*inputs)
        return out, torch.autograd.grad(out.float().square().sum(), inputs)

    (out, gradients), code = run_and_get_code(train)
    for text, kernels in zip(code, (("attention_forward",), ("attention_dq", "attention_dkv")), strict=True):
        assert all(f"def {kernel}(" in text for kernel in kernels)
        assert "torch.ops.compiled_attn.triton" not in text
    eager = call(*inputs)
    torch.testing.assert_close(out, eager, rtol=0, atol=0)
    for one, other in zip(gradients, torch.autograd.grad(eager.float().square().sum(), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
