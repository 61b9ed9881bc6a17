"""CUDA graphs: captured by hand and by mode="reduce-overhead", every backend replays what was asked for, or refuses."""

from __future__ import annotations

import pytest
import torch
from matrix import absent, backends_and_devices, limits_on, require

from compiled_attn import attention, attention_backend, reference, varlen_attention, why_not

pytestmark = pytest.mark.gpu

DENSE = [one for one in backends_and_devices() if one.values[1] == "cuda" and one.values[0] != "switch"]
PACKED = [one for one in backends_and_devices(varlen=True) if one.values[1] == "cuda" and one.values[0] != "switch"]


def dtype_of(backend: str, varlen: bool = False) -> torch.dtype:
    dtypes = limits_on(backend, "cuda", varlen).dtypes
    return torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]


def captured(run):
    """``run`` recorded on a stream of its own, after it warmed up there."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def supported(backend: str, *tensors, **call) -> None:
    require(backend)
    if reasons := why_not(backend, *tensors, **call):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize(("backend", "device"), DENSE)
@pytest.mark.parametrize("masked", [False, True], ids=["none", "key_padding"])
def test_a_captured_call_reads_what_is_there_at_replay(backend, device, masked):
    query, key, value = torch.randn(3, 2, 130, 4, 64, device=device, dtype=dtype_of(backend))
    keep = torch.rand(2, 130, device=device) > 0.3
    more = {"key_padding_mask": keep} if masked else {}
    supported(backend, query, key, value, **more)
    with torch.no_grad():
        graph, out = captured(lambda: attention(query, key, value, **more, backend=backend))
        for _ in range(2):
            for tensor in (query, key, value):
                tensor.normal_()
            keep.copy_(torch.rand(2, 130, device=device) > 0.6)
            graph.replay()
            torch.testing.assert_close(out, attention(query, key, value, **more, backend=backend))
            expected, _ = reference.attention(query, key, value, **more)
            assert (out.double() - expected).abs().max() < 0.2  # another input's is further off than 8-bit kernels are


@pytest.mark.parametrize(("backend", "device"), DENSE)
def test_a_captured_step_of_training(backend, device):
    inputs = list(torch.randn(3, 2, 130, 4, 64, device=device, dtype=dtype_of(backend)))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    supported(backend, *leaves)

    def step():
        out = attention(*leaves, backend=backend)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    graph, grads = captured(step)
    with torch.no_grad():
        for tensor in leaves:
            tensor.normal_()
    graph.replay()
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = torch.autograd.grad(reference.attention(*doubles)[0].square().sum(), doubles)
    for found, right in zip(grads, expected, strict=True):
        assert (found.double() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize(("backend", "device"), PACKED)
def test_captured_lengths_are_data(backend, device):
    """max_seqlen is part of the call; what cu_seqlens says is read at replay."""
    query, key, value = torch.randn(3, 200, 4, 64, device=device, dtype=dtype_of(backend, varlen=True))
    starts = torch.tensor([0, 50, 50, 200], device=device, dtype=torch.int32)
    require(backend)
    try:
        varlen_attention(query, key, value, starts, starts, 200, 200, backend=backend)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    with torch.no_grad():
        graph, out = captured(lambda: varlen_attention(query, key, value, starts, starts, 200, 200, backend=backend))
        for lengths in ([0, 120, 121, 180], [0, 0, 200, 200], [0, 66, 133, 200]):
            for tensor in (query, key, value):
                tensor.normal_()
            starts.copy_(torch.tensor(lengths))
            graph.replay()
            expected, _ = reference.varlen_attention(query, key, value, starts, starts)
            assert (out.double() - expected)[: lengths[-1]].abs().max() < 0.2
            assert not out[lengths[-1] :].any()


def test_reduce_overhead_after_swaps():
    """One compiled function, every backend three times round with inputs of its own: never a replay of another's."""
    x = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.float16)
    names = [name for name, _ in (one.values for one in DENSE) if not absent(name) and not why_not(name, x, x, x)]
    assert {"native", "_native_cudnn", "flex", "triton"} <= set(names)
    graphs = torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()
    graphs.clear()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        call = torch.compile(lambda t: attention(t, t, t) * 2, fullgraph=True, mode="reduce-overhead")
        for _ in range(3):
            for name in names:
                x = torch.randn_like(x)
                expected = 2 * reference.plain(x, x, x)[0]
                with attention_backend(name):
                    torch.testing.assert_close(call(x).clone(), expected, rtol=0.03, atol=0.03)
            assert graphs["unique_graphs"] == len(names)
