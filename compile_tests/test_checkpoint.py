"""Activation checkpointing: eager and compiled, contexts and pins; the recomputation runs what the forward ran."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import stand_in  # noqa: F401  registers the backend
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from probes import PROBES, factor
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import compiled_attn
from compiled_attn import attention, attention_backend, registry, set_attention_backend

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


# ---------------------------------------------------------------------------------------------- selective policies

# One kernel, behind an opaque operator and behind one that compilers look into; each counts how often it ran.
RAN: Counter[str] = Counter()


def _counting(name: str, inlined: bool) -> None:
    kernels = registry.find("stand_in").backend.dense
    assert kernels is not None

    def forward(*args):
        RAN[name] += 1
        return kernels.forward(*args)

    registry.register_backend(
        replace(
            registry.find("stand_in").backend,
            name=name,
            dense=compiled_attn.Kernels(forward, kernels.backward, inlined=inlined),
        )
    )


_counting("counting_opaque", False)
_counting("counting_inlined", True)
Y = torch.randn(1, 6, 2, 8)


def operator(name: str) -> Any:
    return getattr(torch.ops.compiled_attn, name).v1


def by_function(name: str) -> Any:
    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == operator(name) else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def attend(x: torch.Tensor) -> torch.Tensor:
    return attention(x.sin(), x.cos(), x).sin()


class Attend(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x)


def right() -> torch.Tensor:
    x = Y.clone().requires_grad_()
    with attention_backend("_native_math"):
        attend(x).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("how", ["torch's contexts", "list", "function"])
@pytest.mark.parametrize("name", ["counting_opaque", "counting_inlined", "switch"])
def test_a_policy_saves_our_operators_in_eager_code(name, how, saved):
    chosen = operator(name) if saved else torch.ops.aten.sin.default
    policy = by_function(name if saved else "stand_in") if how == "function" else [chosen]
    if how == "torch's contexts":
        context_fn = functools.partial(create_selective_checkpoint_contexts, policy)
    else:
        context_fn = functools.partial(compiled_attn.checkpoint_context_fn, policy)
    runs = "counting_opaque" if name == "switch" else name
    x = Y.clone().requires_grad_()
    RAN.clear()
    pinned = how == "torch's contexts"  # what a context chose is lost in the recomputation
    block = Attend()
    if pinned or name == "switch":
        set_attention_backend(block, name)
    with attention_backend(runs):
        out = checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
    assert {runs: 1} == RAN
    if pinned and name == "switch" and not saved:
        with pytest.raises(RuntimeError, match="was recomputed inside backward"):
            out.sum().backward()
        return
    out.sum().backward()
    assert {runs: 1 if saved else 2} == RAN
    torch.testing.assert_close(x.grad, right(), rtol=1e-4, atol=1e-5)


def test_a_second_backward_recomputes_again():
    x = Y.clone().requires_grad_()
    context_fn = functools.partial(compiled_attn.checkpoint_context_fn, [torch.ops.aten.mm.default])
    with attention_backend("counting_opaque"):
        out = checkpoint(attend, x, use_reentrant=False, context_fn=context_fn)
    RAN.clear()
    for turn in (1, 2):
        x.grad = None
        out.sum().backward(retain_graph=True)
        assert {"counting_opaque": turn} == RAN
        torch.testing.assert_close(x.grad, right(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("how", ["torch's contexts", "list", "function"])
@pytest.mark.parametrize("name", ["counting_opaque", "triton", "switch"])
def test_a_policy_saves_our_operators_in_compiled_code(name, how, saved):
    """What is in the backward's graph is what is recomputed; of an inlined operator, the products it is made of."""
    policy = [operator(name)] if saved else [torch.ops.aten.mm.default]
    if how == "function":
        policy = by_function(name if saved else "stand_in")
    make = create_selective_checkpoint_contexts if how == "torch's contexts" else compiled_attn.checkpoint_context_fn
    graphs: list[list[str]] = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    call = torch.compile(
        lambda x: checkpoint(attend, x, use_reentrant=False, context_fn=functools.partial(make, policy)),
        fullgraph=True,
        backend=compiler,
    )
    x = Y.clone().requires_grad_()
    with attention_backend("counting_opaque"), attention_backend(name):
        out = call(x)
    if name == "switch" and not saved and how == "torch's contexts":
        with pytest.raises(RuntimeError, match="was recomputed inside backward"):
            out.sum().backward()
        return
    out.sum().backward()
    forward, backward = graphs
    torch.testing.assert_close(x.grad, right(), rtol=1e-4, atol=1e-5)
    forwards = "aten.exp.default" if name == "triton" else f"compiled_attn.{name}.v1"
    assert forwards in forward
    kept = saved or name == "switch"
    assert (forwards in backward) == (not kept), backward
