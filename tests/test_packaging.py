"""What is shipped: wheel, sdist, editable install, and what importing costs."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CHECKOUT = os.environ | {"PYTHONPATH": str(ROOT)}
# kernel libraries and clients: a call that needs one imports it, nothing else does
FORBIDDEN = (
    "aiter", "diffusers", "flash_attn", "flash_attn_interface", "kernels", "sageattention", "torch_npu", "torch_xla",
    "transformers", "triton", "xformers",
)  # fmt: skip

IMPORT = """
import json, sys, time, torch
before = set(sys.modules)
start = time.process_time()  # what other processes take meanwhile is not ours
import compiled_attn
seconds = time.process_time() - start
print(json.dumps({
    "seconds": seconds, "modules": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized(),
}))
"""

# Runs in an empty folder against an installed copy: nothing of the checkout can help.
USE = """
import importlib.metadata, importlib.util, json, pathlib, torch, compiled_attn, compiled_attn.ops
x = torch.randn(1, 8, 2, 16)
torch.testing.assert_close(
    compiled_attn.attention(x, x, x),
    compiled_attn.attention(x, x, x, backend="_native_math"),
)
package = pathlib.Path(compiled_attn.__file__).parent
print(json.dumps({
    "package": str(package),
    "ops": str(pathlib.Path(compiled_attn.ops.__file__).parent),
    "top": importlib.util.find_spec("ops") is not None,
    "typed": (package / "py.typed").exists(),
    "version": importlib.metadata.version("compiled_attn"),
    "backends": compiled_attn.list_backends(),
}))
"""


def run(*argv: object, cwd: pathlib.Path | None = None, env: Any = None) -> str:
    done = subprocess.run([str(word) for word in argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def settings() -> dict[str, Any]:
    if sys.version_info < (3, 11):
        pytest.skip("needs tomllib")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources() -> set[str]:
    """Every Python file of ours, by its installed path."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "compiled_attn").rglob("*.py")}
    found = {path for path in found if not path.startswith("compiled_attn/ops/")}
    return found | {f"compiled_attn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "ops").glob("*.py")}


def test_import_is_light() -> None:
    runs = [json.loads(run(sys.executable, "-c", IMPORT, env=CHECKOUT)) for _ in range(3)]
    for one in runs:
        loaded = {name.split(".")[0] for name in one["modules"]}
        assert "compiled_attn" in loaded
        assert loaded.isdisjoint(FORBIDDEN), sorted(loaded.intersection(FORBIDDEN))
        assert one["cuda"] is False
    # the quickest: a busy machine makes some of them slow, what we import all of them
    assert min(one["seconds"] for one in runs) < 0.3, [one["seconds"] for one in runs]


def test_ops_refuses_to_be_imported_at_top_level() -> None:
    done = subprocess.run([sys.executable, "-c", "import ops"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "import compiled_attn.ops" in done.stderr


def test_every_package_is_listed() -> None:
    # setuptools ships what is listed, no more: a new folder that is not would be missing from the wheel
    packages = {path.rpartition("/")[0].replace("/", ".") for path in sources() if path.endswith("/__init__.py")}
    listed = settings()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(packages)


def test_link_and_mapping_agree() -> None:
    assert (ROOT / "compiled_attn" / "ops").resolve() == ROOT / "ops"
    assert settings()["tool"]["setuptools"]["package-dir"]["compiled_attn.ops"] == "ops"


def test_constraints_pin_exactly_and_hold_what_is_needed() -> None:
    from packaging.requirements import Requirement

    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version and name.lower() not in pins, line
            pins[name.lower()] = version
    project = settings()["project"]
    groups = project["optional-dependencies"]
    for text in (*project["dependencies"], *groups["demo"], *groups["dev"], *settings()["build-system"]["requires"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name.lower()]), text


# --------------------------------------------------------------------------------------------------------- slow: build


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of what a clone holds: building must not write into the checkout, nor find an old build there."""
    copy = tmp_path_factory.mktemp("clone") / "tree"
    hidden = [name for name in os.listdir(ROOT) if name.startswith(".")]
    ignored = shutil.ignore_patterns(*hidden, "out", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


def build(what: str, tree: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """Build a "wheel" or "sdist" with the setuptools that is installed: no index is asked."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{what}(sys.argv[1]))"
    name = run(sys.executable, "-c", code, output, cwd=tree).strip().split("\n")[-1]
    return output / name


@pytest.fixture(scope="module")
def sdist(tree: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tree: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


def environment(folder: pathlib.Path) -> pathlib.Path:
    """A fresh environment that finds torch where this process does, and nothing that is installed there as editable
    (a path inside a .pth file is searched, the .pth files in it are not read). Returns its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = folder / scripts / ("python.exe" if os.name == "nt" else "python")
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = pathlib.Path(run(python, "-c", code).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def install(python: pathlib.Path, *what: object) -> None:
    pytest.importorskip("pip")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--force-reinstall", *what)


def used(python: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
    folder.mkdir()
    return json.loads(run(python, "-c", USE, cwd=folder))


def contents(wheel: pathlib.Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_wheel_holds_every_source_and_no_top_level_ops(wheel: pathlib.Path) -> None:
    names = contents(wheel)
    assert {name for name in names if name.endswith(".py")} == sources()
    assert "compiled_attn/py.typed" in names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"compiled_attn"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_from_the_sdist_is_the_same(wheel: pathlib.Path, sdist: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = tmp_path.iterdir()
    output = tmp_path / "output"
    output.mkdir()
    again = build("wheel", unpacked, output)
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_installed_wheel(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, wheel)
    facts = used(python, tmp_path / "empty")
    assert facts["package"].startswith(str(tmp_path / "venv"))
    assert facts["ops"] == str(pathlib.Path(facts["package"]) / "ops")
    assert (facts["top"], facts["typed"]) == (False, True)
    assert facts["version"] == settings()["project"]["version"]
    assert "native" in facts["backends"]
    listed = run(python, "-m", "compiled_attn", "list", cwd=tmp_path / "empty")
    assert "\nnative " in listed


@pytest.mark.slow
def test_pip_install_from_the_tree(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, tree)
    facts = used(python, tmp_path / "empty")
    assert facts["package"].startswith(str(tmp_path / "venv"))
    assert (facts["top"], facts["typed"]) == (False, True)


@pytest.mark.slow
def test_editable_install(tree: pathlib.Path, tmp_path: pathlib.Path) -> None:
    python = environment(tmp_path / "venv")
    install(python, "-e", tree)
    facts = used(python, tmp_path / "empty")
    assert facts["package"] == str(tree / "compiled_attn")
    assert pathlib.Path(facts["ops"]).resolve() == tree / "ops"
    assert (facts["top"], facts["typed"]) == (False, True)
