"""Activation checkpointing: eager and compiled, contexts and pins; the recomputation runs what the forward ran."""

from __future__ import annotations

import pytest
import torch
from probes import PROBES, factor
from torch import nn
from torch.utils.checkpoint import checkpoint

import compiled_attn
from compiled_attn import attention, attention_backend, set_attention_backend

TWO, THREE = PROBES[1:3]
X = torch.ones(1, 4, 2, 8)


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x.sin()).cos()


def gradient(times: float) -> torch.Tensor:
    x = X.clone().requires_grad_()
    (times * x.sin()).cos().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [TWO, THREE, "_native_math", "switch"])
def test_contexts_with_the_context_fn(name, compiled):
    block = Block()

    def call(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=compiled_attn.checkpoint_context_fn)

    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    with attention_backend(THREE), attention_backend(name):
        out = call(x)
    with attention_backend(PROBES[5]):
        out.sum().backward()
    times = 3.0 if name == "switch" else factor(name) if name in PROBES else 1.0
    torch.testing.assert_close(x.grad, gradient(times))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_static_backends_need_nothing(use_reentrant):
    block = Block()
    call = torch.compile(
        lambda x: checkpoint(block, x, use_reentrant=use_reentrant), fullgraph=True, backend="aot_eager"
    )
    for name in (THREE, TWO):
        x = X.clone().requires_grad_()
        with attention_backend(name):
            out = call(x)
        out.sum().backward()
        torch.testing.assert_close(x.grad, gradient(factor(name)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_pins_need_nothing(use_reentrant, compiled):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    model = Model()
    set_attention_backend(model, THREE)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = X.clone().requires_grad_()
    call(x).sum().backward()
    torch.testing.assert_close(x.grad, gradient(3.0))


def test_the_recomputation_leaves_no_trace():
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        out = checkpoint(Block(), x, use_reentrant=False, context_fn=compiled_attn.checkpoint_context_fn)
    compiled_attn.set_default_backend(TWO)
    out.sum().backward()
    torch.testing.assert_close(x.grad, gradient(3.0))
    assert compiled_attn.active_backend() == TWO
