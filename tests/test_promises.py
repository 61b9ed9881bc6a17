"""``python -m compiled_attn promises``: a cell that works, one that is refused and one that fails are told apart."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import probes  # noqa: F401  registers cheap backends, each of which multiplies its result by a factor of its own
import pytest
import stand_in  # noqa: F401  registers a right backend with an operator of its own
import torch
from probes import PROBES

import compiled_attn
from compiled_attn import __main__, promises, registry
from compiled_attn.promises import CELLS, FAILED, REFUSED, WORKS

RESULT = {"device": "cpu", "command": "promises", "versions": {"torch": "0"}}


def test_a_right_backend_works_and_a_wrong_one_fails(monkeypatch):
    monkeypatch.setattr(promises, "CELLS", {"export": CELLS["export"], "reduce-overhead": CELLS["reduce-overhead"]})
    right = {}
    for found in promises.try_all("_native_math", "cpu"):
        right.update(found)
    assert {name: cell["result"] for name, cell in right.items()} == {"export": WORKS, "reduce-overhead": REFUSED}
    assert right["reduce-overhead"]["reason"] == "CUDA graphs need a CUDA device"
    wrong = next(promises.try_all(PROBES[1], "cpu"))  # gives 2 * value
    assert wrong["export"]["result"] == FAILED
    assert "from float64, allowed" in wrong["export"]["reason"]


@pytest.mark.parametrize("cell", ["forward", "dynamic shapes", "switch"])
def test_compiled_cells_count_their_graphs(cell):
    subject = promises.Subject("_native_math", "cpu")
    CELLS[cell](subject)
    assert len(subject.inductor.graphs) == 1


def test_switch_that_runs_another_backend_is_a_failure(monkeypatch):
    subject = promises.Subject("_native_math", "cpu")
    CELLS["switch"](subject)
    monkeypatch.setattr("compiled_attn.ops.switch._active", lambda q: registry.find("native"))  # and its numbers right
    with pytest.raises(AssertionError, match="native ran where _native_math was active"):
        CELLS["switch"](subject)
    assert registry.find("_native_math").backend.dense.forward.__module__ == "compiled_attn.ops._native_dense"


@pytest.mark.parametrize("backend", ["native", "_native_math", "stand_in", "triton", "flex"])
def test_training_knows_the_operators_of_both_directions(backend):
    subject = promises.Subject(backend, "cpu")
    CELLS["training"](subject)
    assert (len(subject.inductor.forward), len(subject.inductor.backward)) == (1, 1)


@pytest.mark.parametrize(
    ("backend", "trained"),
    [("_native_math", "native"), ("native", "_native_math"), ("triton", "stand_in"), ("stand_in", "triton")],
)
def test_training_through_another_operator_is_a_failure(monkeypatch, backend, trained):
    """As right, to the eye that looks at numbers alone."""
    subject = promises.Subject(backend, "cpu")
    compiled, model = subject.compiled, promises.Subject(trained, "cpu").model()
    monkeypatch.setattr(subject, "compiled", lambda _: compiled(model))
    monkeypatch.setattr(subject, "check_graphs", lambda number: None)
    with pytest.raises(AssertionError, match="forward has the operators"):
        CELLS["training"](subject)


@pytest.mark.parametrize("lowered", [[], [set()], [{"compiled_attn::stand_in"}]], ids=str)
def test_a_backward_that_is_not_in_the_graph_is_a_failure(lowered):
    subject = promises.Subject("stand_in", "cpu")
    subject.inductor.backward = lowered
    with pytest.raises(AssertionError, match=r"stand_in_backward|0 backward graphs, expected 1"):
        subject.check_lowered("backward", set())


def test_kernels_that_were_not_taken_in_are_a_failure():
    subject = promises.Subject("triton", "cpu")
    subject.inductor.forward = [set()]
    subject.check_lowered("forward", set())
    subject.device = "cuda"
    with pytest.raises(AssertionError, match="forward has the operators"):
        subject.check_lowered("forward", set())
    subject.inductor.forward = [{"triton_kernel_wrapper_functional"}]
    subject.check_lowered("forward", set())


def test_a_graph_too_many_is_a_failure(monkeypatch):
    monkeypatch.setattr(promises.Subject, "check", lambda *_: None)
    subject = promises.Subject("_native_math", "cpu")
    subject.compiled(subject.model())(subject.input())
    with pytest.raises(AssertionError, match="1 graphs, expected 2"):
        subject.check_graphs(2)
    with pytest.raises(AssertionError, match="compiled_attn::flex is not in the graph"):
        subject.check_graphs(1, "compiled_attn::flex")


def test_a_refusal_is_found_inside_what_compilers_wrap_round_it():
    x = torch.randn(1, 4, 2, 16, requires_grad=True)
    refused = torch.compile(lambda x: compiled_attn.attention(x, x, x, backend="sage"), fullgraph=True)
    with pytest.raises(Exception, match="cannot run this call") as caught:
        refused(x)
    assert promises._told(caught.value)["result"] == REFUSED
    assert promises._told(RuntimeError("boom"))["result"] == FAILED


def test_a_kernel_that_pytorch_lacks_is_a_failure_and_no_refusal():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(NotImplementedError, match="Could not run") as caught:
        torch.ops.aten._scaled_dot_product_flash_attention(x, x, x)  # CUDA's
    assert promises._told(caught.value)["result"] == FAILED


def test_a_worker_that_died_or_would_download(monkeypatch):
    given = argparse.Namespace(backends=["native"], device="cpu", timeout=60)
    monkeypatch.setattr(promises.sys, "executable", shutil.which("false"))
    cells = promises._in_a_process("native", given)
    assert cells["forward"] == {"result": FAILED, "reason": "exit status 1: "}
    assert "| failed (1) |" in promises.markdown([{**RESULT, "rows": {"native": cells}}])
    monkeypatch.setattr(promises, "fetched", lambda name: False)
    cells = promises._in_a_process("native", argparse.Namespace(**{**vars(given), "backends": None}))
    assert cells["forward"]["result"] == "not run"
    assert cells["forward"]["reason"].startswith("not fetched yet")


def told(*cells):
    return [json.dumps({cell: {"result": WORKS, "reason": ""}}) for cell in cells]


@pytest.mark.parametrize(
    ("lines", "then", "results", "reason"),
    [
        (["7", *told("forward", "training"), '{"half'], "exec sleep 60", [WORKS, WORKS], "not done after 2 s"),
        (told("forward"), "exit 3", [WORKS], "exit status 3: "),
        (told("forward"), "exit 0", [WORKS], "its process ended without a word"),
        ([], "echo lost >&2; exit 1", [], "exit status 1: lost\n"),
        (told(*CELLS), "exit 11", [WORKS] * (len(CELLS) - 1), "exit status 11: "),
    ],
    ids=["time", "status", "silence", "nothing", "at_the_end"],
)
def test_what_a_worker_did_before_it_ended_is_kept(monkeypatch, tmp_path, lines, then, results, reason):
    worker = tmp_path / "worker"
    worker.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines), then]) + "\n")
    worker.chmod(0o755)
    monkeypatch.setattr(promises.sys, "executable", str(worker))
    cells = promises._in_a_process("native", argparse.Namespace(backends=["native"], device="cpu", timeout=2))
    behind = len(CELLS) - len(results) - 1
    assert [cell["result"] for cell in cells.values()] == [*results, FAILED, *["not run"] * behind]
    assert [cell["reason"] for cell in cells.values() if cell["result"] == FAILED] == [reason]


def test_every_kept_result_is_a_row_of_the_readme():
    root = Path(__file__).parent.parent
    files = [root / "docs" / "promises.json", *sorted((root / "docs" / "gpu").glob("promises*.json"))]
    table = promises.markdown([json.loads(file.read_text()) for file in files])
    text = (root / "README.md").read_text()
    assert text.partition(promises.BEGIN)[2].partition(promises.END)[0].strip() == table.strip()


def test_the_command_saves_and_prints(tmp_path, capsys, monkeypatch):
    cells = {cell: {"result": WORKS, "reason": ""} for cell in CELLS}
    monkeypatch.setattr(promises, "_in_a_process", lambda name, arguments: cells)
    file = tmp_path / "promises.json"
    assert __main__.main(["promises", "--backends", "native", "--device", "cpu", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["rows"] == {"native": cells}
    cells["switch"] = {"result": FAILED, "reason": "2 graphs, expected 1"}
    assert __main__.main(["promises", "--backends", "native", "--device", "cpu"]) == 1
    assert "FAILED: native, switch: 2 graphs, expected 1" in capsys.readouterr().out
    assert __main__.main(["promises", "--markdown", str(file)]) == 0
    assert f"| `native` | cpu |{' works |' * len(CELLS)}" in capsys.readouterr().out
