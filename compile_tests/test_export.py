"""Packages: what was chosen is in the code, what does not fit is refused, what a call gets wrong is said.

One compilation takes 6 to 25 s, so tests share packages; those that need one of their own are slow.
"""

from __future__ import annotations

import doctest
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in  # noqa: F401
import torch
import torch.nn.functional as F
from probes import PROBES, factor
from torch import Tensor, nn
from torch._dynamo.utils import counters

import compiled_attn
from compiled_attn import archive, compilation, export, reference
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Limits

ROOT = Path(__file__).parent.parent
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
B, S = torch.export.Dim("B", min=1, max=64), torch.export.Dim("S", min=2, max=256)
DYNAMIC = {"x": {0: B, 1: S}, "keep": {0: B, 1: S}}
HEADS, WIDTH = 2, 16


class Block(nn.Module):
    """Self-attention of (B, S, 32) with a key-padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return compiled_attn.attention(*self.heads(x), key_padding_mask=keep).flatten(2)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return compiled_attn.attention(x, x, x, is_causal=True)


class Varlen(nn.Module):
    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return compiled_attn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens)


def block() -> Block:
    torch.manual_seed(1)
    return Block().eval()


def inputs(batch: int = 2, length: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    keep = torch.rand(batch, length, generator=generator) > 0.3
    keep[0] = False  # a row of the batch with nothing to attend to
    return torch.randn(batch, length, HEADS * WIDTH, generator=generator), keep


def assert_right(out: Tensor, model: Block, x: Tensor, keep: Tensor) -> None:
    """Against float64: at most twice the error of plain PyTorch in float32, plus rounding."""
    with torch.no_grad():
        q, k, v = model.heads(x)
        right = reference.attention(q, k, v, key_padding_mask=keep)[0].flatten(2)
        plain = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=keep[:, None, None])
    error = (plain.transpose(1, 2).flatten(2).nan_to_num() - right).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * right.abs().max().item()
    torch.testing.assert_close(out.double(), right, rtol=0, atol=2 * error + rounding)


def source(path: Path) -> str:
    """The C++ that AOTInductor generated, which it puts into the package."""
    with zipfile.ZipFile(path) as file:
        return "".join(file.read(name).decode() for name in file.namelist() if name.endswith(".cpp"))


def make(folder: Path, name: str, model: nn.Module | None = None, **options: Any) -> Path:
    path = folder / f"{name}.pt2"
    x, keep = inputs()
    options = {"kwargs": {"keep": keep}, "dynamic_shapes": DYNAMIC, **options}
    export.package(block() if model is None else model, (x,), path, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def math_package(folder: Path) -> Path:
    model = block()
    compiled_attn.set_attention_backend(model, "_native_math")
    return make(folder, "math", model)


@pytest.fixture(scope="module")
def flash_package(folder: Path) -> Path:
    return make(folder, "flash", backend="_native_flash")


@pytest.fixture(scope="module")
def switch_package(folder: Path) -> Path:
    return make(folder, "switch", backend="switch")


# ----------------------------------------------------------------------------------------- the backend is in the code


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


# ------------------------------------------------------------------------------------------------------ without Python


def python(script: str, cwd: Path, *arguments: object, timeout: int = 120, path: str = "") -> str:
    """Run ``script`` in a fresh process, which sees this checkout only when ``path`` says so."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


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


# -------------------------------------------------------------------------------------------------------------- switch


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
    for name in ("test_export_double", "test_export_triple"):
        with compiled_attn.attention_backend(name):
            torch.testing.assert_close(run(x, keep=keep), value * (2.0 if name.endswith("double") else 3.0))
    compiled_attn.set_default_backend("test_export_triple")
    torch.testing.assert_close(run(x, keep=keep), value * 3.0)


def register_with_padding() -> None:
    """Two instruments as in probes.py that also take key padding."""
    limits = (Limits(("cpu",), (torch.float32,), masks=("none", "key_padding"), gradient=False),)
    for name, times in (("test_export_double", 2.0), ("test_export_triple", 3.0)):
        if name not in compiled_attn.list_backends():

            def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any, times: float = times) -> tuple[Tensor, None, None]:
                return v * times, None, None

            register_backend(Backend(name, f"{times:g} times value", limits, Kernels(forward)))


def test_switch_refuses_in_a_package_and_goes_on(switch_package: Path) -> None:
    run, (x, keep) = export.load(switch_package), inputs()
    with compiled_attn.attention_backend(PROBES[0]), pytest.raises(RuntimeError, match="not a key_padding mask"):
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


# ------------------------------------------------------------------------------------------------------------ manifest


def test_manifest(math_package: Path, switch_package: Path) -> None:
    content = export.manifest(math_package)
    assert content["format"] == 1
    assert content["torch"] == str(torch.__version__)
    assert content["backend"] == "_native_math"
    assert content["python_free"] is True
    assert (content["triton"], content["cuda"], content["cudnn"], content["packages"]) == (None, None, None, [])
    assert content["device"]["type"] == "cpu"
    assert set(content["host"]) == {"system", "machine", "isa", "features"}
    (operator,) = content["operators"]
    assert operator["schema_version"] == "v1"
    assert operator["schema"] == str(torch.ops.compiled_attn._native_math.v1._schema)
    x, keep = content["inputs"]
    assert (x["name"], x["dtype"], x["device"], keep["name"], keep["dtype"]) == ("x", "float32", "cpu", "keep", "bool")
    batch, length, width = x["shape"]
    assert width == 32 and keep["shape"] == [batch, length]
    assert [(one["min"], one["max"]) for one in (batch, length)] == [(1, 64), (2, 256)]
    assert export.manifest(switch_package)["python_free"] is False
    # torch's own reader sees it too, and no second one
    reader = torch.export.pt2_archive.PT2ArchiveReader(str(math_package))
    assert json.loads(reader.read_string("extra/compiled_attn.json")) == content


def test_manifest_lists_the_packages_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from compiled_attn.registry import Package

    wants = Backend("wants", "", packages=(Package("torch", "torch", "2.0"), Package("gone", "no-such-thing")))
    monkeypatch.setitem(compiled_attn.registry.BACKENDS, "wants", compiled_attn.registry.Entry(wants, 0))
    found = export._packages({"wants"})
    assert [(one["distribution"], one["minimum"]) for one in found] == [("torch", "2.0"), ("no-such-thing", None)]
    assert found[0]["version"] is not None and found[1]["version"] is None


def test_reading_a_manifest_imports_nothing(math_package: Path, tmp_path: Path) -> None:
    script = """
        import sys, compiled_attn
        before = set(sys.modules)
        compiled_attn.export.manifest(sys.argv[1])
        print([name for name in sys.modules if name not in before and not name.startswith("encodings")])
    """
    assert python(script, tmp_path, math_package, path=str(ROOT)).strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ refusals


def rewritten(old: Path, new: Path, edit: Callable[[dict[str, Any]], object], *, seal: bool = True) -> Path:
    """A copy of a package whose manifest was changed, with a checksum that fits if ``seal``."""
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w") as target:
        for one in source.infolist():
            data = source.read(one)
            if one.filename.endswith("extra/compiled_attn.json"):
                content = json.loads(data)
                edit(content)
                if seal:
                    content["checksum"] = archive._checksum(content)
                data = json.dumps(content).encode()
            target.writestr(one.filename, data)
    return new


def change(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return edit


MISFITS = {
    "torch": (change("torch", to="2.3.1+cu121"), r"compiled with torch 2\.3\.1\+cu121, this is .*; use torch 2\.3"),
    "device": (change("device", to={"type": "maia", "architecture": "m1"}), r"compiled for maia \(m1\), .* none here"),
    "cpu": (change("host", "features", to=["avx2", "avx4096"]), "a CPU with .*avx4096, which this one has not"),
    "machine": (change("host", "machine", to="vax"), "compiled on linux vax"),
    "operator": (
        change("operators", 0, "name", to="compiled_attn::gone.v1"), "operator compiled_attn::gone.v1 is not registered"
    ),
    "version": (change("operators", 0, "name", to="compiled_attn::switch.v2"), "here as v1, another schema version"),
    "schema": (change("operators", 0, "schema", to="(Tensor q) -> Tensor"), "switch.v1 has another schema here"),
    "backend": (change("operators", 0, "backend", to="test_export_gone"), "'test_export_gone': needs the moon"),
}  # fmt: skip


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend("test_export_gone", "", available=lambda: ["needs the moon"])
    monkeypatch.setitem(
        compiled_attn.registry.BACKENDS, "test_export_gone", compiled_attn.registry.Entry(backend, number=0)
    )


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.usefixtures("gone", "never_loaded")
@pytest.mark.parametrize("what", MISFITS)
def test_load_refuses(what: str, switch_package: Path, tmp_path: Path) -> None:
    edit, text = MISFITS[what]
    path = rewritten(switch_package, tmp_path / "edited.pt2", edit)
    with pytest.raises(NotImplementedError, match=text) as caught:
        export.load(path)
    assert len(str(caught.value).splitlines()) == 2  # the package, and this one reason


@pytest.mark.usefixtures("gone", "never_loaded")
def test_load_gives_all_reasons_at_once(switch_package: Path, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for what in ("torch", "device", "cpu", "backend"):
            MISFITS[what][0](content)

    path = rewritten(switch_package, tmp_path / "edited.pt2", edit)
    with pytest.raises(NotImplementedError) as caught:
        export.load(path, device="cuda:0")
    assert len(str(caught.value).splitlines()) == 6  # those four, and the device asked for
    for what in ("torch", "device", "cpu", "backend"):
        assert re.search(MISFITS[what][1], str(caught.value))


@pytest.mark.usefixtures("never_loaded")
def test_load_refuses_another_gpu(switch_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(archive, "architecture", lambda *_: "sm_80")
    edit = change("device", to={"type": "cuda", "architecture": "sm_90"})
    path = rewritten(switch_package, tmp_path / "edited.pt2", edit)
    with pytest.raises(NotImplementedError, match="compiled for sm_90, this is sm_80"):
        export.load(path)


def test_an_operator_inside_the_code_need_not_be_here(math_package: Path, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["operators"][0].update(name="compiled_attn::gone.v1", backend="gone")

    run, (x, keep) = export.load(rewritten(math_package, tmp_path / "edited.pt2", edit)), inputs()
    assert_right(run(x, keep=keep), block(), x, keep)


BROKEN = {
    "edited": ({"edit": change("torch", to="2.13.0"), "seal": False}, "it was edited"),
    "missing": ({"edit": lambda content: content.pop("operators")}, "operators is missing"),
    "type": ({"edit": change("python_free", to="yes")}, "python_free is 'yes', of the wrong type"),
    "newer": ({"edit": change("format", to=99)}, "format 99, this compiled_attn reads up to 1"),
    "format": ({"edit": change("format", to=None)}, "no format version"),
    "listing": ({"edit": lambda content: content["files"].popitem()}, "files were added to the package, or removed"),
    "crc": ({"edit": change("files", "archive_format", to=[3, 1])}, "archive_format is not the file it was made with"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_manifest_refuses_an_edited_one(what: str, math_package: Path, tmp_path: Path) -> None:
    options, text = BROKEN[what]
    path = rewritten(math_package, tmp_path / "edited.pt2", **options)
    for call in (export.manifest, export.load):
        with pytest.raises(ValueError, match=text):
            call(path)


def test_manifest_refuses_other_files(math_package: Path, tmp_path: Path) -> None:
    def refused(text: str, path: Path) -> None:
        for call in (export.manifest, export.load):
            with pytest.raises(ValueError, match=text):
                call(path)

    refused("no such file", tmp_path / "nothing.pt2")
    words = tmp_path / "words.pt2"
    words.write_text("not a package")
    refused(r"not a \.pt2 package", words)
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(math_package.read_bytes()[:-1000])
    refused("cut short", cut)
    foreign = tmp_path / "foreign.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), foreign)
    refused("no manifest of ours", foreign)
    more = tmp_path / "more.pt2"
    more.write_bytes(math_package.read_bytes())
    with zipfile.ZipFile(more, "a") as file:
        file.writestr("math/data/aotinductor/model/other.so", b"of somebody else")
    refused("files were added", more)


def test_load_notices_damage(math_package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(math_package) as file:
        largest = max(file.infolist(), key=lambda one: one.file_size)
    data = bytearray(math_package.read_bytes())
    data[largest.header_offset + largest.file_size // 2] ^= 1  # inside the compiled code
    damaged = tmp_path / "damaged.pt2"
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match=f"{re.escape(largest.filename)} is damaged"):
        export.load(damaged)


# ----------------------------------------------------------------------------------------------- arguments of package


@pytest.fixture
def never_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, **__: pytest.fail("compiled"))
    yield


@pytest.mark.usefixtures("never_compiled")
def test_package_refuses_before_compiling(tmp_path: Path) -> None:
    x, path = torch.randn(1, 8, 2, 16), tmp_path / "never.pt2"
    with pytest.raises(ValueError, match="did you mean '_native_math'"):
        export.package(Causal(), (x,), path, backend="_native_mth")
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export.package(Causal(), (x,), tmp_path / "never.zip")
    with pytest.raises(ValueError, match="does not exist"):
        export.package(Causal(), (x,), tmp_path / "nowhere" / "never.pt2")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        export.package(torch.sin, (x,), path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"makes no compiled_attn call: backend 'native'"):
        export.package(nn.Linear(16, 16), (x,), path, backend="native")

    class Repeated(nn.Module):
        def forward(self, x: Tensor, times: int) -> Tensor:
            return compiled_attn.attention(x, x, x) * times

    shapes = {"x": None, "times": torch.export.Dim.DYNAMIC}
    with pytest.raises(ValueError, match="'times' is a number that may vary"):
        export.package(Repeated(), (x, 3), path, dynamic_shapes=shapes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("never_compiled")
def test_package_refuses_to_contradict_a_pin(tmp_path: Path) -> None:
    model = nn.ModuleDict({"first": Causal(), "second": Causal()})
    compiled_attn.set_attention_backend(model["second"], "_native_math")
    with pytest.raises(ValueError, match="second is pinned to '_native_math'"):
        export.package(model, (torch.randn(1, 8, 2, 16),), tmp_path / "never.pt2", backend="_native_flash")
    compiled_attn.set_attention_backend(model, "_native_flash")
    with pytest.raises(ValueError, match="the model is pinned to '_native_flash'"):
        export.package(model, (torch.randn(1, 8, 2, 16),), tmp_path / "never.pt2", backend="native")


def test_failed_package_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(program: object, package_path: str) -> None:
        Path(package_path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", half)
    (tmp_path / "old.pt2").write_bytes(b"old")
    for name in ("new", "old"):
        with pytest.raises(OSError, match="no space left"):
            make(tmp_path, name, backend="_native_math")
    assert [one.name for one in tmp_path.iterdir()] == ["old.pt2"]
    assert (tmp_path / "old.pt2").read_bytes() == b"old"


# ------------------------------------------------------------------------------------------------ calls of a package


def test_call_takes_any_layout(math_package: Path) -> None:
    # AOTInductor's code reads a transposed tensor as if it were contiguous: wrong by 0.7 here, silently (torch 2.13)
    run, model, (x, keep) = export.load(math_package), block(), inputs(3, 11)
    layouts = (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], -1)[..., :32],
    )
    for given in layouts:
        assert not given.is_contiguous()
        assert_right(run(given, keep=keep), model, x, keep)
    expanded = x[:1].expand(3, -1, -1)
    assert_right(run(expanded, keep=keep), model, expanded.contiguous(), keep)


def test_call_says_what_does_not_fit(math_package: Path) -> None:
    run, (x, keep) = export.load(math_package), inputs(3, 11)
    wrong = {
        r"called as \(x, keep=keep\)": lambda: run(x),
        r"as it was exported; got": lambda: run(x, keep),
        "x must be float32, not float64": lambda: run(x.double(), keep=keep),
        r"keep has shape \(3, 10\)": lambda: run(x, keep=keep[:, 1:]),
        r"x has shape \(3, 11, 16\), must be \(.*, 32\)": lambda: run(x[..., :16], keep=keep),
        r"x has shape \(3, 300, 32\), must be \(.* in 2\.\.256, 32\)": lambda: run(
            torch.randn(3, 300, 32), keep=torch.ones(3, 300, dtype=torch.bool)
        ),
        "keep must be a tensor, not NoneType": lambda: run(x, keep=None),
        "x must be on cpu, not meta": lambda: run(x.to("meta"), keep=keep),
    }
    for text, call in wrong.items():
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(ValueError) as caught:
        run(x.double(), keep=keep[:, 1:])
    assert len(str(caught.value).splitlines()) == 3  # both at once
    with pytest.raises(NotImplementedError, match="no backward"):
        run(x.requires_grad_(), keep=keep)
    with torch.no_grad():
        assert_right(run(x, keep=keep), block(), x.detach(), keep)


def test_inputs_of_a_program() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, int], mode: str = "sum") -> Tensor:
            return x[::2] + pair[0] * pair[1]

    half = torch.export.Dim("half", min=2, max=8)
    program = torch.export.export(
        Many(),
        (torch.randn(10), (torch.randn(5), 3)),
        {"mode": "sum"},
        dynamic_shapes={"x": {0: 2 * half}, "pair": ({0: half}, None), "mode": None},
    )
    x, first, second, mode = found = export._inputs(program)
    assert [x["shape"][0][key] for key in ("factor", "offset", "min", "max")] == [2, 0, 2, 8]
    assert x["shape"][0]["symbol"] == first["shape"][0]["symbol"]
    assert (second["constant"], mode["constant"]) == ("3", "'sum'")

    def differences(*given: object) -> int:
        return len(export._differences(found, list(given), None))

    assert differences(torch.ones(8), torch.ones(4), 3, "sum") == 0
    assert differences(torch.ones(8), torch.ones(5), 3, "sum") == 1  # 2 * 5 != 8
    assert differences(torch.ones(9), torch.ones(4), 3, "sum") == 1  # odd
    assert differences(torch.ones(18), torch.ones(9), 3, "sum") == 2  # over the maximum
    assert differences(torch.ones(8), torch.ones(4), 4, "mean") == 2  # AOTInductor drops these without a word


# -------------------------------------------------------------------------------------------------- caches, docstring


def test_marking_keeps_what_the_user_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", "mine;compiled_attn=old")
    compilation.mark_caches()
    tag = torch.compiler.config.cache_key_tag
    compilation.mark_caches()
    assert torch.compiler.config.cache_key_tag == tag == f"mine;compiled_attn={compilation._fingerprint()}"


@pytest.mark.slow
def test_an_upgrade_does_not_run_old_code_from_a_warm_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.utils import fresh_cache

    def hits() -> int:
        torch.compiler.reset()
        counters.clear()
        compiled_attn.compile(block(), fullgraph=True)(inputs()[0])
        return counters["aot_autograd"]["autograd_cache_hit"]

    monkeypatch.setattr(torch.compiler.config, "cache_key_tag", torch.compiler.config.cache_key_tag)
    with fresh_cache(), torch.no_grad():
        assert hits() == 0
        assert hits() == 1
        monkeypatch.setattr(compilation, "_fingerprint", lambda: "upgraded")
        assert hits() == 0


@pytest.mark.slow
def test_example_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (export.package.__doc__ or "").replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, {}, "package", None, None)
    assert len(test.examples) >= 5
    assert doctest.DocTestRunner().run(test).failed == 0
