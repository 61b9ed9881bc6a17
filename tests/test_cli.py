"""``python -m compiled_attn``: list, explain, bench, machine, demo's place."""

import dataclasses
import doctest
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

import compiled_attn
from compiled_attn import cli_list, cli_table, registry
from compiled_attn.__main__ import BENCHMARKS, COMMANDS, main
from compiled_attn.bench import kernels, libraries, overhead
from compiled_attn.bench.timing import Times, measure
from compiled_attn.packages import Package
from compiled_attn.registry import Backend, Entry
from compiled_attn.spec import Limits

ROOT = pathlib.Path(__file__).parent.parent
NO_CUDA = "runs on cuda; this machine has none"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend for GPUs whose package does not exist; listed during the test, without operators."""
    backend = Backend(
        "nowhere",
        "for this test",
        limits=(
            Limits(
                ("cuda",), (torch.bfloat16,), min_capability=(9, 0), max_head_dim=256, head_dim_multiple=8,
                alignments=("lower_right",), window=True, deterministic="never", verified="contract",
            ),
            Limits(("xpu",), (torch.float16,), causal=False, gqa=False, lse=False, gradient=False),
        ),
        packages=(Package("nowhere_at_all", "nowhere-at-all", "1.0"),),
    )  # fmt: skip
    monkeypatch.setitem(registry.BACKENDS, "nowhere", Entry(backend, number=len(registry.BACKENDS)))
    return backend


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number=0: capabilities[number])
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)


# -------------------------------------------------------------------------------------------------------------- list


def test_list_json_has_every_backend_with_its_reasons(capsys: pytest.CaptureFixture[str], nowhere: Backend) -> None:
    records = json.loads(printed(capsys, "list", "--json"))
    assert [record["name"] for record in records] == compiled_attn.list_backends()
    for record in records:
        assert record["available"] == (record["reasons"] == [])
        assert record["reasons"][: len(registry.unavailable(record["name"]))] == registry.unavailable(record["name"])
    mine = records[-1]
    assert not mine["available"]
    assert mine["reasons"][0] == "module 'nowhere_at_all' is not installed; pip install nowhere-at-all"
    assert mine["dense"][0]["dtypes"] == ["bfloat16"]
    assert mine["dense"][0]["min_capability"] == [9, 0]
    assert mine["varlen"] == []
    assert mine["verified"] == "hardware/contract"


def test_absent_device_is_a_reason(monkeypatch: pytest.MonkeyPatch, nowhere: Backend) -> None:
    with_gpus(monkeypatch)
    assert cli_list.missing_devices(nowhere) == [NO_CUDA, "runs on xpu; this machine has none"]
    with_gpus(monkeypatch, (7, 5), (8, 0))
    assert cli_list.missing_devices(nowhere)[0] == "needs compute capability 9.0 or later; this machine has 7.5, 8.0"
    with_gpus(monkeypatch, (7, 5), (9, 0))
    assert cli_list.missing_devices(nowhere) == []


def test_a_cpu_backend_is_here_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch)
    assert cli_list.absences("native") == []
    assert cli_list.absences("_native_flash") == []  # its CUDA entry is not all it has
    assert cli_list.absences("_native_cudnn") == [NO_CUDA]
    with_gpus(monkeypatch, (9, 0))
    assert cli_list.absences("_native_cudnn") == []


def test_list_for_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nowhere: Backend
) -> None:
    with_gpus(monkeypatch)
    here, rest = printed(capsys, "list").split(" cannot:\n")
    assert "\nnative " in here and "\nnowhere " not in here
    reasons = rest.split("\nWhat each takes")[0]
    assert "\nnowhere " in reasons and "pip install nowhere-at-all" in reasons and NO_CUDA in reasons
    assert "\nnative " not in reasons


def test_the_table_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nowhere: Backend
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    narrow = printed(capsys, "list").split("explain asks about one call):\n\n")[1]
    assert max(len(line) for line in narrow.split("\n")) <= 160
    monkeypatch.delenv("COLUMNS")
    wide = printed(capsys, "list").split("explain asks about one call):\n\n")[1]
    assert len(wide.split("\n")) < len(narrow.split("\n"))
    assert sorted(wide.replace("-", "").split()) == sorted(narrow.replace("-", "").split())  # no word is lost


def test_markdown_says_what_limits_say(capsys: pytest.CaptureFixture[str], nowhere: Backend) -> None:
    *_, first, second = printed(capsys, "list", "--markdown").strip().split("\n")
    assert first == (
        "| `nowhere` | dense | cuda 9.0+ | bf16 | 1-256, multiples of 8 | - | lower_right | gqa, window, lse | yes "
        "| contract-tested, not run on hardware |"
    )
    assert second == "|  | dense | xpu | f16 | any | - | - | - | - | hardware |"


def test_equal_limits_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(("cpu",), (torch.float32,), masks=("none", "bool"), mask_gradient=True)
    both = Backend("both", "", limits=(limits,), varlen_limits=(dataclasses.replace(limits),))
    monkeypatch.setattr(registry, "BACKENDS", {"both": Entry(both, number=0)})
    ((name, calls, *rest),) = cli_list.capabilities()
    assert (name, calls) == ("both", "dense, varlen")
    assert rest == ["cpu", "f32", "any", "bool", "both", "gqa, lse", "yes, mask too; deterministic", "hardware"]


def test_markdown_is_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch)
    laptop = cli_list.markdown()
    with_gpus(monkeypatch, (9, 0))
    assert cli_list.markdown() == laptop


def test_write_replaces_the_section_and_nothing_else(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{cli_list.BEGIN}\nold\n{cli_list.END}\nafter\n")
    printed(capsys, "list", "--markdown", "--write", str(readme))
    assert readme.read_text() == f"before\n{cli_list.BEGIN}\n{cli_list.markdown()}\n{cli_list.END}\nafter\n"


@pytest.mark.parametrize(
    "text", ["no markers", f"{cli_list.END} {cli_list.BEGIN}", f"{cli_list.BEGIN * 2} {cli_list.END}"]
)
def test_write_refuses_a_file_without_the_section(
    text: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main(["list", "--markdown", "--write", str(readme)]) == 2
    assert cli_list.BEGIN in capsys.readouterr().err
    assert readme.read_text() == text


def test_readme_has_the_table_of_this_version() -> None:
    # a fresh process: other tests register backends of their own
    table = python("-m", "compiled_attn", "list", "--markdown").stdout
    text = (ROOT / "README.md").read_text()
    assert cli_list.BEGIN in text and cli_list.END in text
    section = text.split(cli_list.BEGIN)[1].split(cli_list.END)[0]
    assert section.strip() == table.strip(), "README.md is out of date: make readme"


# ----------------------------------------------------------------------------------------------------------- explain

CALLS: list[tuple[list[str], dict[str, object]]] = [
    ([], {}),
    (["--causal"], {"is_causal": True}),
    (["--causal", "--alignment", "lower_right"], {"is_causal": True, "causal_alignment": "lower_right"}),
    (["--window", "-1,2"], {"window_size": (-1, 2)}),
    (["--window=-1,-1"], {"window_size": (-1, -1)}),
    (["--window", "2,0", "--causal"], {"window_size": (2, 0), "is_causal": True}),
    (["--dropout", "0.1"], {"dropout_p": 0.1}),
    (["--lse"], {"return_lse": True}),
    (["--deterministic"], {"deterministic": True}),
    (["--mask", "key_padding"], {"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}),
    (["--mask", "bool"], {"attn_mask": torch.ones(2, 1, 3, 5, dtype=torch.bool)}),
    (["--mask", "float"], {"attn_mask": torch.zeros(2, 1, 3, 5)}),
]


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "gradient"])
@pytest.mark.parametrize(("argv", "options"), CALLS, ids=[" ".join(argv) or "plain" for argv, _ in CALLS])
def test_explain_agrees_with_why_not(
    argv: list[str], options: dict[str, object], gradient: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    q = torch.randn(2, 3, 4, 8, requires_grad=gradient)
    k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 16)
    expected = compiled_attn.explain(q, k, v, enable_gqa=True, **options)  # type: ignore[arg-type]
    shapes = ["--query", "2,3,4,8", "--key", "2,5,2,8", "--value", "2,5,2,16", "--gqa"]
    rest = ["--dtype", "float32", "--device", "cpu", "--json", *(["--gradient"] if gradient else [])]
    answer = json.loads(printed(capsys, "explain", *shapes, *rest, *argv))
    assert len(answer["backends"]) == len(expected)
    for record in answer["backends"]:
        name = record["name"]
        assert registry.unavailable(name) + record["reasons"] == expected[name]
        assert (record["verdict"] == "no") == bool(record["reasons"])
    assert any(record["reasons"] for record in answer["backends"])


def test_explain_packed(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(10, 2, 16)
    expected = compiled_attn.explain(x, x, x)
    answer = json.loads(
        printed(capsys, "explain", "--query", "10,2,16", "--dtype", "float32", "--device", "cpu", "--json")
    )
    assert answer["call"]["varlen"] is True
    assert {one["name"]: one["reasons"] for one in answer["backends"]} == {
        name: reasons[len(registry.unavailable(name)) :] for name, reasons in expected.items()
    }


def test_explain_asks_about_machines_that_are_not_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch)
    h100 = ["explain", "--query", "1,4608,24,128", "--device", "cuda", "--capability", "9.0", "--json"]
    verdicts = {one["name"]: one for one in json.loads(printed(capsys, *h100))["backends"]}
    assert verdicts["_native_cudnn"]["verdict"] == "not here"
    assert verdicts["_native_cudnn"]["absences"] == [NO_CUDA]
    assert verdicts["native"]["verdict"] == "not here"
    assert verdicts["native"]["absences"] == ["this machine has no cuda device"]
    turing = [*h100[:5], "--capability", "7.5", "--json"]
    verdicts = {one["name"]: one for one in json.loads(printed(capsys, *turing))["backends"]}
    assert verdicts["_native_cudnn"]["verdict"] == "no"
    assert any("compute capability" in reason for reason in verdicts["_native_cudnn"]["reasons"])


def test_explain_takes_the_machine_for_granted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, (7, 5))
    call = json.loads(printed(capsys, "explain", "--query", "1,8,2,16", "--json"))["call"]
    assert (call["devices"], call["capability"]) == (["cuda"] * 3, [7, 5])
    with_gpus(monkeypatch)
    call = json.loads(printed(capsys, "explain", "--query", "1,8,2,16", "--json"))["call"]
    assert (call["devices"], call["capability"]) == (["cpu"] * 3, None)


def test_explain_table_allocates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    table = printed(capsys, "explain", "--query", "1000000,1000000,24,128", "--device", "cpu", "--mask", "block")
    assert time.perf_counter() - start < 5
    rows = [line.split()[0] for line in table.split("\n\n")[0].split("\n")[2:] if not line.startswith(" ")]
    assert rows == compiled_attn.list_backends()


def test_explain_refuses_a_senseless_call_as_attention_does(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--query", "1,8,4,16", "--key", "2,8,3,32", "--causal", "--mask", "bool", "--dtype", "float32"]
    assert main(["explain", *argv, "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    q, k = torch.randn(1, 8, 4, 16), torch.randn(2, 8, 3, 32)
    with pytest.raises(ValueError) as error:
        compiled_attn.attention(q, k, k, torch.ones(1, 1, 8, 8, dtype=torch.bool), is_causal=True)
    assert said.strip() == str(error.value)
    assert len(said.strip().split("\n")) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        ["--query", "1,8,x,16"],
        ["--query", "1,8,-2,16"],
        ["--query", "1,8,2,16", "--window", "3"],
        ["--query", "1,8,2,16", "--dtype", "bfloat17"],
        ["--query", "1,8,2,16", "--dtype", "nn"],
        ["--query", "1,8,2,16", "--capability", "9"],
        ["--query", "1,8,2,16", "--mask", "triangle"],
        [],
    ],
    ids=" ".join,
)
def test_explain_refuses_what_it_cannot_read(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["explain", *wrong])
    assert stop.value.code == 2
    assert wrong[-1] in capsys.readouterr().err if wrong else True


# -------------------------------------------------------------------------------------------------- all subcommands


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name != "demo"), ["bench"]], ids=" ".join)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert " ".join(["usage: python -m compiled_attn", *command]) in capsys.readouterr().out


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmark_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out.replace("\n", " ")


def test_no_command_and_unknown_command_exit_with_2() -> None:
    for argv in ([], ["dance"], ["bench"], ["bench", "dance"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


def test_the_demo_is_imported_for_the_demo_only() -> None:
    code = (
        "import sys; from compiled_attn.__main__ import main; main(['list']);"
        "print([name for name in sys.modules if name.startswith(('compiled_attn.demo', 'diffusers', 'matplotlib'))])"
    )
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().split("\n")[-1] == "[]"


def test_machine(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(printed(capsys, "machine", "--json"))
    assert facts["versions"]["torch"] == torch.__version__
    assert f"torch {torch.__version__}" in printed(capsys, "machine")


def test_tables() -> None:
    assert doctest.testmod(cli_table) == doctest.TestResults(failed=0, attempted=3)


# ------------------------------------------------------------------------------------------------------------- bench


def test_times_are_compared_within_a_round() -> None:
    # the second round ran on a machine ten times slower
    times = Times({"a": [1.0, 10.0, 1.0], "b": [3.0, 12.0, 3.0], "b 41": [43.0, 52.0, 43.0]})
    assert (times.median("a"), times.over("b", "a")) == (1.0, 2.0)
    assert times.slope("b 41", "b", 40) == [1.0, 1.0, 1.0]


def test_measure_takes_turns() -> None:
    ran: list[str] = []
    times = measure({name: (lambda name=name: ran.append(name)) for name in "ab"}, 3, 2)  # type: ignore[misc]
    assert len(ran) == 2 * 2 * (3 + 1)
    for start in range(0, len(ran), 4):
        assert sorted(ran[start : start + 4]) == ["a", "a", "b", "b"]
    assert [len(times.rounds[name]) for name in "ab"] == [3, 3]


def test_measure_tells_slow_from_fast() -> None:
    times = measure({"slow": lambda: time.sleep(1e-3), "fast": lambda: None}, 3, 2)
    assert times.median("slow") >= 1000
    assert times.over("slow", "fast") > 500


def test_kernel_benchmark_prints_what_it_keeps(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kernels.json"
    names = ("native", "_native_math")
    text = printed(
        capsys, "bench", "kernels", "--device", "cpu", "--repeats", "1", "--json", str(kept), "--backends", *names
    )
    rows = json.loads(kept.read_text())["rows"]
    assert [row["backend"] for row in rows] == list(names) * (len(rows) // 2)
    assert {(row["shape"], row["mask"]) for row in rows} == {
        (shape.name, mask) for shape in kernels.SMALL for mask in ("none", "key_padding")
    }
    for row in rows:
        assert row["forward_ms"] > 0 < row["training_ms"]
        assert f"{row['training_ms']:.3f}" in text


def test_library_benchmark_measures_the_library_and_us(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = [], []

    def direct(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        theirs.append(tuple(q.shape))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def attention(*args: Any, backend: str, **more: Any) -> torch.Tensor:
        ours.append((backend, *more))
        return compiled_attn.reference.attention(*args, **more)[0].to(args[0].dtype)

    monkeypatch.setattr(libraries, "_direct", lambda name: direct)
    monkeypatch.setattr(compiled_attn, "attention", attention)
    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: model)
    kept = tmp_path / "libraries.json"
    text = printed(capsys, "bench", "libraries", "--device", "cpu", "--repeats", "1", "--json", str(kept))
    (row,) = json.loads(kept.read_text())["rows"]
    assert row["backend"] == "native"
    assert set(ours) == {("native",), ("native", "key_padding_mask")}
    assert {(1, 128, 2, 64), (1, 32, 2, 16)} <= set(theirs)
    assert min(row["step_ms"], row["library_step_ms"], row["masked_ms"], row["fewer_keys_ms"]) > 0
    assert f"{row['step_ms']:.3f}" in text
    assert "flash: module 'flash_attn" in text  # what is not installed says why


def test_eager_benchmark_runs_what_it_names() -> None:
    calls = []

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append((torch.is_inference_mode_enabled(), tuple(q.shape)))
        return q

    rows = overhead.eager("inference_mode", theirs, rounds=2, calls=3, progress=lambda: None)
    assert calls == [(True, overhead.SHAPE)] * 9
    assert (rows[0].name, rows[0].over) == ("plain SDPA", 0.0)
    assert [row.goal != "" for row in rows] == [False, True, True, False]
    x = torch.randn(overhead.SHAPE)
    torch.testing.assert_close(overhead.ours(x, x, x), overhead.plain(x, x, x))


def test_guards_benchmark_has_graphs_that_do_nothing() -> None:
    rows = overhead.guards(rounds=1, calls=1, progress=lambda: None, layers=2)
    assert [row.name for row in rows][:2] == ["plain SDPA", "compiled_attn.attention"]
    assert rows[1].goal.startswith("under 10 us")
    compiled = overhead._compiled_layers(overhead.ours, 2)
    torch.testing.assert_close(compiled(torch.ones(overhead.SHAPE)), torch.zeros(overhead.SHAPE))


@pytest.mark.slow
def test_overhead_from_the_shell(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "overhead.json"
    run = python("-m", "compiled_attn", "bench", "overhead", "--rounds", "3", "--calls", "5", "--json", str(file))
    assert run.returncode == 0, run.stderr
    result = json.loads(file.read_text())
    assert result["command"].startswith("python -m compiled_attn bench overhead")
    assert result["versions"]["torch"] == torch.__version__ and result["cpu"]
    rows = {(row["what"], row["name"]): row for row in result["rows"]}
    assert rows["one op in a compiled graph", "native"]["goal"] == "at most 3 us over aten"
    assert sum(row["met"] is not None for row in rows.values()) >= 3
    assert "goal" in run.stdout and all(row["name"] in run.stdout for row in rows.values())


def test_example_backend() -> None:
    # with the checkout on the path, installed or not: a script has its own folder there
    code = "import runpy; runpy.run_path('examples/backend.py', run_name='__main__')"
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert "agrees with PyTorch" in run.stdout
    assert len((ROOT / "examples" / "backend.py").read_text().splitlines()) < 40
