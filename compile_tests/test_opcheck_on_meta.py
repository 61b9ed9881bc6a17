"""What torch.library.opcheck asks, on meta tensors, of each operator whose kernels come from a package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal import optests

from compiled_attn import registry


def operators() -> list[Any]:
    """Parameters (backend, packed) for each operator of the backends that need a package."""
    found: dict[str, tuple[str, bool]] = {}
    for name, entry in registry.BACKENDS.items():
        if entry.backend.packages:
            for operator, is_packed in ((entry.op, False), (entry.varlen_op, True)):
                if operator is not None:
                    found.setdefault(operator._opname, (name, is_packed))  # a partner's serves several
    # those of the Hub are made of the functions of the others
    slow = {name: [pytest.mark.slow] for name, (backend, _) in found.items() if backend.endswith("_hub")}
    return [pytest.param(*one, id=name, marks=slow.get(name, [])) for name, one in found.items()]


@pytest.mark.parametrize(("backend", "is_packed"), operators())
def test_opcheck_on_meta(backend: str, is_packed: bool) -> None:
    """What opcheck runs, of one operator and of its backward, on meta tensors: no library, nor anything in its place.

    opcheck itself lets every call with a meta tensor pass, without a word and unchecked (torch 2.13), so its checks are
    called here. Of test_schema, which compares values to see what is written to, only what needs none.
    """
    entry = registry.find(backend)
    operator, kernels, limits = entry.op, entry.backend.dense, entry.backend.limits
    if is_packed:
        operator, kernels, limits = entry.varlen_op, entry.backend.varlen, entry.backend.varlen_limits
    assert operator is not None
    assert kernels is not None
    trains, takes = kernels.backward is not None, limits[0]
    key_heads = 2 if takes.gqa else 4
    q_shape, k_shape = ((9, 4, 16), (8, key_heads, 16)) if is_packed else ((2, 5, 4, 16), (2, 7, key_heads, 16))
    inputs = [torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in (q_shape, k_shape, k_shape)]
    keep = torch.empty(2, 7, device="meta", dtype=torch.bool)
    mask = torch.empty(2, 1, 5, 7, device="meta", dtype=torch.bool)
    structures: dict[str, tuple[Any, ...]] = {
        "none": (*torch.empty(2, 3, device="meta", dtype=torch.int32).unbind(), 9, 8) if is_packed else (None, None),
        "key_padding": (None, keep), "bool": (mask, None), "float": (mask.bfloat16(), None),
    }  # fmt: skip
    calls = [(structures[kind], 0.0, lse) for kind in takes.masks for lse in {False, takes.lse}]
    if takes.dropout:
        calls.append((structures["none"], 0.3, takes.lse))
    for structure, dropout_p, return_lse in calls:
        options = (dropout_p, 0, None, takes.gqa, None, False)
        args = (*(one.detach().requires_grad_(trains) for one in inputs), *structure, *options, return_lse)
        _checked_on_meta(operator, args, gradients=trains)
        out, lse, state = operator(*args)
        lse_shape = (*q_shape[:-3], q_shape[-2], q_shape[-3])
        assert (out.shape, out.dtype, out.requires_grad) == (q_shape, torch.bfloat16, trains)
        assert (lse.shape, lse.dtype) == (lse_shape if return_lse else (0,), torch.float32)
        assert (state.dim(), state.numel() > 0, state.dtype) == (1, dropout_p > 0.0, torch.int64)
        if trains:
            lse = lse.new_empty(lse_shape)
            args = (torch.empty_like(out), *inputs, *structure, out.detach(), lse, state, *options, False)
            backward = getattr(torch.ops.compiled_attn, f"{operator._opname}_backward").v1
            _checked_on_meta(backward, args, gradients=False)
            assert [one.shape for one in backward(*args)] == [q_shape, k_shape, k_shape, (0,)]


def _checked_on_meta(operator: Any, args: tuple[Any, ...], gradients: bool) -> None:
    given = [one for one in args if isinstance(one, Tensor)]
    versions = [one._version for one in given]
    results = operator(*args)
    assert [one._version for one in given] == versions
    for number, one in enumerate(results):
        assert not any(torch._C._is_alias_of(one, other) for other in (*given, *results[:number]))
    # it looks for what is registered with autograd, for other devices alone, and calls the operator if nothing is
    on_cpu = [torch.empty_like(one, device="cpu") if isinstance(one, Tensor) else one for one in args]
    for one in on_cpu[:3]:
        one.requires_grad_()
    torch.library.opcheck(operator, tuple(on_cpu), test_utils="test_autograd_registration")
    optests.fake_check(operator, args, {})
    for dynamic in (False, True):
        optests.aot_autograd_check(operator, args, {}, dynamic, check_gradients=gradients)
