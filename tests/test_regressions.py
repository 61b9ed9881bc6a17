"""What was wrong once: each test failed before its fix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import compiled_attn
from compiled_attn import registry
from compiled_attn.state import pin_of

X = torch.randn(1, 8, 2, 16)


class Block(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return compiled_attn.attention(x, x, x)


class Root(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_dropout_with_lse_is_not_lost():
    ones = torch.ones(1, 64, 2, 16)  # without dropout every output is exactly 1
    x = torch.randn(1, 64, 2, 16)
    out, _ = compiled_attn.attention_with_lse(x, x, ones, dropout_p=0.5)
    assert float(out.std()) > 0.01


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "flex"])
def test_no_heads(name):
    none = torch.randn(1, 8, 0, 16, requires_grad=True)
    out, lse = compiled_attn.attention_with_lse(none, none, none, backend=name)
    assert (out.shape, lse.shape) == ((1, 8, 0, 16), (1, 0, 8))


def test_a_container_gives_its_parents_pin_back():
    root = Root()
    compiled_attn.set_attention_backend(root, "_native_math")
    compiled_attn.set_attention_backend(root.blocks, "_native_flash")
    assert [pin_of(block) for block in root.blocks] == ["_native_flash"] * 2
    compiled_attn.reset_attention_backend(root.blocks)
    assert [pin_of(block) for block in root.blocks] == ["_native_math"] * 2
    compiled_attn.reset_attention_backend(root)
    assert [pin_of(block) for block in root.blocks] == [None] * 2


def test_precompile_does_not_make_a_parents_pin_the_modules_own():
    root = Root()
    compiled_attn.set_attention_backend(root, "_native_math")
    compiled_attn.precompile(root.blocks[0], ["native"], X)
    compiled_attn.set_attention_backend(root, "_native_flash")
    assert [pin_of(block) for block in root.blocks] == ["_native_flash"] * 2


@pytest.mark.parametrize("how", [{"switchable": False}, {}])
def test_switch_refuses_a_backend_with_a_state_of_its_own(how):
    name = f"tmp_state_{len(how)}"
    state = None if how else (lambda q, dropout_p: q.new_empty(1, dtype=torch.int64))

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, None, Tensor | None]:
        return v.clone(), None, None if how else torch.ones(1, dtype=torch.int64)

    compiled_attn.register_backend(
        compiled_attn.Backend(
            name,
            "for one test",
            limits=(compiled_attn.Limits(("cpu",), (torch.float32,), gradient=False, lse=False),),
            dense=compiled_attn.Kernels(forward, fake_state=state),
            **how,
        )
    )
    assert compiled_attn.attention(X, X, X, backend=name).shape == X.shape
    with compiled_attn.attention_backend(name), pytest.raises(NotImplementedError, match="chosen at run time"):
        compiled_attn.attention(X, X, X, backend="switch")


def test_switch_trains_a_mask_that_is_made_in_the_graph():
    mask = torch.randn(1, 1, 8, 8, requires_grad=True)
    x = X.clone().requires_grad_()

    def loss(x: Tensor, mask: Tensor, backend: str) -> Tensor:
        y = x * 1.5
        return compiled_attn.attention(y, y, y, mask * 2, backend=backend).sin().sum()

    compiled = torch.compile(lambda x, mask: loss(x, mask, "switch"), backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x, mask), (x, mask))
    wanted = torch.autograd.grad(loss(x, mask, "_native_math"), (x, mask))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [4, (None, 4), (1, 2, 3)])
def test_a_window_that_is_no_pair(window):
    with pytest.raises(ValueError, match=r"window_size=.* must be \(left, right\)"):
        compiled_attn.attention(X, X, X, window_size=window)


def test_questions_about_packed_calls_refuse_masks():
    with pytest.raises(ValueError, match="varlen_attention takes no attn_mask"):
        compiled_attn.why_not("native", X[0], X[0], X[0], torch.ones(1, 8, dtype=torch.bool))


def test_a_broadcast_batch_makes_a_mask_unambiguous():
    x = torch.randn(2, 8, 2, 16)
    mask = torch.rand(1, 8, 8) > 0.3
    torch.testing.assert_close(compiled_attn.attention(x, x, x, mask), compiled_attn.attention(x, x, x, mask[:, None]))


def test_autocast_does_not_make_sense_of_integers():
    whole = torch.ones(1, 8, 2, 16, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="floating point"):
        compiled_attn.attention(whole, whole, whole)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_signs_of_scale_reach_no_kernel(scale):
    """Flash kernels and cuDNN give NaN for them."""
    seen = []

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, None, None]:
        seen.append(rest[4])
        return v.clone(), None, None

    name = f"tmp_scale_{int(scale == 0)}"
    compiled_attn.register_backend(
        compiled_attn.Backend(
            name,
            "for one test",
            limits=(compiled_attn.Limits(("cpu",), (torch.float32,), gradient=False, lse=False),),
            dense=compiled_attn.Kernels(forward),
        )
    )
    compiled_attn.attention(X, X, X, scale=scale, backend=name)
    assert seen == [1.0]


@pytest.mark.parametrize("name", ["flex_copy", "class", "native_varlen"])
def test_names_that_operators_have(name):
    limits = (compiled_attn.Limits(("cpu",), (torch.float32,), gradient=False),)
    kernels = compiled_attn.Kernels(lambda *args: (args[2].clone(), None, None))
    with pytest.raises(ValueError, match="cannot register backend"):
        compiled_attn.register_backend(compiled_attn.Backend(name, "not to be", limits=limits, dense=kernels))
    assert name not in registry.BACKENDS
