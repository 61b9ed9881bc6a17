"""Marks for tests by what the installed triton can do, and its interpreter in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from torch.torch_version import TorchVersion

from compiled_attn.packages import Package

TRITON, NUMPY = (TorchVersion(Package(name, name).version() or "0") for name in ("triton", "numpy"))

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install -e '.[dev]'"
)
needs_interpreter = pytest.mark.skipif(
    TRITON < "3.7" and NUMPY >= "2.4",
    reason=f"the interpreter of triton {TRITON} takes int() of arrays, which numpy {NUMPY} refuses; "
    "pip install 'numpy<2.4'",
)
# By version and not by what the library says of it, which is what the tests are for: test_triton_hopper.py sees to it
# that the library takes these and refuses all others.
HAS_GLUON = TRITON >= "3.6" and TRITON < "3.9"
needs_gluon = pytest.mark.skipif(
    not HAS_GLUON, reason=f"the kernel for Hopper is written for the Gluon of triton 3.6 to 3.8, not {TRITON}; refused"
)


ROOT = pathlib.Path(__file__).parent.parent


def run_interpreted(program: str) -> dict[str, str]:
    """What a program beside this file, in a process with Triton's interpreter, found wrong with each of its cases."""
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path)),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / program)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])
