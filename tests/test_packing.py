"""Keys packed by a key-padding mask: the kernels in Triton's interpreter, and on a GPU against plain PyTorch."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import packing_interpreted
import pytest
import torch
from test_triton import needs_triton

from compiled_attn import masks
from compiled_attn.ops._packing import Packing

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What was wrong with each case; "" for a case that is right."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "packing_interpreted.py")]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", packing_interpreted.CASES)
def test_interpreted(found, case):
    assert found[case] == ""


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("layout", packing_interpreted.LAYOUTS)
@pytest.mark.parametrize("mask", packing_interpreted.MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 4608)], ids=str)
def test_on_a_gpu(shape, mask, layout):
    keep = packing_interpreted._mask(*shape, mask).cuda()
    packing = Packing(keep)
    source, target, cu_seqlens = masks.packing(keep)
    torch.testing.assert_close(packing.cu_seqlens, cu_seqlens, rtol=0, atol=0)
    keys = [rows.cuda().bfloat16() for rows in packing_interpreted._keys(*shape, layout)]
    for got, rows in zip(packing.pack(*keys), keys, strict=True):
        torch.testing.assert_close(got, rows.flatten(0, 1).index_select(0, source), rtol=0, atol=0)
        got[int(cu_seqlens[-1]) :] = 0.0
        torch.testing.assert_close(
            packing.unpacked(got), got.index_select(0, target).unflatten(0, shape), rtol=0, atol=0
        )
