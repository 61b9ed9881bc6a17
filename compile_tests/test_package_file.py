"""The package as a file: its manifest, what is refused and how, and what a call of it gets told."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_in  # noqa: F401
import torch
from packaged import ROOT, Causal, assert_right, block, inputs, make, python
from torch import Tensor, nn

import compiled_attn
from compiled_attn import archive, export
from compiled_attn.registry import Backend

# ------------------------------------------------------------------------------------------------------------- manifest


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


def test_host_features_are_those_that_the_code_may_use() -> None:
    native = set(archive.host()["features"])
    if not hasattr(torch._inductor.config.cpp, "march"):
        pytest.skip("this torch has no cpp.march")
    with torch._inductor.config.patch({"cpp.march": "x86-64-v3"}):
        told = archive.host()
    assert set(told["features"]) <= native & set(told["isa"].split())
    assert native > set(told["features"])  # -march=native may use what Inductor's vector ISA does not name


def test_manifest_lists_the_packages_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from compiled_attn.packages import Package

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


# ------------------------------------------------------------------------------------------------------------- refusals


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


# ------------------------------------------------------------------------------------------------- arguments of package


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


# --------------------------------------------------------------------------------------------------- calls of a package


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
