"""Eager calls without gradients go to their kernel without the operator, unless something would see it there."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import compiled_attn
from compiled_attn import registry, watch

BACKEND = "triton"  # opaque to the dispatcher, dense and packed; runs on a CPU too


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
        watch.Eager,
        BaseTorchFunctionMode,
        lambda: profile(activities=[ProfilerActivity.CPU]),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["dispatch mode", "function mode", "profiler", "autocast"],
)
def test_seen_by(through, call, watcher):
    with torch.no_grad(), watcher():
        call(torch.randn(2, 17, 4, 16))
    assert len(through) == 1


def test_seen_by_a_profiler_of_another_thread(through):
    x = torch.randn(2, 17, 4, 16)
    with profile(activities=[ProfilerActivity.CPU]):
        thread = threading.Thread(target=dense, args=(x,))
        thread.start()
        thread.join()
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


def negative(x):
    """-x, as a view of x that says so."""
    return torch.conj(torch.complex(torch.zeros_like(x), x)).imag


def test_tensors_that_only_say_they_are_negative(through):
    x, mask = torch.randn(2, 17, 4, 16), torch.randn(1, 1, 17, 17)
    assert negative(x).is_neg()
    torch.testing.assert_close(dense(negative(x)), dense(-x))
    assert len(through) == 1
    torch.testing.assert_close(dense(x, attn_mask=negative(mask)), dense(x, attn_mask=-mask))
    assert len(through) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1},
        {"scale": np.float32(0.5)},
        {"scale": torch.tensor(0.5)},
        {"window_size": (np.int64(3), 0)},
        {"deterministic": 1},
        {"dropout_p": np.float64(0.0)},
    ],
    ids=str,
)
def test_numbers_that_the_dispatcher_converts(through, options):
    """A kernel that launches Triton would choke on them."""
    x = torch.randn(2, 17, 4, 16)
    out = dense(x, **options)
    assert through == ([] if "dropout_p" in options else ["triton"])
    given = {
        name: tuple(map(int, value)) if isinstance(value, tuple) else float(value) for name, value in options.items()
    }
    if "deterministic" in given:
        given["deterministic"] = True
    torch.testing.assert_close(out, dense(x, **given), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_lengths_that_are_no_integers(name):
    x, starts = torch.randn(8, 2, 16), torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises((TypeError, RuntimeError), match="int"):
        compiled_attn.varlen_attention(x, x, x, starts, starts, backend=BACKEND, **{name: 8.0})


@pytest.mark.parametrize("call", [dense, packed])
def test_kernels_run_below_autograd_either_way(through, call, monkeypatch):
    """What a kernel compiles for itself (flex) is guarded on that: it would be compiled once more under a profiler."""
    entry, excluded = registry.BACKENDS[BACKEND], []

    def noted(kernels):
        def forward(*args):
            excluded.append(torch._C._dispatch_tls_is_dispatch_key_excluded("AutogradFunctionality"))
            return kernels.forward(*args)

        return dataclasses.replace(kernels, forward=forward)

    backend = dataclasses.replace(entry.backend, dense=noted(entry.backend.dense), varlen=noted(entry.backend.varlen))
    monkeypatch.setitem(registry.BACKENDS, BACKEND, dataclasses.replace(entry, backend=backend))
    call(torch.randn(2, 17, 4, 16))
    assert (through, excluded) == ([], [True])


@pytest.mark.parametrize("x", [torch.empty(2, 17, 4, 16, device="meta"), torch.nn.Parameter(torch.ones(2, 17, 4, 16))])
def test_meta_tensors_and_subclasses_keep_the_operator(through, x):
    with torch.no_grad():
        assert dense(x).device == x.device
    assert len(through) == 1
