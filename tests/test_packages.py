"""Packages that backends need: every way not to be there is told apart, signatures are probed, copies look again."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import sys
import types

import pytest
import torch

from compiled_attn.ops._hub_kernel import HubKernel
from compiled_attn.packages import Package, Unfit, accepts, require


def test_packages_are_told_apart(tmp_path, monkeypatch):
    """Absent, of another distribution, too old, broken, unfit: each is its own reason."""
    (tmp_path / "broken_thing.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    (tmp_path / "odd_thing.py").write_text("def attend(q, k): ...")
    monkeypatch.syspath_prepend(tmp_path)
    assert Package("no_thing", "no-thing", install="make one").missing() == [
        "module 'no_thing' is not installed; make one"
    ]
    assert "is there, but not from 'no-thing'" in Package("odd_thing", "no-thing", "1.0").missing()[0]
    monkeypatch.setitem(sys.modules, "stub_thing", types.ModuleType("stub_thing"))  # loaded, and without a spec
    stub = Package("stub_thing", "stub-thing", bind=lambda module: require(module, "attend"))
    assert stub.missing() == ["stub-thing: has no attend"]
    version = importlib.metadata.version("torch")
    assert f"torch {version} is older than 999" in Package("torch", "torch", "999").missing()[0]
    broken = Package("broken_thing", "broken-thing")
    wanted = "broken-thing is installed but broken: OSError: libcudart.so.12: cannot open shared object file"
    assert broken.missing() == [wanted]
    with pytest.raises(NotImplementedError, match=r"libcudart\.so\.12"):
        broken.load()
    unfit = Package("odd_thing", "odd-thing", bind=lambda module: require(module, "attend", "q", "scale"))
    assert unfit.missing() == ["odd-thing: attend takes no scale"]
    assert Package("odd_thing", "odd-thing", bind=lambda module: require(module, "attend", "q")).missing() == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_a_loaded_package_can_be_copied_and_looks_for_itself(copied):
    loaded = Package("math", "math", bind=dir)
    assert "sqrt" in loaded.load()
    broken = Package("no_thing", "no-thing")
    broken.__dict__["broken"] = ["as of yesterday"]
    for package in (loaded, Package("torch", "torch"), broken, HubKernel("kernels", "kernels", repo="a/b", pinned=3)):
        again = copied(package)
        assert again == package and type(again) is type(package)
        assert not {"loaded", "broken"} & set(vars(again))
    torch_itself = Package("torch", "torch")
    assert torch_itself.load() is torch
    assert copied(torch_itself).load() is torch


def test_parameters_of_operators_are_in_their_schema():
    for operator in (torch.ops.aten.addmm, torch.ops.aten.addmm.default):
        assert accepts(operator, "mat2") and not accepts(operator, "mat3")
    assert require(torch.ops, "aten.addmm", "self", "mat1", "beta") is torch.ops.aten.addmm
    with pytest.raises(Unfit, match="addmm takes no mat3"):
        require(torch.ops, "aten.addmm", "mat2", "mat3")
    with pytest.raises(Unfit, match=r"has no nowhere\.at_all"):
        require(torch, "nowhere.at_all", "mat2")

    def hidden(*args, **kwargs): ...

    with pytest.raises(Unfit, match="takes no mat1"):
        require(types.SimpleNamespace(hidden=hidden), "hidden", "mat1")
    require(types.SimpleNamespace(hidden=hidden), "hidden", "mat1", operator=torch.ops.aten.addmm)


def test_what_a_library_made_an_operator_of_is_taken_below_it():
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    module = types.SimpleNamespace(twice=torch.library.custom_op("tmp_packages::twice", twice, mutates_args=()))
    assert require(module, "twice", "x") is twice
