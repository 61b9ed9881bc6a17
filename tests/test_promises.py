"""``python -m compiled_attn promises``: a cell that works, one that is refused and one that fails are told apart."""

from __future__ import annotations

import json
from pathlib import Path

import probes  # noqa: F401  registers cheap backends, each of which multiplies its result by a factor of its own
import pytest
import torch
from probes import PROBES

import compiled_attn
from compiled_attn import __main__, promises
from compiled_attn.promises import CELLS, FAILED, REFUSED, WORKS


def test_a_right_backend_works_and_a_wrong_one_fails(monkeypatch):
    monkeypatch.setattr(promises, "CELLS", {"export": CELLS["export"], "reduce-overhead": CELLS["reduce-overhead"]})
    right = promises.try_all("_native_math", "cpu")
    assert [cell["result"] for cell in right.values()] == [WORKS, REFUSED]
    assert right["reduce-overhead"]["reason"] == "CUDA graphs need a CUDA device"
    wrong = promises.try_all(PROBES[1], "cpu")  # gives 2 * value
    assert wrong["export"]["result"] == FAILED
    assert "from float64, allowed" in wrong["export"]["reason"]


@pytest.mark.parametrize("cell", ["forward", "dynamic shapes", "switch"])
def test_compiled_cells_count_their_graphs(cell):
    subject = promises.Subject("_native_math", "cpu")
    CELLS[cell](subject)
    assert len(subject.graphs) == 1


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


def test_every_kept_result_is_a_row_of_the_readme():
    root = Path(__file__).parent.parent
    files = [root / "docs" / "promises.json", root / "docs" / "gpu" / "promises.json"]
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
