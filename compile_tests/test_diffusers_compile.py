"""Diffusers' own models compiled with fullgraph=True: graphs counted, operators seen, numbers kept."""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_attn
from compiled_attn import demo, registry
from compiled_attn.__main__ import main
from compiled_attn.integrations import diffusers as integration
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Limits

pytest.importorskip(
    "diffusers", minversion="0.36", reason="needs diffusers>=0.36: pip install 'compiled_attn[diffusers]'"
)

import diffusers
from diffusers.models import attention_dispatch

from compiled_attn.demo import measure, models
from compiled_attn.ops import native

NATIVE = ("native", "_native_math", "_native_flash")


class Graphs:
    """A compiler backend that runs graphs as they are and keeps the attention operators of each."""

    def __init__(self) -> None:
        self.seen: list[Counter[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        ours = [node for node in nodes if getattr(node, "namespace", None) == "compiled_attn"]
        self.seen.append(Counter(node._schema.name.removeprefix("compiled_attn::") for node in ours))
        return graph


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    diffusers.utils.logging.set_verbosity_error()
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    integration.uninstall()
    attention_dispatch._AttentionBackendRegistry.set_active_backend(active)
    torch._dynamo.reset()


def compiled(name: str, seed: int = 0) -> tuple[models.Subject, Callable[[], Tensor], Graphs]:
    subject = models.build(name, "cpu", torch.float32, real=False, seed=seed)
    graphs = Graphs()
    model = compiled_attn.compile(subject.model, fullgraph=True, backend=graphs)
    return subject, lambda: subject(model), graphs


CALLS = {"flux": 2, "wan": 4, "qwen": 2, "hunyuan": 2}


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("how", ["contexts and default", "pins"])
def test_one_graph_for_each_backend_and_none_on_return(name: str, how: str) -> None:
    subject, run, graphs = compiled(name)
    plain = subject()
    integration.install()

    def under(backend: str, turn: int) -> Tensor:
        if how == "pins":
            compiled_attn.set_attention_backend(subject.model, backend)
            return run()
        if turn == 0:
            with compiled_attn.attention_backend(backend):
                return run()
        compiled_attn.set_default_backend(backend)
        return run()

    for number, backend in enumerate(NATIVE):
        torch.testing.assert_close(under(backend, 0), plain, rtol=1e-5, atol=1e-5)
        assert len(graphs.seen) == number + 1
        assert graphs.seen[-1] == {backend: CALLS[name]}
    for backend in (*NATIVE, *reversed(NATIVE)):
        torch.testing.assert_close(under(backend, 1), plain, rtol=1e-5, atol=1e-5)
    assert len(graphs.seen) == len(NATIVE)


@pytest.mark.parametrize("name", models.NAMES)
def test_switch_is_one_graph_for_all(name: str) -> None:
    subject, run, graphs = compiled(name)
    plain = subject()
    integration.install()
    compiled_attn.set_attention_backend(subject.model, "switch")
    outs: dict[str, Tensor] = {}
    for backend in (*NATIVE, *NATIVE):
        with compiled_attn.attention_backend(backend):
            out = run()
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, outs.setdefault(backend, out), rtol=0, atol=0)
    assert graphs.seen == [{"switch": CALLS[name]}]
    # what ran is what was chosen: plain math does not round as the fused kernel does
    assert not torch.equal(outs["_native_math"], outs["_native_flash"])
    torch.testing.assert_close(outs["native"], outs["_native_flash"], rtol=0, atol=0)


def test_regional_compilation() -> None:
    """compile_repeated_blocks: one graph for each sort of block and backend, however many blocks there are."""
    subject = models.build("wan", "cpu", torch.float32, real=False)
    plain, graphs = subject(), Graphs()
    integration.install()
    subject.model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    for _ in range(2):
        for backend in NATIVE:
            with compiled_attn.attention_backend(backend):
                torch.testing.assert_close(subject(), plain, rtol=1e-5, atol=1e-5)
    assert graphs.seen == [{backend: 2} for backend in NATIVE]


def test_diffusers_own_setter_compiles_its_model_alone() -> None:
    """Upstream it recompiles every other compiled model, and after reset the old backend goes on running."""
    _, run, graphs = compiled("flux")
    other, run_other, others = compiled("flux", seed=1)
    integration.install()
    run()
    run_other()
    other.model.set_attention_backend("_native_math")
    run_other()
    run()
    assert graphs.seen == [{"native": 2}]
    assert others.seen == [{"native": 2}, {"_native_math": 2}]
    other.model.reset_attention_backend()
    run_other()
    run()
    assert others.seen[-1] == {"native": 2}
    assert graphs.seen == [{"native": 2}]
    before = len(others.seen)
    other.model.set_attention_backend("_native_math")
    run_other()
    other.model.reset_attention_backend()
    run_other()
    assert len(others.seen) == before


def test_pinning_one_model_does_not_recompile_another() -> None:
    _, run, graphs = compiled("flux")
    other, run_other, others = compiled("flux", seed=1)
    integration.install()
    run()
    compiled_attn.set_attention_backend(other.model, "_native_math")
    run_other()
    run()
    assert graphs.seen == [{"native": 2}]
    assert others.seen == [{"_native_math": 2}]


def test_uninstalled_is_diffusers_own_graph_and_back_is_free() -> None:
    _, run, graphs = compiled("flux")
    for _ in range(2):
        with integration.installed():
            run()
        run()
    assert graphs.seen == [{"native": 2}, {}]


def test_the_mask_of_qwen_comes_and_goes() -> None:
    """Its pipeline passes no mask when nothing is padded; each kind is compiled once."""
    subject, run, graphs = compiled("qwen")
    integration.install()
    mask = subject.inputs["encoder_hidden_states_mask"]
    for given in (mask, None, mask, None):
        subject.inputs["encoder_hidden_states_mask"] = given
        with compiled_attn.attention_backend("_native_math"):
            torch.testing.assert_close(run(), subject(), rtol=1e-5, atol=1e-5)
    assert graphs.seen == [{"_native_math": 2}] * 2


def test_checks_of_values_keep_the_graph_whole() -> None:
    """Upstream DIFFUSERS_ATTN_CHECKS breaks fullgraph."""
    subject, run, graphs = compiled("flux")
    integration.install()
    compiled_attn.set_checks(True)
    torch.testing.assert_close(run(), subject(), rtol=1e-5, atol=1e-5)
    assert graphs.seen == [{"native": 2, "check_values": 2}]
    subject.inputs["hidden_states"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        run()


def test_what_cannot_be_served_is_refused_while_tracing() -> None:
    subject, run, graphs = compiled("flux")
    integration.install()
    subject.model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(Exception, match="no context parallelism"):
        run()
    assert graphs.seen == []


@pytest.mark.parametrize("name", models.NAMES)
def test_the_pin_is_in_the_exported_program(name: str) -> None:
    """Upstream a native backend leaves no trace in an exported program."""
    subject = models.build(name, "cpu", torch.float32, real=False)
    plain = subject()
    integration.install()
    compiled_attn.set_attention_backend(subject.model, "_native_math")
    program = torch.export.export(subject.model, (), subject.inputs)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.compiled_attn._native_math.v1) == CALLS[name]
    integration.uninstall()
    torch.testing.assert_close(program.module()(**subject.inputs)[0], plain, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the demo


class EagerCounter(measure.Counter):
    def __init__(self, name: str) -> None:
        super().__init__("eager")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo promises does not depend on the compiler: none saves most of the time."""
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'compiled_attn[demo]'")
    monkeypatch.setattr(measure, "Counter", EagerCounter)


def run_demo(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    code = demo.main(parser.parse_args([*options, "--device", "cpu", "--steps", "1", "--json"]))
    printed = capsys.readouterr().out
    return code, json.loads(printed) if printed else {}


@pytest.mark.slow
def test_demo_with_inductor_and_a_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'compiled_attn[demo]'")
    options = ("--output", str(tmp_path), "--models", "flux", "--backends", "_native_math", "_native_flash")
    code, results = run_demo(capsys, *options, "--export", "_native_math")
    assert (code, results["failures"]) == (0, [])
    package = results["package"]
    assert (package["model"], package["backend"]) == ("flux", "_native_math")
    assert 0.0 < package["error"] <= results["models"][0]["bound"] < 1e-6
    assert package["bytes"] == (tmp_path / "flux-_native_math.pt2").stat().st_size


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], eager: None) -> None:
    options = ("--quick", "--models", "wan", "qwen", "--backends", *NATIVE, "_native_cudnn", "--diffusers-swap")
    code, results = run_demo(capsys, "--output", str(tmp_path), *options)
    assert (code, results["failures"]) == (0, [])
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"
    for model in results["models"]:
        graphs = {(row["mode"], row["backend"]): row["graphs"] for row in model["rows"]}
        static = {("static", name): [1, 0] for name in NATIVE}
        switch = {("switch", name): [0, 0] for name in NATIVE} | {("switch", "native"): [1, 0]}
        assert graphs == static | switch
        assert list(model["skipped"]) == ["_native_cudnn"]
        for row in model["rows"]:
            assert 0.0 < row["error"] <= model["bound"] < 1e-6
            assert row["first"] > 0.0 and row["returned"] > 0.0 and row["step"] > 0.0
        assert min(model["visible"].values()) > 1e-2
    assert list(results["models"][1]["visible"]) == ["scale doubled", "mask dropped"]
    # their own dispatcher in the same table: a graph for each backend as well, and flash refuses Qwen's mask
    theirs = {one["model"]: {row["backend"]: row for row in one["rows"]} for one in results["diffusers_swap"]}
    assert theirs["wan"]["_native_math"]["graphs_first"] == 1
    assert "refused" in theirs["qwen"]["_native_flash"]
    assert attention_dispatch._AttentionBackendRegistry._active_backend == "native"
    assert not integration.is_installed()


def test_demo_fails_when_a_number_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], eager: None) -> None:
    name = "wrong_scale"

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        return native.math_forward(2 * q, k, v, *rest)

    limits = (Limits(("cpu",), (torch.float32, torch.float64), masks=("none", "key_padding")),)
    register_backend(Backend(name, "twice the scale", limits, Kernels(forward, composite=True)))
    try:
        options = ("--quick", "--output", str(tmp_path), "--models", "flux", "--backends", "_native_math", name)
        code, results = run_demo(capsys, *options)
    finally:
        del registry.BACKENDS[name]
    assert code == 1
    assert [failure.split(":")[0] for failure in results["failures"]] == [
        "flux static wrong_scale",
        "flux switch wrong_scale",
    ]
    assert "is over" in results["failures"][0]


@pytest.mark.slow
def test_benchmark_of_packages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "packages.json"
    options = ("--device", "cpu", "--backends", "native", "_native_math", "--steps", "1", "--json", str(kept))
    assert main(["bench", "packages", *options]) == 0
    assert "_native_math" in capsys.readouterr().out
    rows = {row["backend"]: row for row in json.loads(kept.read_text())["rows"]}
    assert list(rows) == ["native", "_native_math"]
    for row in rows.values():
        assert row["python_free"] and row["bytes"] > 10_000 and 0.0 < row["error"] < 1e-6 > row["from_eager"]
        assert set(row["own_kernels"]).isdisjoint(
            *(other["own_kernels"] for other in rows.values() if other is not row)
        )


def test_the_demo_allows_8_bit_kernels_what_such_noise_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_rounding", lambda name: 0.02 if name == "_native_math" else 0.0)
    subject = models.build("qwen", "cpu", torch.float32, real=False)
    prepared = measure.prepare(subject, ["native", "_native_math"])
    assert measure._bound(prepared, "native") == prepared.bound < 1e-5
    # two calls of noise of 2 %, of which the residual stream keeps the larger part away from the output
    assert 1e-4 < measure._bound(prepared, "_native_math") < 0.04
    assert measure._bound(prepared, "_native_math") < prepared.visible["scale doubled"]


@pytest.mark.slow
def test_demo_fails_when_something_recompiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, eager: None
) -> None:
    build, forwards = models.build, []

    def forgetful(*args: Any, **options: Any) -> models.Subject:
        subject = build(*args, **options)

        def forget(*_: Any) -> None:  # as a model would that changes what Dynamo guards at each step
            forwards.append(None)
            subject.model.config_counter = len(forwards)

        class Counting(type(subject.model)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                assert self.config_counter > 0
                return super().forward(*args, **kwargs)

        subject.model.__class__ = Counting
        forget()
        call = models.Subject.__call__

        class Forgetful(models.Subject):
            def __call__(self, model: Any = None) -> Tensor:
                forget()
                return call(self, model)

        return Forgetful(subject.name, subject.model, subject.inputs, subject.size)

    monkeypatch.setattr(models, "build", forgetful)
    code, results = run_demo(
        capsys, "--quick", "--output", str(tmp_path), "--models", "flux", "--backends", "_native_math"
    )
    assert code == 1
    assert "new graphs" in results["failures"][0] and "expected [1, 0]" in results["failures"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--backends", "flsh"), "unknown attention backend 'flsh'"), (("--rounds", "1"), "--rounds at least 2")],
)
def test_demo_says_what_was_asked_wrongly(
    options: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert demo.main(parser.parse_args(["--output", str(tmp_path / "new"), *options])) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
