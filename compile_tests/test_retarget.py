"""An exported program gets another backend without being traced again, and runs it; what cannot run it is refused."""

from __future__ import annotations

import dataclasses

import pytest
import stand_in
import torch
import torch.fx.experimental.symbolic_shapes
from torch import Tensor, nn

import compiled_attn
from compiled_attn.operators import NAMESPACE


class Model(nn.Module):
    """Two calls, one of them packed."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        x = self.project(x)
        x = compiled_attn.attention(x, x, x, is_causal=True)
        flat = x.flatten(0, 1)
        return compiled_attn.varlen_attention(flat, flat, flat, cu_seqlens, cu_seqlens)


class Masked(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return compiled_attn.attention(x, x, x, key_padding_mask=keep, window_size=(3, 3))


class Padded(nn.Module):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return compiled_attn.attention(x, x, x, key_padding_mask=keep)


INPUTS = (torch.randn(2, 8, 4, 16), torch.tensor([0, 5, 5, 16], dtype=torch.int32))


def names(program: torch.export.ExportedProgram) -> list[str]:
    return [node.target.name() for node in program.graph.nodes if getattr(node.target, "namespace", "") == NAMESPACE]


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    with compiled_attn.attention_backend("_native_math"):
        return torch.export.export(Model().eval(), INPUTS)


@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_math", "switch"])
def test_every_call_is_pointed_elsewhere_and_the_numbers_stay(program, backend):
    other = compiled_attn.export.retarget(program, backend)
    assert names(other) == [f"compiled_attn::{backend}.v1", f"compiled_attn::{backend}_varlen.v1"]
    assert names(program) == ["compiled_attn::_native_math.v1", "compiled_attn::_native_math_varlen.v1"]
    torch.testing.assert_close(other.module()(*INPUTS), program.module()(*INPUTS))
    again = compiled_attn.export.retarget(other, "_native_math")
    torch.testing.assert_close(again.module()(*INPUTS), program.module()(*INPUTS), rtol=0, atol=0)


def test_dynamic_lengths_stay_dynamic():
    length = torch.export.Dim("length", min=2, max=64)
    x = torch.randn(2, 8, 4, 16)
    keep = torch.ones(2, 8, dtype=torch.bool)
    shapes = {"x": {1: length}, "keep": {1: length}}
    with compiled_attn.attention_backend("_native_math"):
        program = torch.export.export(Masked(), (x, keep), dynamic_shapes=shapes)
    other = compiled_attn.export.retarget(program, "_native_flash")
    longer = (torch.randn(2, 33, 4, 16), torch.rand(2, 33) > 0.3)
    torch.testing.assert_close(other.module()(*longer), program.module()(*longer))


def test_a_program_survives_saving_after_it_was_retargeted(program, tmp_path):
    other = compiled_attn.export.retarget(program, "native")
    torch.export.save(other, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert names(loaded) == ["compiled_attn::native.v1", "compiled_attn::native_varlen.v1"]
    torch.testing.assert_close(loaded.module()(*INPUTS), program.module()(*INPUTS))


def test_what_the_backend_cannot_serve_is_refused_by_node():
    with compiled_attn.attention_backend("_native_math"):
        program = torch.export.export(Masked(), (INPUTS[0], torch.ones(2, 8, dtype=torch.bool)))
    with pytest.raises(NotImplementedError, match="_native_math: has no sliding window") as refused:
        compiled_attn.export.retarget(program, "stand_in")
    assert "backend 'stand_in' cannot run this program" in str(refused.value)


def of_eights(q, k, v, *rest):
    out, lse, state = stand_in.forward(q, k, v, *rest)
    return out if q.shape[1] % 8 else out.clone(), lse, state  # two graphs, for lengths of two sorts


compiled_attn.register_backend(
    compiled_attn.Backend(
        "tmp_of_eights", "for one sort of length", (stand_in.LIMITS,), compiled_attn.Kernels(of_eights, composite=True)
    )
)


@pytest.mark.skipif(
    not hasattr(torch.fx.experimental.symbolic_shapes.ShapeEnv, "error_on_new_guards"),
    reason="this torch cannot be asked whether tracing adds a condition",
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_kernel_for_some_lengths_only_is_refused_as_export_refuses_it(loaded, tmp_path):
    sizes = {0: torch.export.Dim("batch", max=9), 1: torch.export.Dim("length", min=2, max=64)}
    shapes = {"x": sizes, "keep": sizes}
    inputs = (INPUTS[0], torch.ones(2, 8, dtype=torch.bool))
    with compiled_attn.attention_backend("tmp_of_eights"), pytest.raises(Exception, match="Constraints violated"):
        torch.export.export(Padded(), inputs, dynamic_shapes=shapes)
    with compiled_attn.attention_backend("stand_in"):
        program = torch.export.export(Padded(), inputs, dynamic_shapes=shapes)
    if loaded:
        torch.export.save(program, tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2")
    for _ in range(2):  # the first try leaves no condition behind
        with pytest.raises(NotImplementedError, match="serves only some of its dynamic sizes") as refused:
            compiled_attn.export.retarget(program, "tmp_of_eights")
        assert "export with 'tmp_of_eights'" in str(refused.value)
    other = compiled_attn.export.retarget(program, "native")
    longer = (torch.randn(3, 33, 4, 16), torch.rand(3, 33) > 0.3)
    torch.testing.assert_close(other.module()(*longer), program.module()(*longer))


class Mixed(nn.Module):
    """One call by FlexAttention's own node, one by an operator."""

    def forward(self, x: Tensor) -> Tensor:
        x = compiled_attn.attention(x, x, x, is_causal=True, backend="flex")
        return compiled_attn.attention(x, x, x, backend="native")


def test_a_program_with_flexattention_beside_operators_is_refused_unless_it_may_stay():
    x = torch.randn(1, 32, 2, 16)
    with torch.no_grad():
        program = torch.export.export(Mixed(), (x,), strict=True)
    with pytest.raises(NotImplementedError, match="flex_attention: is FlexAttention's own operator") as refused:
        compiled_attn.export.retarget(program, "_native_math")
    assert "keep_flex=True" in str(refused.value)
    other = compiled_attn.export.retarget(program, "_native_math", keep_flex=True)
    assert names(other)[-1] == "compiled_attn::_native_math.v1"
    assert "flex_attention" in [node.name for node in other.graph.nodes]
    torch.testing.assert_close(other.module()(x), program.module()(x))


class Training(nn.Module):
    """A parameter wants a gradient, so that an opaque operator is asked for lse; ``read``: and somebody reads it."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.factor, self.read = nn.Parameter(torch.ones(())), read

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.factor
        if not self.read:
            return compiled_attn.attention(x, x, x)
        out, lse = compiled_attn.attention_with_lse(x, x, x)
        return out + lse.mean()


def without_lse(*args):
    assert args[-1] is False
    out, _, state = stand_in.forward(*args)
    return out, None, state


compiled_attn.register_backend(
    compiled_attn.Backend(
        "tmp_without_lse",
        "inference only, and no lse",
        (dataclasses.replace(stand_in.LIMITS, lse=False, gradient=False),),
        compiled_attn.Kernels(without_lse),
    )
)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_lse_that_nobody_reads_stops_no_backend(read, loaded, tmp_path):
    with compiled_attn.attention_backend("stand_in"):
        program = torch.export.export(Training(read).eval(), (INPUTS[0],))
    if loaded:
        torch.export.save(program, tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2")
    (call,) = (node for node in program.graph.nodes if getattr(node.target, "namespace", "") == NAMESPACE)
    assert call.args[-1] is True
    if read:
        with pytest.raises(NotImplementedError, match="returns no lse"):
            compiled_attn.export.retarget(program, "tmp_without_lse")
        return
    other = compiled_attn.export.retarget(program, "tmp_without_lse")
    with torch.no_grad():
        torch.testing.assert_close(other.module()(INPUTS[0]), program.module()(INPUTS[0]))
    # one that has it is asked for it as before, and can train
    trained = compiled_attn.export.retarget(program, "_native_math")
    trained.module()(INPUTS[0]).sum().backward()
    assert call.args[-1] is True


def test_unknown_names_and_programs_without_calls_are_refused(program):
    with pytest.raises(ValueError, match="unknown attention backend 'nativ', did you mean 'native'"):
        compiled_attn.export.retarget(program, "nativ")
    plain = torch.export.export(nn.Linear(4, 4), (torch.randn(2, 4),))
    with pytest.raises(ValueError, match="no attention operator of compiled_attn"):
        compiled_attn.export.retarget(plain, "native")


def test_package_takes_a_program(program, tmp_path):
    content = compiled_attn.export.package(program, (), tmp_path / "model.pt2", backend="_native_flash")
    assert content["backend"] == "_native_flash"
    assert {one["backend"] for one in content["operators"]} == {"_native_flash"}
    loaded = compiled_attn.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(loaded(*INPUTS), program.module()(*INPUTS).detach())


def test_package_refuses_a_program_with_other_inputs_or_layouts(program, tmp_path):
    with pytest.raises(ValueError, match=r"pass args=\(\)"):
        compiled_attn.export.package(program, INPUTS, tmp_path / "model.pt2")
    strided = torch.export.export(Model(), (torch.randn(2, 4, 8, 16).transpose(1, 2), INPUTS[1]))
    with pytest.raises(ValueError, match="input 'x' was exported with strides"):
        compiled_attn.export.package(strided, (), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
