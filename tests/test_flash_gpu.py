"""The FlashAttention libraries themselves, on a GPU: what the stand-ins of the other test files cannot know.

Widths up to 128: a build of flash-attn may hold no more. FlashAttention-4 compiles a kernel for each sort of call, so
its quick tests share two, and the others are slow.
"""

from __future__ import annotations

import math

import pytest
import torch
from flash_checks import require_built
from matrix import Case, assert_as_good, largest, plain, require, verify
from test_varlen import LENGTHS, packed
from test_varlen import verify as verify_packed
from torch.utils.checkpoint import checkpoint

import compiled_attn
from compiled_attn import reference

pytestmark = pytest.mark.gpu
FLASH_2 = ("flash", "flash_varlen")
ALL = (*FLASH_2, "_flash_3", "_flash_varlen_3", "_flash_4")
DTYPES = (torch.bfloat16, torch.float16)
slow_4 = pytest.param("_flash_4", marks=pytest.mark.slow)
MANY = (*ALL[:-1], slow_4)
LOWER = {"causal_alignment": "lower_right"}


@pytest.fixture(autouse=True)
def _nan_in_free_memory():
    """What a kernel leaves as it was allocated is NaN, not a lucky 0."""
    pieces = [torch.full((1 << size,), math.nan, device="cuda") for size in (8, 12, 16, 18, 20, 22) for _ in range(4)]
    del pieces


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_forward_lse_and_gradients(backend, mask):
    require(backend)
    verify(backend, Case("cuda", torch.bfloat16, width=64, mask=mask))


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, 72])
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_widths_and_dtypes(backend, dtype, width, mask):
    require(backend)
    if backend in ("flash", "flash_varlen"):
        require_built(width)
    sizes = {"q_length": 150, "k_length": 300, "key_heads": 2}
    verify(backend, Case("cuda", dtype, width=width, mask=mask, layout="transposed", **sizes))


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize("positions", ["causal", "causal_lower", "window", "window_lower", "causal_window"])
@pytest.mark.parametrize("lengths", [(33, 33), (17, 33), (150, 70), (1, 20)], ids=str)
def test_positions(backend, positions, lengths):
    require(backend)
    q_length, k_length = lengths
    verify(backend, Case("cuda", torch.bfloat16, width=64, positions=positions, q_length=q_length, k_length=k_length))


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize("window", [(3, -1), (-1, 2), (2, 80), (-1, 80), (2, 1000)], ids=str)
def test_windows_that_are_open_or_past_the_end(backend, window):
    """With more queries than keys; plain() is the yardstick, which knows windows."""
    require(backend)
    shape, keys = (2, 150, 4, 64), (2, 70, 2, 64)
    inputs = [torch.randn(size, device="cuda").bfloat16().requires_grad_() for size in (shape, keys, keys)]
    options = {"window_size": window, "enable_gqa": True, **LOWER}
    out, lse = compiled_attn.attention_with_lse(*inputs, backend=backend, **options)
    grad = torch.randn_like(out)
    actual = (out, lse, *torch.autograd.grad(out, inputs, grad))
    double = [tensor.detach().double().requires_grad_() for tensor in inputs]
    right = reference.attention(*double, window_size=window, **LOWER)
    right = (*right, *torch.autograd.grad(right[0], double, grad.double()))
    yardstick = plain(*inputs, window_size=window, **LOWER)
    yardstick = (*yardstick, *torch.autograd.grad(yardstick[0], inputs, grad))
    gradients = largest(*right[2:])
    for what, one, expected, plainly in zip(("out", "lse", "dq", "dk", "dv"), actual, right, yardstick, strict=True):
        size = gradients if what.startswith("d") else 0.0
        assert_as_good(what, one.detach(), expected.detach(), plainly.detach(), size)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(backend, lengths):
    require(backend)
    verify_packed(backend, packed(lengths, torch.bfloat16, "cuda", width=64), {})


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window_size": (3, 2)}, {"window_size": (3, -1)}], ids=str)
def test_packed_positions_and_groups(backend, lengths, options):
    require(backend)
    tensors = packed(lengths, torch.bfloat16, "cuda", width=64, key_heads=2)
    verify_packed(backend, tensors, {**options, **LOWER})
    verify_packed(backend, tensors, {**options, **LOWER}, max_seqlen_q=1000, max_seqlen_k=2000)


@pytest.mark.parametrize("backend", MANY)
def test_bounds_of_one_query(backend):
    """Sequences of one query and of none, grouped heads, and the tightest bound."""
    require(backend)
    tensors = [torch.randn(rows, heads, 64, device="cuda").bfloat16() for rows, heads in ((2, 4), (9, 2), (9, 2))]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    starts = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 1, 1, 2], [0, 3, 5, 9])]
    verify_packed(backend, (*tensors, *starts), {}, max_seqlen_q=1, max_seqlen_k=4)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_waits_for_the_device(backend):
    require(backend)
    arguments = Case("cuda", torch.bfloat16, width=64, mask="key_padding").arguments()
    inputs = [arguments[name] for name in ("query", "key", "value")]
    for _ in range(2):
        out = compiled_attn.attention(**arguments, backend=backend)
        torch.autograd.grad(out, inputs, torch.ones_like(out))
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _no_sync_debugging():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", MANY)
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_deterministic_gradients(backend, mask):
    require(backend)
    sizes = {"q_length": 700, "k_length": 700, "heads": 8, "key_heads": 8}
    arguments = Case("cuda", torch.bfloat16, width=64, mask=mask, **sizes).arguments()
    inputs = [arguments[name] for name in ("query", "key", "value")]
    runs = []
    for _ in range(3):
        out = compiled_attn.attention(**arguments, deterministic=True, backend=backend)
        runs.append(torch.autograd.grad(out, inputs, torch.ones_like(out)))
    for run in runs[1:]:
        for one, first in zip(run, runs[0], strict=True):
            torch.testing.assert_close(one, first, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FLASH_2)
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_dropout_under_checkpointing(backend, mask):
    """The forward runs again inside backward: with another dropout mask, gradients would be of another function."""
    require(backend)
    arguments = Case("cuda", torch.float16, width=64, mask=mask, q_length=64, k_length=64).arguments()
    inputs = [arguments.pop(name) for name in ("query", "key", "value")]
    options = {**arguments, "dropout_p": 0.3, "deterministic": True, "backend": backend}

    def run(*tensors):
        return compiled_attn.attention(*tensors, **options)

    found = []
    for again in (False, True):
        torch.manual_seed(11)
        out = checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)
        found.append((out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))))
    for plainly, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plainly, rtol=0, atol=0)
    # out is linear in V with one mask for both: <1, out> = <dv, V>; sums of 16k rounded values
    out, _, _, dv = found[0]
    total = (dv.double() * inputs[2].double()).sum()
    torch.testing.assert_close(out.double().sum(), total, rtol=0, atol=0.002 * out.double().abs().sum().item())
    assert (out - run(*inputs)).abs().max() > 0.01


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_cuda_graph(backend, mask):
    """Forward and backward captured once, replayed with other inputs and another mask."""
    require(backend)
    case = Case("cuda", torch.bfloat16, width=64, mask=mask)
    arguments = case.arguments()
    inputs = [arguments[name] for name in ("query", "key", "value")]

    def run():
        out = compiled_attn.attention(**arguments, backend=backend)
        return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    torch.manual_seed(5)
    fresh = case.arguments()
    with torch.no_grad():
        for name in fresh:
            if isinstance(fresh[name], torch.Tensor):
                arguments[name].copy_(fresh[name])
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    expected = run()
    for one, right in zip(replayed, expected, strict=True):
        # atomic additions in the backward: their order changes
        torch.testing.assert_close(one, right, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(backend, dynamic):
    require(backend)
    torch._dynamo.reset()

    def run(query, key, value, keep):
        out = compiled_attn.attention(query * 2, key, value, key_padding_mask=keep, backend=backend)
        return out + compiled_attn.attention(query, key, value, backend=backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (40, 56):
        inputs = [torch.randn(2, length, 4, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3)]
        keep = torch.rand(2, length, device="cuda") > 0.4
        results = []
        for call in (run, compiled):
            out = call(*inputs, keep)
            results.append((out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out))))
        for one, right in zip(*reversed(results), strict=True):
            torch.testing.assert_close(one, right, rtol=0.03, atol=0.03)
        if not dynamic:
            break
