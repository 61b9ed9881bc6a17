"""The C++ program of examples/cpp, built against the installed torch, runs packages without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from packaged import DYNAMIC, ROOT, Varlen, assert_right, block, inputs

import compiled_attn
from compiled_attn import export

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built program: 15 s of a compiler."""
    build = tmp_path_factory.mktemp("cpp")
    torch_folder = Path(torch.utils.cmake_prefix_path)
    configure = ["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, f"-DCMAKE_PREFIX_PATH={torch_folder}"]
    for command in (configure, ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if "uses CUDA but I cannot find the CUDA" in " ".join(done.stderr.split()):
            pytest.skip("cmake finds no CUDA toolkit, which a CUDA build of torch wants of every C++ program")
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "run_package"


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env={})


@pytest.mark.parametrize("package", ["flash_package", "math_package"])
@pytest.mark.parametrize("size", [(1, 2), (3, 17)], ids=str)
def test_a_package_runs_without_python(program, package, size, request, tmp_path):
    path = request.getfixturevalue(package)
    assert export.manifest(path)["python_free"]
    x, keep = inputs(*size)
    torch.save([x, keep], tmp_path / "inputs.pt")
    done = run(program, path, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    assert done.returncode == 0, done.stderr
    (out,) = torch.load(tmp_path / "outputs.pt")
    assert_right(out, block(), x, keep)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_package_for_a_gpu_runs_without_python(program, backend, tmp_path):
    """Lengths that the package was not made with, and a mask with holes; with `triton` our kernels are inside."""
    model = block().to("cuda", torch.bfloat16)
    given = [tensor.cuda() for tensor in inputs()]
    given[0] = given[0].bfloat16()
    path = tmp_path / "model.pt2"
    export.package(model, tuple(given), path, backend=backend, dynamic_shapes=DYNAMIC, python_free=True)
    for size in ((3, 17), (1, 200)):
        x, keep = (tensor.cuda() for tensor in inputs(*size))
        x = x.bfloat16()
        torch.save([x, keep], tmp_path / "inputs.pt")
        done = run(program, path, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
        assert done.returncode == 0, done.stderr
        (out,) = torch.load(tmp_path / "outputs.pt")
        with torch.no_grad(), compiled_attn.attention_backend(backend):
            torch.testing.assert_close(out, model(x, keep))


@pytest.mark.gpu
def test_packed_sequences_on_a_gpu_run_without_python(program, tmp_path):
    rows, starts = torch.export.Dim("T", min=2, max=4096), torch.export.Dim("N", min=2, max=64)
    x = torch.randn(150, 4, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 60, 150], device="cuda", dtype=torch.int32)
    path = tmp_path / "model.pt2"
    shapes = {"x": {0: rows}, "cu_seqlens": {0: starts}}
    export.package(Varlen(), (x, cu_seqlens), path, backend="triton_varlen", dynamic_shapes=shapes, python_free=True)
    x = torch.randn(517, 4, 64, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, 0, 33, 400, 500], device="cuda", dtype=torch.int32)
    torch.save([x, cu_seqlens], tmp_path / "inputs.pt")
    done = run(program, path, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    assert done.returncode == 0, done.stderr
    (out,) = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(
        out, compiled_attn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens, backend="triton_varlen")
    )


def test_what_needs_python_says_so(program, switch_package, tmp_path):
    torch.save(list(inputs()), tmp_path / "inputs.pt")
    done = run(program, switch_package, tmp_path / "inputs.pt", tmp_path / "outputs.pt")
    assert done.returncode == 1
    assert "compiled_attn::switch" in done.stderr
    assert not (tmp_path / "outputs.pt").exists()


def test_bad_files_are_errors_and_no_crashes(program, tmp_path):
    assert run(program).returncode == 2
    (tmp_path / "torn.pt2").write_bytes(b"PK\x03\x04 and no more")
    done = run(program, tmp_path / "torn.pt2", tmp_path / "none.pt", tmp_path / "outputs.pt")
    assert done.returncode == 1
    assert done.stderr.startswith("run_package: ")
