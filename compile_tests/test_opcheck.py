"""torch.library.opcheck on every operator: schema, autograd registration, fake tensors, AOT with static and dynamic
shapes; over contiguous, transposed, qkv-sliced and expanded inputs."""

from __future__ import annotations

import pytest
import stand_in  # noqa: F401  registers a backend
import torch
from matrix import limits_on, names_on

import compiled_attn
from compiled_attn import registry

STATIC = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
DYNAMIC = ("test_aot_dispatch_dynamic",)
BACKWARD = ("test_schema", "test_faketensor")  # a backward operator has no formula of its own but the raising one
LAYOUTS = ("contiguous", "transposed", "qkv_slice", "expanded")
shapes = pytest.mark.parametrize("utils", [STATIC, DYNAMIC], ids=["static", "dynamic"])
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def names(varlen: bool) -> list[str]:
    return [name for name in names_on("cpu", varlen) if name != "flex"]


def laid_out(layout: str, index: int, length: int, heads: int = 2, width: int = 8) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(2, heads, length, width).transpose(1, 2)
    if layout == "qkv_slice":
        return torch.randn(2, length, 3, heads, width)[:, :, index]
    if layout == "expanded":
        return torch.randn(1, length, heads, width).expand(2, -1, -1, -1)
    return torch.randn(2, length, heads, width)


def tensors(layout: str, gradient: bool, key_heads: int = 2) -> list[torch.Tensor]:
    found = (laid_out(layout, 0, 5), laid_out(layout, 1, 7, key_heads), laid_out(layout, 2, 7, key_heads))
    return [tensor.detach().requires_grad_(gradient) for tensor in found]


def options(name: str) -> list[tuple]:
    """(mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse) within Limits."""
    limits = limits_on(name, "cpu")
    assert limits is not None
    found = [(None, None, 0.0, 0, None, False, None, False, True), (None, None, 0.0, 1, 0.3, False, None, False, True)]
    if "key_padding" in limits.masks:
        padding = torch.tensor([[False, True, True, False, True, True, True], [False] * 7])
        found.append((None, padding, 0.0, 0, None, False, None, False, True))
    if "bool" in limits.masks:
        found.append((torch.rand(2, 1, 5, 7) > 0.4, None, 0.0, 0, None, False, None, False, True))
        found.append((torch.randn(1, 2, 5, 7), None, 0.0, 0, None, False, None, False, True))
    return found


@shapes
@layouts
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", names(False))
def test_dense_operators(name, gradient, layout, utils):
    op = registry.find(name).op
    cases = options(name)
    if layout != "contiguous":
        cases = cases[:1] if "key_padding" not in limits_on(name, "cpu").masks else cases[:1] + cases[2:3]
    for case in cases:
        torch.library.opcheck(op, (*tensors(layout, gradient), *case), test_utils=utils)
    if not gradient:  # without lse
        torch.library.opcheck(op, tuple(tensors(layout, False)), test_utils=utils)


@pytest.mark.parametrize("name", names(False))
def test_dense_operators_with_grouped_heads(name):
    args = (*tensors("contiguous", True, key_heads=1), None, None, 0.0, 0, None, True, None, False, True)
    torch.library.opcheck(registry.find(name).op, args, test_utils=STATIC)


PACKED = {
    "contiguous": lambda index: torch.randn(9, 2, 8),
    "transposed": lambda index: torch.randn(2, 9, 8).transpose(0, 1),
    "qkv_slice": lambda index: torch.randn(9, 3, 2, 8)[:, index],
    "expanded": lambda index: torch.randn(9, 1, 8).expand(-1, 2, -1),
}


def packed(layout: str, gradient: bool) -> tuple:
    lengths = torch.tensor([0, 2, 2, 8], dtype=torch.int32)
    return (*(PACKED[layout](index).detach().requires_grad_(gradient) for index in range(3)), lengths, lengths.clone())


@shapes
@layouts
@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", names(True))
def test_varlen_operators(name, gradient, layout, utils):
    for causal in (0, 1):
        args = (*packed(layout, gradient), 9, 9, 0.0, causal, None, False, None, False, True)
        torch.library.opcheck(registry.find(name).varlen_op, args, test_utils=utils)


def backward_of(operator: torch._ops.OpOverload) -> torch._ops.OpOverload:
    return getattr(torch.ops.compiled_attn, f"{operator._opname}_backward").v1


OPAQUE = [name for name in names(False) if not compiled_attn.backend_info(name).dense.composite]
OPAQUE_VARLEN = [name for name in names(True) if not compiled_attn.backend_info(name).varlen.composite]


@layouts
@pytest.mark.parametrize("name", OPAQUE)
def test_backward_operators(name, layout):
    backward = backward_of(registry.find(name).op)
    for case in options(name):
        inputs = tensors(layout, False)
        out, lse, state = registry.find(name).op(*inputs, *case)
        for grad in (torch.randn_like(out), torch.randn(()).expand_as(out)):
            args = (grad, *inputs, *case[:2], out, lse, state, *case[2:-1], False)
            torch.library.opcheck(backward, args, test_utils=BACKWARD)


@layouts
@pytest.mark.parametrize("name", OPAQUE_VARLEN)
def test_varlen_backward_operators(name, layout):
    backward = backward_of(registry.find(name).varlen_op)
    inputs = (*packed(layout, False), 9, 9)
    case = (0.0, 1, None, False, None, False)
    out, lse, state = registry.find(name).varlen_op(*inputs, *case, True)
    torch.library.opcheck(
        backward, (torch.randn_like(out), *inputs, out, lse, state, *case, False), test_utils=BACKWARD
    )


def test_a_mask_gradient_of_an_opaque_operator():
    mask = torch.randn(1, 2, 5, 7, requires_grad=True)
    args = (*tensors("contiguous", False), mask, None, 0.0, 0, None, False, None, False, True)
    with compiled_attn.attention_backend("_native_math"):
        torch.library.opcheck(registry.find("switch").op, args, test_utils=(*STATIC, *DYNAMIC))


@layouts
def test_the_operators_that_check_values(layout):
    ops = torch.ops.compiled_attn
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    for mask in (None, torch.randn(1, 2, 5, 7), torch.rand(2, 1, 5, 7) > 0.5):
        torch.library.opcheck(ops.check_values.v1, (*tensors(layout, False), mask), test_utils=utils)
    torch.library.opcheck(ops.check_values_varlen.v1, (*packed(layout, False), 9, 9), test_utils=utils)


def test_opcheck_notices_a_wrong_fake():
    """The checks above can fail: an operator whose kernel returns another dtype than its fake."""
    library = torch.library.Library("compiled_attn_tests", "FRAGMENT")
    library.define("wrong(Tensor x) -> Tensor")
    library.impl("wrong", lambda x: x.double(), "CompositeExplicitAutograd")
    torch.library.register_fake("compiled_attn_tests::wrong", torch.empty_like, lib=library)
    with pytest.raises(Exception, match=r"(?i)dtype"):
        torch.library.opcheck(torch.ops.compiled_attn_tests.wrong.default, (torch.randn(2),), test_utils=BACKWARD)
