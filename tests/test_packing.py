"""Keys packed by a key-padding mask: the kernels in Triton's interpreter, and on a GPU against plain PyTorch."""

from __future__ import annotations

import packing_interpreted
import pytest
import torch
from triton_here import needs_interpreter, needs_triton, run_interpreted

from compiled_attn import masks
from compiled_attn.ops._packing import Packing


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What was wrong with each case; "" for a case that is right."""
    return run_interpreted("packing_interpreted.py")


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("case", packing_interpreted.CASES)
def test_interpreted(found, case):
    assert found[case] == ""


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("layout", packing_interpreted.LAYOUTS[:-1])
@pytest.mark.parametrize("mask", packing_interpreted.MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 4608), (3, 0)], ids=str)
def test_on_a_gpu(shape, mask, layout):
    keep = packing_interpreted._mask(*shape, mask).cuda()
    packing = Packing(keep)
    source, target, cu_seqlens = masks.packing(keep)
    for got, right in zip(
        (packing.source, packing._target, packing.cu_seqlens), (source, target, cu_seqlens), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=0)
    keys = [rows.cuda().bfloat16() for rows in packing_interpreted._keys(*shape, layout)]
    for got, rows in zip(packing.pack(*keys), keys, strict=True):
        torch.testing.assert_close(got, rows.flatten(0, 1).index_select(0, source), rtol=0, atol=0)
        got[int(cu_seqlens[-1]) :] = 0.0  # as gradients are
        torch.testing.assert_close(packing.unpacked(got), rows * keep[:, :, None, None], rtol=0, atol=0)


@needs_triton
def test_the_launcher_compiles_anew_for_what_triton_compiles_in():
    """Alignment, dtype, 64-bit integers, constants, warps; nothing else."""
    from compiled_attn.ops import _quick_launch

    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return self.compile

        def compile(self, *arguments, num_warps, **constants):
            launched.append("compiled")
            return {(2, 1, 1): lambda *everything: launched.append("ran")}

    kernel, rows = Kernel(), torch.zeros(64, dtype=torch.float16)

    def launch(*arguments, warps=4, **constants):
        launched.clear()
        _quick_launch.launch(kernel, (2, 1, 1), arguments, constants, warps, None)
        return launched.pop()

    assert launch(rows, 1, 0.5, None, BLOCK=8) == "compiled"
    for again in ((rows, 16, 0.25, None), (rows[32:], 1, 1.0, None)):
        assert launch(*again, BLOCK=8) == "ran"
    assert launch(rows[1:], 1, 0.5, None, BLOCK=8) == "compiled"
    assert launch(rows.bfloat16(), 1, 0.5, None, BLOCK=8) == "compiled"
    assert launch(rows, 1 << 31, 0.5, None, BLOCK=8) == "compiled"
    assert launch(rows, 1, 0.5, rows, BLOCK=8) == "compiled"
    assert launch(rows, 1, 0.5, None, BLOCK=16) == "compiled"
    assert launch(rows, 1, 0.5, None, BLOCK=8, warps=8) == "compiled"
    assert launch(rows, 2, 0.5, None, BLOCK=8) == "ran"
