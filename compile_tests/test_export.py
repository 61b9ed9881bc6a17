"""What was chosen is in the package's code, runs there, and `switch` goes on following.

Tests share packages (conftest.py); those that compile one of their own are slow.
"""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import stand_in  # noqa: F401
import torch
import torch.nn.functional as F
from packaged import DYNAMIC, FLASH, ROOT, Causal, Varlen, assert_right, block, inputs, make, python, source
from probes import PROBES, factor
from torch import Tensor, nn
from torch._dynamo.utils import counters

import compiled_attn
from compiled_attn import archive, compilation, export, reference
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.sources import others
from compiled_attn.spec import Limits

# ------------------------------------------------------------------------------------------- the backend is in the code


def test_pinned_math_is_math_in_the_package(math_package: Path) -> None:
    assert FLASH not in source(math_package)
    (operator,) = export.manifest(math_package)["operators"]
    assert (operator["name"], operator["count"], operator["python"]) == ("compiled_attn::_native_math.v1", 1, False)
    run, model = export.load(math_package), block()
    for shape in ((2, 8), (1, 2), (5, 33)):
        x, keep = inputs(*shape)
        assert_right(run(x, keep=keep), model, x, keep)


@pytest.mark.slow
def test_flash_is_flash_in_the_package(flash_package: Path) -> None:
    assert source(flash_package).count(f"aoti_torch_cpu_{FLASH}(") == 1
    run, model = export.load(flash_package), block()
    for shape in ((2, 8), (1, 2), (5, 33)):
        x, keep = inputs(*shape)
        assert_right(run(x, keep=keep), model, x, keep)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["pin", "context", "default", "submodule"])
def test_every_way_to_choose_ends_in_the_package(way: str, tmp_path: Path) -> None:
    model = nn.Sequential(Causal())
    if way == "pin":
        compiled_attn.set_attention_backend(model, "_native_flash")
    elif way == "default":
        compiled_attn.set_default_backend("_native_flash")
    elif way == "submodule":
        compiled_attn.set_attention_backend(model[0], "_native_flash")
    name = "_native_flash" if way == "context" else "_native_math"
    options = {"kwargs": {}, "dynamic_shapes": None}
    x = torch.randn(1, 8, 2, 16)
    if way in ("pin", "submodule", "context"):  # the innermost wins, and a pin is inside
        with compiled_attn.attention_backend(name):
            content = export.package(model, (x,), tmp_path / "way.pt2", **options)
    else:
        content = export.package(model, (x,), tmp_path / "way.pt2", **options)
    assert [one["backend"] for one in content["operators"]] == ["_native_flash"]
    assert content["python_free"]
    assert source(tmp_path / "way.pt2").count(f"aoti_torch_cpu_{FLASH}(") == 1
    right, _ = reference.attention(x, x, x, is_causal=True)
    torch.testing.assert_close(export.load(tmp_path / "way.pt2")(x).double(), right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "switch", "stand_in"])
def test_export_keeps_our_operator(name: str, strict: bool) -> None:
    model = block()
    compiled_attn.set_attention_backend(model, name)
    x, keep = inputs()
    with torch.no_grad(), export._named_arguments(model):
        program = torch.export.export(model, (x,), {"keep": keep}, dynamic_shapes=DYNAMIC, strict=strict)
    assert not hasattr(model.forward, "__signature__")
    assert compiled_attn.export.pin_of(model) == name
    counted = export._operators(program)
    ours = {one.name(): count for one, count in counted.items() if one.namespace == "compiled_attn"}
    assert ours == {f"compiled_attn::{name}.v1": 1}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("name", "fused"), [("_native_math", False), ("native", True), ("_native_flash", True)])
def test_inductor_does_not_turn_pinned_math_into_flash(name: str, fused: bool, training: bool) -> None:
    # Its fuse_attention pass rewrites products round a softmax: so sdpa_kernel(MATH) is lost, silently (torch 2.13).
    from torch._inductor.utils import fresh_cache, run_and_get_code

    def step(x: Tensor) -> Tensor:
        out = compiled(x)
        if training:
            out.sum().backward()
        return out

    compiled = torch.compile(block(), fullgraph=True)
    x, _ = inputs()
    x.requires_grad_(training)
    with fresh_cache(), compiled_attn.attention_backend(name), torch.set_grad_enabled(training):
        out, codes = run_and_get_code(step, x)
    assert len(codes) == 2 if training else 1
    assert [FLASH in code for code in codes] == [fused] * len(codes)
    assert_right(out.detach(), block(), x.detach(), torch.ones(2, 8, dtype=torch.bool))


# ------------------------------------------------------------------------------------------------------- without Python


def test_package_runs_in_a_process_without_this_library(math_package: Path, tmp_path: Path) -> None:
    x, keep = inputs(3, 21)
    torch.save((x, keep), tmp_path / "inputs.pt")
    script = """
        import sys, torch
        run = torch._inductor.aoti_load_package(sys.argv[1])
        x, keep = torch.load("inputs.pt")
        torch.save(run(x, keep=keep), "out.pt")
        print("compiled_attn" in sys.modules)
    """
    assert python(script, tmp_path, math_package).split() == ["False"]
    assert_right(torch.load(tmp_path / "out.pt"), block(), x, keep)


def test_what_needs_python() -> None:
    @torch.library.custom_op("test_export::custom", mutates_args=())
    def custom(x: Tensor) -> Tensor:
        return x.clone()

    @torch.library.triton_op("test_export::inlined", mutates_args=())
    def inlined(x: Tensor) -> Tensor:
        return x.clone()

    ours, mine, aten = torch.ops.compiled_attn, torch.ops.test_export, torch.ops.aten
    needs = [ours.switch.v1, ours.switch_varlen.v1, ours.stand_in.v1, ours.check_values.v1, mine.custom.default]
    free = [
        ours.native.v1,
        ours._native_math.v1,
        mine.inlined.default,
        aten.linear.default,
        torch.ops.prims.add.default,
    ]
    assert [one.name() for one in needs + free if export._needs_python(one)] == [one.name() for one in needs]


def test_python_free_refuses_before_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: pytest.fail("compiled"))
    compiled_attn.set_checks(True)
    with pytest.raises(NotImplementedError, match="run Python") as caught:
        make(tmp_path, "never", backend="switch", python_free=True)
    assert "compiled_attn::switch.v1" in str(caught.value)
    assert "compiled_attn::check_values.v1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_python_free_accepts_native(tmp_path: Path) -> None:
    assert make(tmp_path, "free", backend="native", python_free=True).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["switch", "_native_math", "stand_in"])
def test_varlen_package(name: str, tmp_path: Path) -> None:
    if name == "stand_in":
        name = PROBES[2]
    x, starts = torch.randn(10, 2, 16), torch.tensor([0, 3, 10], dtype=torch.int32)
    tokens = torch.export.Dim("T", min=2, max=64)
    content = export.package(
        Varlen(),
        (x, starts),
        tmp_path / "varlen.pt2",
        backend=name,
        dynamic_shapes={"x": {0: tokens}, "cu_seqlens": None},
    )
    assert content["python_free"] == (name == "_native_math")
    x, starts = torch.randn(13, 2, 16), torch.tensor([0, 9, 13], dtype=torch.int32)
    out = export.load(tmp_path / "varlen.pt2")(x, starts)
    right = factor(name) * x.double() if name in PROBES else reference.varlen_attention(x, x, x, starts, starts)[0]
    torch.testing.assert_close(out.double(), right, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_opaque_backend_of_a_third_party(tmp_path: Path) -> None:
    path = make(tmp_path, "opaque", backend="stand_in")
    content = export.manifest(path)
    assert [(one["backend"], one["python"]) for one in content["operators"]] == [("stand_in", True)]
    x, keep = inputs(3, 12)
    assert_right(export.load(path)(x, keep=keep), block(), x, keep)


@pytest.mark.slow
def test_checks_of_values_are_in_the_package(tmp_path: Path) -> None:
    compiled_attn.set_checks(True)
    path = make(tmp_path, "checked", backend="_native_math")
    compiled_attn.set_checks(False)
    run, (x, keep) = export.load(path), inputs()
    assert not run.manifest["python_free"]
    assert_right(run(x, keep=keep), block(), x, keep)
    with pytest.raises(RuntimeError, match="query holds 512 NaN"):
        run(x.fill_(float("nan")), keep=keep)


# --------------------------------------------------------------------------------------------------------------- switch


def test_switch_in_a_package_follows_contexts(switch_package: Path) -> None:
    run, model = export.load(switch_package), block()
    for shape in ((2, 8), (3, 13)):
        x, keep = inputs(*shape)
        for name in ("_native_math", "_native_flash", "native", "stand_in", "_native_math"):
            with compiled_attn.attention_backend(name), torch.no_grad():
                torch.testing.assert_close(run(x, keep=keep), model(x, keep))
            assert_right(run(x, keep=keep), model, x, keep)
    # numbers that only one backend gives
    x, _ = inputs()
    keep, value = torch.ones(2, 8, dtype=torch.bool), model.heads(x)[2].flatten(2).detach()
    register_with_padding()
    for name in ("tmp_export_double", "tmp_export_triple"):
        with compiled_attn.attention_backend(name):
            torch.testing.assert_close(run(x, keep=keep), value * (2.0 if name.endswith("double") else 3.0))
    compiled_attn.set_default_backend("tmp_export_triple")
    torch.testing.assert_close(run(x, keep=keep), value * 3.0)


def register_with_padding() -> None:
    """Two instruments as in probes.py that also take key padding."""
    limits = (Limits(("cpu",), (torch.float32,), masks=("none", "key_padding"), gradient=False),)
    for name, times in (("tmp_export_double", 2.0), ("tmp_export_triple", 3.0)):
        if name not in compiled_attn.list_backends():

            def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, times: float = times) -> tuple[Tensor, None, None]:
                return v * times, None, None

            register_backend(Backend(name, f"{times:g} times value", limits, Kernels(forward)))


# torch 2.9 keeps the reason from the caller
REFUSED = "not a key_padding mask|API call failed"


def test_switch_refuses_in_a_package_and_goes_on(switch_package: Path) -> None:
    run, (x, keep) = export.load(switch_package), inputs()
    with compiled_attn.attention_backend(PROBES[0]), pytest.raises(RuntimeError, match=REFUSED):
        run(x, keep=keep)
    assert_right(run(x, keep=keep), block(), x, keep)


def test_switch_package_in_two_threads(switch_package: Path, tmp_path: Path) -> None:
    # In a process of its own: without LoadedPackage's lock both threads and the GIL stop for ever (torch 2.13).
    script = """
        import sys, threading, torch, compiled_attn
        sys.setswitchinterval(1e-5)
        torch.set_num_threads(1)
        run = compiled_attn.export.load(sys.argv[1])
        x, keep = torch.randn(1, 8, 32), torch.arange(8)[None] < 5
        from compiled_attn.operators import Kernels
        from compiled_attn.registry import Backend, register_backend
        limits = (compiled_attn.spec.Limits(("cpu",), (torch.float32,), masks=("key_padding",), gradient=False),)
        for name, times in (("two", 2.0), ("three", 3.0)):
            kernels = Kernels(lambda q, k, v, *rest, times=times: (v * 0 + times, None, None))
            register_backend(Backend(name, "a constant", limits, kernels))
        wrong, done = [], []
        def work(name, times):
            with compiled_attn.attention_backend(name), torch.no_grad():
                for _ in range(2000):
                    done.append(1)
                    if not torch.equal(run(x, keep=keep), torch.full((1, 8, 32), times)):
                        wrong.append(name)
        threads = [threading.Thread(target=work, args=one) for one in (("two", 2.0), ("three", 3.0))]
        [one.start() for one in threads], [one.join() for one in threads]
        print(len(done), len(wrong))
    """
    assert python(script, tmp_path, switch_package, path=str(ROOT)).split() == ["4000", "0"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["_native_flash", "_native_cudnn", "_native_efficient", "switch"])
def test_package_on_a_gpu(name: str, tmp_path: Path) -> None:
    length = torch.export.Dim("S", min=2, max=1024)
    x = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    path = tmp_path / "gpu.pt2"
    content = export.package(Causal(), (x,), path, backend=name, dynamic_shapes={"x": {1: length}})
    assert content["device"] == {"type": "cuda", "architecture": archive.architecture("cuda")}
    assert content["cuda"] == torch.version.cuda and content["triton"] is not None
    assert content["python_free"] == (name != "switch")
    run, x = export.load(path), torch.randn(1, 200, 2, 64, device="cuda", dtype=torch.bfloat16)
    right, _ = reference.attention(x, x, x, is_causal=True)
    plain = F.scaled_dot_product_attention(*[x.transpose(1, 2)] * 3, is_causal=True).transpose(1, 2)
    error = (plain.double() - right).abs().max().item()
    rounding = torch.finfo(torch.bfloat16).eps * right.abs().max().item()
    for active in ("native", "_native_flash", "_native_cudnn"):  # switch follows, the others stay
        with compiled_attn.attention_backend(active):
            torch.testing.assert_close(run(x).double(), right, rtol=0, atol=2 * error + rounding)
    with pytest.raises(ValueError, match=r"x must be on cuda:0, not cpu"):
        run(x.cpu())
    with pytest.raises(NotImplementedError, match="compiled for cuda, cannot run on cpu"):
        export.load(path, device="cpu")


# ---------------------------------------------------------------------------------------------------- caches, docstring


def test_marking_keeps_what_the_user_put_there() -> None:
    with torch.compiler.config.patch(cache_key_tag="mine;compiled_attn=old"):
        compilation.mark_caches()
        tag = torch.compiler.config.cache_key_tag
        compilation.mark_caches()
        assert (
            torch.compiler.config.cache_key_tag == tag == f"mine;compiled_attn={compilation.fingerprint() + others()}"
        )


@pytest.mark.slow
def test_an_upgrade_does_not_run_old_code_from_a_warm_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.utils import fresh_cache

    def hits() -> int:
        torch.compiler.reset()
        counters.clear()
        compiled_attn.compile(block(), fullgraph=True)(inputs()[0])
        return counters["aot_autograd"]["autograd_cache_hit"]

    tag = torch.compiler.config.cache_key_tag
    with fresh_cache(), torch.no_grad(), torch.compiler.config.patch(cache_key_tag=tag):
        assert hits() == 0
        assert hits() == 1
        monkeypatch.setattr(compilation, "fingerprint", lambda: "upgraded")
        assert hits() == 0


@pytest.mark.slow
def test_example_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (export.package.__doc__ or "").replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "package", None, None)
    assert len(test.examples) >= 5
    assert doctest.DocTestRunner().run(test).failed == 0
