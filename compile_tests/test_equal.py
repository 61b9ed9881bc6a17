"""Compiled code computes what eager code computes: every backend, mask kind and alignment; outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from graphs import Counter
from matrix import MASKS_AND_POSITIONS, POSITIONS, Case, backends_and_devices, limits_on, measured, require

import compiled_attn
from compiled_attn import attention, registry

# flex is a traced branch with compiled kernels inside; its own tests compile it
BACKENDS = [each for each in backends_and_devices() if each.values[0] != "flex"]
VARLEN = [each for each in backends_and_devices(varlen=True) if each.values[0] != "flex"]
on_every_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS)


def own_dtype(backend: str, device: str, varlen: bool = False) -> torch.dtype:
    limits = limits_on(backend, device, varlen)
    assert limits is not None
    return limits.dtypes[0]


def served(backend: str, arguments: dict) -> bool:
    options = {name: item for name, item in arguments.items() if name not in ("query", "key", "value")}
    tensors = (arguments[name] for name in ("query", "key", "value"))
    return compiled_attn.why_not(backend, *tensors, **options, return_lse=True) == []


def compare(backend: str, case: Case, how: str, **options) -> None:
    arguments = case.arguments()
    if not served(backend, arguments):
        pytest.skip("Limits: refused; tests/test_numerics.py sees to it that it is")
    counter = Counter(how)

    def call(**kwargs):
        return compiled_attn.attention_with_lse(backend=backend, **kwargs)

    eager = measured(call, arguments)
    compiled = measured(torch.compile(call, fullgraph=True, backend=counter, **options), arguments)
    loose = 2e-5 if case.dtype in (torch.float32, torch.float64) else 2e-2
    for one, other in zip(compiled, eager, strict=True):
        if how == "inductor":  # fuses and reorders, in float32 inside
            torch.testing.assert_close(one, other, atol=loose, rtol=loose)
        else:
            torch.testing.assert_close(one, other)
    assert counter.operators() == [[compiled_attn.backend_info(backend).operator_names()[0]]]
    assert counter.frame_count == 1


@on_every_backend
@pytest.mark.parametrize(("mask", "positions"), MASKS_AND_POSITIONS)
def test_masks_and_positions(backend, device, mask, positions):
    require(backend)
    compare(backend, Case(device, own_dtype(backend, device), key_heads=2, mask=mask, positions=positions), "aot_eager")


@on_every_backend
@pytest.mark.parametrize("mask", ["none", "key_padding", "float"])
@pytest.mark.parametrize("layout", ["transposed", "qkv_slice", "expanded_batch"])
def test_layouts(backend, device, mask, layout):
    require(backend)
    compare(backend, Case(device, own_dtype(backend, device), mask=mask, layout=layout), "aot_eager")


@on_every_backend
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1)], ids=str)
def test_empty_and_single(backend, device, lengths):
    require(backend)
    case = Case(device, own_dtype(backend, device), q_length=lengths[0], k_length=lengths[1])
    compare(backend, case, "aot_eager")


@pytest.mark.slow
@on_every_backend
@pytest.mark.parametrize(
    ("mask", "positions"), [("none", "full"), ("key_padding", "causal"), ("bool", "full"), ("float", "window")]
)
def test_inductor(backend, device, mask, positions):
    require(backend)
    compare(backend, Case(device, own_dtype(backend, device), key_heads=2, mask=mask, positions=positions), "inductor")


@pytest.mark.parametrize("backend", ["native", "switch"])
def test_inductor_once(backend):
    compare(backend, Case(mask="key_padding"), "inductor")


@on_every_backend
@pytest.mark.parametrize("positions", ["full", "causal", "window"])
def test_one_dynamic_graph_for_all_lengths(backend, device, positions):
    require(backend)
    counter = Counter("aot_eager")
    dtype = own_dtype(backend, device)
    probe = Case(device, dtype, q_length=9, k_length=9, positions=positions).arguments()
    if not served(backend, probe):
        pytest.skip("Limits: refused")
    # not every backend that takes key padding takes it together with positions
    takes_padding = served(backend, Case(device, dtype, 2, 9, 9, mask="key_padding", positions=positions).arguments())

    def call(query, key, value, padding):
        return attention(query, key, value, backend=backend, **POSITIONS[positions], key_padding_mask=padding).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for length in (9, 12, 33, 7):
        x = torch.randn(2, length, 4, 16).to(dtype).to(device).requires_grad_()
        padding = None
        if takes_padding:
            padding = (torch.rand(2, length) > 0.4).to(device)
        out, expected = compiled(x, x.cos(), x.sin(), padding), call(x, x.cos(), x.sin(), padding)
        torch.testing.assert_close(out, expected)
        got, right = (torch.autograd.grad(one.sum(), x)[0] for one in (out, expected))
        torch.testing.assert_close(got, right)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, "a new length compiled a new graph"  # (torch may restart while it compiles the first)


@on_every_backend
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_same_tensor_three_times_with_gradients(backend, device, dynamic):
    require(backend)
    x = torch.randn(2, 9, 4, 16).to(own_dtype(backend, device)).to(device).requires_grad_()
    compiled = torch.compile(
        lambda t: attention(t, t, t, backend=backend).sin(), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    (actual,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(attention(x, x, x, backend=backend).sin().sum(), x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@on_every_backend
def test_autocast(backend, device, dtype):
    require(backend)
    inputs = [torch.randn(1, 8, 2, 16, device=device, requires_grad=True) for _ in range(3)]

    def call(*tensors):
        return compiled_attn.attention_with_lse(*tensors, backend=backend)

    with torch.autocast(device, dtype=dtype):
        eager = call(*inputs)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    assert compiled[0].dtype == eager[0].dtype == dtype
    assert compiled[1].dtype == eager[1].dtype == torch.float32
    compiled_gradients, eager_gradients = (
        torch.autograd.grad(out.float().sum(), inputs) for out, _ in (compiled, eager)
    )
    # two roundings of the low dtype: `native` may choose another kernel when it is traced, casts may be ordered anew
    loose = 4 * torch.finfo(dtype).eps
    for one, other in zip((*compiled, *compiled_gradients), (*eager, *eager_gradients), strict=True):
        torch.testing.assert_close(one, other, atol=loose, rtol=loose)


@pytest.mark.parametrize(("backend", "device"), VARLEN)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_packed_sequences(backend, device, causal, dynamic):
    """max_seqlen as a bound from shapes: new lengths of the same total, or of another one, are no new graph."""
    require(backend)
    counter, frames = Counter("aot_eager"), []

    def call(query, key, lengths_q, lengths_k):
        return compiled_attn.varlen_attention(
            query, key, key, lengths_q, lengths_k, is_causal=causal, causal_alignment="lower_right", backend=backend
        ).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    dtype = own_dtype(backend, device, varlen=True)
    for starts_q, starts_k in (([0, 3, 9], [0, 4, 11]), ([0, 1, 9], [0, 11, 11])):
        total = (9, 11) if not dynamic else (starts_q[-1] + starts_q[1], starts_k[-1] + 2 * starts_q[1])
        query, key = (torch.randn(length, 2, 16).to(dtype).to(device).requires_grad_() for length in total)
        lengths = [torch.tensor(starts, dtype=torch.int32, device=device) for starts in (starts_q, starts_k)]
        out, expected = compiled(query, key, *lengths), call(query, key, *lengths)
        torch.testing.assert_close(out, expected)
        for one, other in zip(
            torch.autograd.grad(out.sum(), (query, key)), torch.autograd.grad(expected.sum(), (query, key)), strict=True
        ):
            torch.testing.assert_close(one, other)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, "new lengths compiled a new graph"
    name = registry.find(backend).varlen_op._opname
    assert set(map(tuple, counter.operators())) - {()} == {(name,)}


def test_inputs_without_gradients_next_to_some_with():
    for trained in range(3):
        inputs = [torch.randn(1, 8, 2, 16).requires_grad_(index == trained) for index in range(3)]
        compiled = torch.compile(lambda *t: attention(*t, backend="stand_in"), fullgraph=True, backend="aot_eager")
        (actual,) = torch.autograd.grad(compiled(*inputs).sin().sum(), inputs[trained])
        (expected,) = torch.autograd.grad(attention(*inputs, backend="stand_in").sin().sum(), inputs[trained])
        torch.testing.assert_close(actual, expected)
