"""The launcher of Triton kernels: what it compiles anew for, and the copies of a library's functions that use it."""

from __future__ import annotations

import importlib
import sys
import textwrap
import types

import pytest
import torch
from triton_here import needs_triton


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


# ------------------------------------------------------------------------------------------------ a library's functions
class Kernel:
    """As much of a JITFunction as Quick asks for."""

    arg_names = ("X", "length", "scale", "BLOCK")

    def __init__(self):
        self.params = [types.SimpleNamespace(name=name, is_constexpr=name == "BLOCK") for name in self.arg_names]
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments, **named: self.compile(grid, arguments, named)

    def compile(self, grid, arguments, named):
        self.launched.append(("compiled", grid, arguments, named))
        return {grid: lambda *everything: self.launched.append(("ran", everything))}


@needs_triton
def test_a_librarys_kernel_is_compiled_anew_for_what_it_is_specialised_on(monkeypatch):
    from compiled_attn.ops._quick_launch import Quick

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, rows = Kernel(), torch.zeros(64)
    quick = Quick(kernel)

    def launch(*arguments, **named):
        kernel.launched.clear()
        quick[(1,)](*arguments, **named)
        return kernel.launched.pop()

    assert launch(rows, 3, scale=0.5, BLOCK=8) == ("compiled", (1,), (rows, 3), {"scale": 0.5, "BLOCK": 8})
    # named or not, in the order of the kernel's parameters
    assert launch(rows, 5, BLOCK=8, scale=0.25) == ("ran", (rows, 5, 0.25, 8))
    for other in (1, 16, 1 << 31):
        assert launch(rows, other, scale=0.5, BLOCK=8)[0] == "compiled", other
    assert launch(rows, 32, scale=0.5, BLOCK=8)[0] == "ran"
    assert launch(rows, 3, scale=0.5, BLOCK=16)[0] == "compiled"
    assert launch(rows, 3, scale=0.5, BLOCK=8, num_warps=8)[0] == "compiled"
    assert launch(rows[1:], 3, scale=0.5, BLOCK=8)[0] == "compiled"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert launch(rows, 3, scale=0.5, BLOCK=8)[0] == "compiled"


LIBRARY = """
    import torch, triton
    import triton.language as tl

    @triton.jit
    def kernel(X, length, BLOCK: tl.constexpr):
        tl.store(X, length)

    def quantise(x, block=8):
        kernel[(1,)](x, x.numel(), BLOCK=block)
        return x

    def attend(x, *, twice=False):
        return torch.clone(quantise(x)) * (2 if twice else 1)
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    (tmp_path / "some_library.py").write_text(textwrap.dedent(LIBRARY))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_library")
    sys.modules.pop("some_library")


@needs_triton
def test_a_librarys_function_launches_quickly_in_a_copy_and_as_ever_in_its_module(library, monkeypatch):
    from compiled_attn.ops import _quick_launch

    grids = []

    class Recorded(_quick_launch.Quick):
        def __getitem__(self, grid):
            return lambda *arguments, **named: grids.append((grid, arguments, named))

    monkeypatch.setattr(_quick_launch, "Quick", Recorded)
    before = dict(vars(library))
    copy = _quick_launch.quickened(library.attend)
    x = torch.ones(3)
    torch.testing.assert_close(copy(x, twice=True), x * 2)
    assert grids == [((1,), (x, 3), {"BLOCK": 8})]
    assert vars(library) == before
    assert copy.__globals__["quantise"].__globals__["kernel"].kernel is library.kernel
    assert copy.__globals__["torch"] is torch


@needs_triton
def test_what_is_no_function_of_a_library_stays_as_it_is(monkeypatch):
    from compiled_attn.ops._quick_launch import quickened

    for item in (torch.add, torch.nn.Linear, None):
        assert quickened(item) is item
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert quickened(textwrap.dedent) is textwrap.dedent
