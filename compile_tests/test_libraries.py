"""Every backend that is here, swapped in one compiled function, forward and backward.

On a GPU with the kernel libraries that are installed; on a CPU with PyTorch's own kernels.
"""

from __future__ import annotations

import pytest
import torch
from graphs import Counter
from matrix import DEVICES, NAMES, Case, absent, assert_as_good, expectations, largest, measured, names_on
from torch.utils.checkpoint import checkpoint

import compiled_attn
from compiled_attn import (
    attention,
    attention_backend,
    attention_with_lse,
    reference,
    registry,
    varlen_attention,
    why_not,
)

# flex compiles a graph of its own, which would be counted with the function's
LEFT_OUT = ("switch", "flex")


def here(device: str, varlen: bool = False) -> list[str]:
    """Backends that run on ``device`` of this machine without a download."""
    names = [name for name in names_on(device, varlen) if name not in LEFT_OUT and not absent(name)]
    return [registry.usable(name) for name in names]


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_switch_trains_over_every_backend(device, mask):
    """One graph; the backward is that of the forward's backend, whichever is set when it runs."""
    case = Case(device, dtype_on(device), q_length=64, k_length=64, width=64, mask=mask)
    arguments = case.arguments()
    call = {**arguments, "return_lse": True}
    names = [name for name in here(device) if not why_not(name, **call)]
    assert {"native", "_native_math"} <= set(names)
    right, yardstick = expectations(arguments)
    counter = Counter("aot_eager")
    compiled = torch.compile(lambda **kw: attention_with_lse(**kw, backend="switch"), fullgraph=True, backend=counter)
    for _ in range(2):
        for name in names:

            def forward(**kw):
                with attention_backend(name):  # noqa: B023  called at once
                    return compiled(**kw)

            for what, *three in zip(NAMES, measured(forward, arguments), right, yardstick, strict=True):
                assert_as_good(f"{name}: {what}", *three, largest(*right[2:]))
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_switch_trains_over_every_packed_backend(device):
    query, key, value = torch.randn(3, 100, 4, 64, device=device, dtype=dtype_on(device)).unbind()
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    starts = torch.tensor([0, 40, 40, 100], device=device, dtype=torch.int32)
    call = (*leaves, starts, starts, 60, 60)
    names = [name for name in here(device, varlen=True) if not why_not(name, *leaves)]
    assert "native" in names
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    out, _ = reference.varlen_attention(*doubles, starts, starts)
    right = (out.detach(), *torch.autograd.grad(out.square().sum(), doubles))
    counter = Counter("aot_eager")
    compiled = torch.compile(lambda *t: varlen_attention(*t, backend="switch"), fullgraph=True, backend=counter)
    for _ in range(2):
        for name in names:
            with attention_backend(name):
                out = compiled(*call)
            found = (out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves))
            for what, one, expected in zip(("out", "dq", "dk", "dv"), found, right, strict=True):
                error = (one.double() - expected).norm() / expected.norm()
                assert error < (0.02 if device == "cuda" else 1e-5), (name, what, error)
    assert counter.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_sweep_compiles_each_backend_once(device, training):
    """N graphs in the first round, 0 in the second and third."""
    inputs = list(torch.randn(3, 2, 64, 4, 64, device=device, dtype=dtype_on(device)))
    for tensor in inputs:
        tensor.requires_grad_(training)
    names = [name for name in here(device) if not why_not(name, *inputs)]
    assert {"native", "_native_math"} <= set(names)
    right, _ = reference.attention(*(tensor.detach().double() for tensor in inputs))
    counter = Counter("aot_eager")
    compiled = compiled_attn.compile(lambda *t: attention(*t) * 2, fullgraph=True, backend=counter)
    for _ in range(3):
        for name in names:
            with attention_backend(name):
                out = compiled(*inputs)
            if training:
                out.float().square().sum().backward()
            # 8-bit kernels are off by 0.03 here, another function by 0.5 and more
            assert (out.double() / 2 - right).abs().max() < 0.2, name
        assert counter.frame_count == len(names)
    graphs = [one for names_of in counter.backends() for one in names_of]
    assert len(graphs) == len(names) and len(set(graphs)) == len(names)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_dropout_is_that_of_the_forward_when_it_runs_again(device, compiled):
    """With V the identity, out is the matrix of weights left by dropout, by which dv is a product of its transpose."""
    query, key, grad = torch.randn(3, 2, 64, 4, 64, device=device, dtype=dtype_on(device)).unbind()
    value = torch.eye(64, device=device, dtype=query.dtype)[:, None].expand(2, 64, 4, 64).clone()
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    names = [name for name in here(device) if not why_not(name, *inputs, dropout_p=0.3)]
    assert "native" in names
    for name in names:

        def drop(*tensors, backend=name):
            return attention(*tensors, dropout_p=0.3, backend=backend)

        def run(*tensors, drop=drop):
            return checkpoint(drop, *tensors, use_reentrant=False)

        torch.compiler.reset()
        call = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        out = call(*inputs)
        (dv,) = torch.autograd.grad(out, value, grad)
        expected = torch.einsum("bqhk,bqhd->bkhd", out.double(), grad.double())
        torch.testing.assert_close(
            dv.double(), expected, rtol=0.02, atol=0.02, msg=lambda told, name=name: f"{name}: {told}"
        )
        assert (out - call(*inputs)).abs().max() > 0.01, name
