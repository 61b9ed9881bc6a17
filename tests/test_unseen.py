"""Eager calls without gradients go to their kernel without the operator, unless something would see it there."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_attn
from compiled_attn import registry

BACKEND = "triton"  # opaque to the dispatcher, dense and packed; runs on a CPU too


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def through(monkeypatch):
    """Names of the operators that calls of :data:`BACKEND` went through."""
    entry, names = registry.find(BACKEND), []

    def noted(operator):
        def call(*args):
            names.append(operator._opname)
            return operator(*args)

        return call

    spied = dataclasses.replace(entry, op=noted(entry.op), varlen_op=noted(entry.varlen_op))
    monkeypatch.setitem(registry.BACKENDS, BACKEND, spied)
    return names


def dense(x, **options):
    return compiled_attn.attention(x, x, x, backend=BACKEND, **options)


def packed(x):
    starts = torch.tensor([0, 3, x.shape[0] * x.shape[1]], dtype=torch.int32)
    x = x.flatten(0, 1)
    return compiled_attn.varlen_attention(x, x, x, starts, starts, backend=BACKEND)


@pytest.mark.parametrize("call", [dense, packed])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_left_out(through, call, mode):
    x = torch.randn(2, 17, 4, 16)
    with mode():
        out = call(x)
    assert through == []
    right = call(x.clone().requires_grad_())
    assert len(through) == 1
    torch.testing.assert_close(out, right.detach(), rtol=0, atol=0)
    assert out.is_contiguous()


def test_lse_without_the_operator(through):
    x = torch.randn(2, 17, 4, 16)
    out, lse = compiled_attn.attention_with_lse(x, x, x, backend=BACKEND)
    assert through == []
    x.requires_grad_()
    right = compiled_attn.attention_with_lse(x, x, x, backend=BACKEND)
    assert len(through) == 1
    torch.testing.assert_close((out, lse), (right[0].detach(), right[1]), rtol=0, atol=0)


@pytest.mark.parametrize("call", [dense, packed])
@pytest.mark.parametrize(
    "watcher",
    [
        Operators,
        Functions,
        lambda: profile(activities=[ProfilerActivity.CPU]),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["dispatch mode", "function mode", "profiler", "autocast"],
)
def test_seen_by(through, call, watcher):
    with torch.no_grad(), watcher():
        call(torch.randn(2, 17, 4, 16))
    assert len(through) == 1


@pytest.mark.parametrize("call", [dense, packed])
def test_seen_by_vmap(through, call):
    x = torch.randn(3, 2, 17, 4, 16)
    out = torch.func.vmap(call)(x)
    assert len(through) == 1
    torch.testing.assert_close(out, torch.stack([call(one) for one in x]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_seen_by_a_jit_trace(through):
    x = torch.randn(2, 17, 4, 16)
    with torch.no_grad():
        torch.jit.trace(dense, x, check_trace=False)
    assert len(through) == 1


def test_forward_mode_is_refused_and_not_dropped(through):
    x = torch.randn(2, 17, 4, 16)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        dense(forward_ad.make_dual(x, torch.ones_like(x)))
    assert len(through) == 1


def test_a_tensor_that_only_says_it_is_negative(through):
    x = torch.randn(2, 17, 4, 16)
    negative = torch.conj(torch.complex(torch.zeros_like(x), x)).imag
    assert negative.is_neg()
    with torch.no_grad():
        out = dense(negative)
    assert len(through) == 1
    torch.testing.assert_close(out, dense((-x).requires_grad_()).detach())


@pytest.mark.parametrize("x", [torch.empty(2, 17, 4, 16, device="meta"), torch.nn.Parameter(torch.ones(2, 17, 4, 16))])
def test_meta_tensors_and_subclasses_keep_the_operator(through, x):
    with torch.no_grad():
        assert dense(x).device == x.device
    assert len(through) == 1
