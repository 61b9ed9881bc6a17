"""The real xFormers on a GPU: both of its operators, forward, lse and backward, against float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from flash_checks import require_built
from graphs import Counter
from matrix import MASKS_AND_POSITIONS, Case, require, verify
from test_varlen import LENGTHS, packed
from test_varlen import POSITIONS as PACKED_POSITIONS
from test_varlen import verify as verify_packed

import compiled_attn
from compiled_attn import attention, attention_with_lse, varlen_attention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _installed():
    require("xformers")


def made(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("mask", "positions"), MASKS_AND_POSITIONS)
def test_masks_and_positions(mask, positions, dtype):
    for key_heads, lengths in ((4, (17, 33)), (2, (33, 17))):
        q_length, k_length = lengths
        verify(
            "xformers",
            Case(
                "cuda", dtype, q_length=q_length, k_length=k_length, key_heads=key_heads, mask=mask, positions=positions
            ),
        )


@pytest.mark.parametrize("width", [20, 64, 128, 256, 320])
def test_widths(width):
    # then xFormers takes its kernels up to 256 from there
    if width <= 256 and importlib.util.find_spec("flash_attn") is not None:
        require_built(width)
    verify("xformers", Case("cuda", torch.bfloat16, width=width, mask="key_padding"))
    verify("xformers", Case("cuda", torch.float16, width=64, value_width=width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("positions", PACKED_POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(lengths, positions, dtype):
    verify_packed("xformers", packed(lengths, dtype, "cuda", key_heads=2), PACKED_POSITIONS[positions])


def test_packed_causal_of_one_tensor_of_lengths():
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value, starts, _ = packed("rows_behind", dtype, "cuda")
        verify_packed("xformers", (query, key, value, starts, starts), {"is_causal": True})


@pytest.mark.parametrize("mask", ["float", "float_row"])
def test_gradient_of_a_mask(mask):
    case = Case("cuda", torch.float32, mask=mask)
    arguments = case.arguments()
    bias = arguments["attn_mask"].clamp(min=-3).detach().requires_grad_()
    arguments["attn_mask"] = bias
    out = attention(**arguments, backend="xformers")
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, bias, grad)
    (expected,) = torch.autograd.grad(compiled_attn.reference.attention(**arguments)[0], bias, grad.double())
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3, check_dtype=False)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("masked", ["none", "key_padding", "float"])
def test_fullgraph(masked, dynamic):
    counter = Counter("aot_eager")

    def call(query, key, value, keep, bias):
        return attention(query, key, value, bias, key_padding_mask=keep, backend="xformers")

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=dynamic)
    for length in (64, 96) if dynamic else (64,):
        query, key, value = (made(2, length, 4, 64) for _ in range(3))
        keep = torch.rand(2, length, device="cuda") > 0.4 if masked == "key_padding" else None
        bias = torch.randn(2, 1, length, length, device="cuda").bfloat16() if masked == "float" else None
        out, eager = compiled(query, key, value, keep, bias), call(query, key, value, keep, bias)
        torch.testing.assert_close(out, eager, rtol=0, atol=0)
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, (query, key, value), grad)
        for one, right in zip(found, torch.autograd.grad(eager, (query, key, value), grad), strict=True):
            torch.testing.assert_close(one, right, atol=2e-2, rtol=2e-2)  # its flash backward adds in any order
    assert counter.operators()[0] == ["xformers"]


@pytest.mark.parametrize("masked", ["none", "key_padding", "float", "packed"])
def test_cuda_graphs(masked):
    """Captured once, forward and backward; replayed with other numbers and another mask."""
    inputs = [made(2, 64, 4, 64) for _ in range(3)]
    keep = torch.rand(2, 64, device="cuda") > 0.4
    bias = torch.randn(2, 1, 64, 64, device="cuda").bfloat16()
    starts = torch.tensor([0, 50, 50, 128], dtype=torch.int32, device="cuda")
    grad = torch.randn(2, 64, 4, 64, device="cuda").bfloat16()

    def step():
        if masked == "packed":
            flat = [one.flatten(0, 1) for one in inputs]
            out = varlen_attention(*flat, starts, starts, 128, 128, backend="xformers").unflatten(0, (2, 64))
        else:
            given = {"key_padding": {"key_padding_mask": keep}, "float": {"attn_mask": bias}}.get(masked, {})
            out = attention(*inputs, **given, backend="xformers")
        return out, *torch.autograd.grad(out, inputs, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for one in (*inputs, bias):
            one.copy_(torch.randn_like(one))
        keep.copy_(torch.rand(2, 64, device="cuda") > 0.4)
        starts.copy_(torch.tensor([0, 3, 70, 128], dtype=torch.int32))
    graph.replay()
    for one, right in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, right, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("masked", ["none", "key_padding", "float"])
def test_nothing_waits_for_the_device(masked):
    query, key, value = (made(2, 64, 4, 64) for _ in range(3))
    keep = torch.rand(2, 64, device="cuda") > 0.4 if masked == "key_padding" else None
    bias = torch.randn(2, 1, 64, 64, device="cuda").bfloat16() if masked == "float" else None
    starts = torch.tensor([0, 50, 64], dtype=torch.int32, device="cuda")

    def step():
        attention_with_lse(query, key, value, bias, key_padding_mask=keep, backend="xformers")[0].sum().backward()
        for dtype in (torch.bfloat16, torch.float32):
            one = query[0].to(dtype)
            varlen_attention(one, one, one, starts, starts, backend="xformers").sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_dropout(masked):
    """out = W V with one W for all of V: <g, out> = <dv, V>."""
    query, key, value = (made(2, 64, 4, 64) for _ in range(3))
    keep = torch.rand(2, 64, device="cuda") > 0.4 if masked else None
    torch.manual_seed(5)
    out = attention(query, key, value, key_padding_mask=keep, dropout_p=0.3, backend="xformers")
    torch.manual_seed(5)
    again = attention(query, key, value, key_padding_mask=keep, dropout_p=0.3, backend="xformers")
    torch.testing.assert_close(out, again, rtol=0, atol=0)
    whole = attention(query, key, value, key_padding_mask=keep, backend="xformers")
    assert (out - whole).abs().max() > 0.05
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, value, grad)
    size = (grad.double() * out.double()).abs().sum()
    difference = (grad.double() * out.double()).sum() - (dv.double() * value.double()).sum()
    assert abs(float(difference / size)) < 1e-3
