"""Packed sequences: every varlen backend against the float64 reference, lengths that make no sense, no host sync."""

from __future__ import annotations

import math

import pytest
import torch
from matrix import POSITIONS, assert_as_good, backends_and_devices, largest, limits_on, plain, require

import compiled_attn
from compiled_attn import reference

on_every_backend = pytest.mark.parametrize(("backend", "device"), backends_and_devices(varlen=True))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# starts of the sequences of query and key: uneven, empty ones in the middle and at both ends, rows behind the last
LENGTHS = {
    "one": ([0, 17], [0, 33]),
    "uneven": ([0, 3, 20, 21], [0, 9, 10, 33]),
    "empty_inside": ([0, 0, 5, 5, 17], [0, 4, 4, 9, 20]),
    "rows_behind": ([0, 6, 11], [0, 6, 11]),
    "no_keys": ([0, 5, 9], [0, 0, 7]),
    "nothing": ([0, 0, 0], [0, 0, 0]),
}


def packed(lengths, dtype, device, heads=4, key_heads=4, width=16, value_width=16):
    starts_q, starts_k = LENGTHS[lengths]
    rest = 2 if lengths == "rows_behind" else 0
    shapes = (starts_q[-1] + rest, heads, width), (starts_k[-1] + rest, key_heads, width)
    shapes = (*shapes, (starts_k[-1] + rest, key_heads, value_width))
    tensors = [torch.randn(shape).to(dtype).to(device).requires_grad_() for shape in shapes]
    return *tensors, *(torch.tensor(starts, dtype=torch.int32, device=device) for starts in (starts_q, starts_k))


def packed_plain(query, key, value, cu_seqlens_q, cu_seqlens_k, **options):
    """The yardstick, sequence by sequence."""
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        out, lse = plain(query[None, q0:q1], key[None, k0:k1], value[None, k0:k1], **options)
        outs.append(out[0])
        lses.append(lse[0])
    rest = query.shape[0] - starts_q[-1]
    outs.append(query.new_zeros(rest, query.shape[1], value.shape[2]))
    lses.append(query.new_full((query.shape[1], rest), -math.inf))
    return torch.cat(outs), torch.cat(lses, -1)


def verify(backend, tensors, options, **more):
    """Forward, lse and gradients to the 2x rule, or refused with exactly the reasons given."""
    query, key, value, *lengths = tensors
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    # what switch cannot do is known when it runs: what the active backend cannot
    asked = compiled_attn.active_backend() if backend == "switch" else backend
    why = compiled_attn.why_not(asked, query, key, value, return_lse=True, **grouped, **options)

    def call():
        return compiled_attn.varlen_attention_with_lse(*tensors, **more, **grouped, **options, backend=backend)

    if why:
        with pytest.raises(NotImplementedError) as refused:
            call()
        for reason in why:
            assert reason in str(refused.value)
        return
    out, lse = call()
    grad = torch.randn(out.shape).to(out.dtype).to(out.device)
    actual = (out.detach(), lse, *torch.autograd.grad(out, (query, key, value), grad))
    double = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    right = reference.varlen_attention(*double, *lengths, **options)
    right = (right[0].detach(), right[1], *torch.autograd.grad(right[0], double, grad.double()))
    yardstick = packed_plain(*tensors, **options)
    yardstick = (*yardstick, *torch.autograd.grad(yardstick[0], (query, key, value), grad))
    gradients = largest(*right[2:])
    for what, one, expected, plainly in zip(("out", "lse", "dq", "dk", "dv"), actual, right, yardstick, strict=True):
        assert_as_good(what, one, expected, plainly.detach(), gradients if what.startswith("d") else 0.0)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    alone = compiled_attn.varlen_attention(*tensors, **more, **grouped, **options, backend=backend)
    assert_as_good("out without lse", alone.detach(), right[0], yardstick[0].detach())


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matrix(backend, device, dtype, key_heads, positions, lengths):
    require(backend)
    verify(backend, packed(lengths, dtype, device, key_heads=key_heads), POSITIONS[positions])


@on_every_backend
def test_given_maxima_change_nothing(backend, device):
    require(backend)
    limits = limits_on(backend, device, varlen=True)
    assert limits is not None
    tensors = packed("uneven", limits.dtypes[0], device)
    verify(backend, tensors, {}, max_seqlen_q=17, max_seqlen_k=23)
    verify(backend, tensors, {}, max_seqlen_q=100, max_seqlen_k=1000)


@on_every_backend
@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("widths", [(16, 16), (20, 20), (64, 64), (16, 24)], ids=str)
def test_scale_and_widths(backend, device, scale, widths):
    require(backend)
    limits = limits_on(backend, device, varlen=True)
    assert limits is not None
    width, value_width = widths
    verify(backend, packed("uneven", limits.dtypes[0], device, width=width, value_width=value_width), {"scale": scale})


@on_every_backend
@pytest.mark.parametrize("layout", ["qkv_slice", "transposed", "strided_width"])
def test_layouts(backend, device, layout):
    require(backend)
    limits = limits_on(backend, device, varlen=True)
    assert limits is not None
    lengths = packed("uneven", torch.float32, device)[3:]
    tensors = []
    for index, total in enumerate((21, 33, 33)):
        storage = {
            "qkv_slice": lambda total=total, index=index: torch.randn(total, 3, 4, 16)[:, index],
            "transposed": lambda total=total: torch.randn(4, total, 16).transpose(0, 1),
            "strided_width": lambda total=total: torch.randn(total, 4, 32)[..., ::2],
        }[layout]()
        low = storage.to(limits.dtypes[0]).to(device)
        tensors.append(torch.empty_strided(low.shape, storage.stride(), dtype=low.dtype, device=device).copy_(low))
    verify(backend, (*(tensor.requires_grad_() for tensor in tensors), *lengths), {})


@on_every_backend
@pytest.mark.parametrize("same", [False, True])
def test_lengths_that_are_columns_of_a_table(backend, device, same):
    """Kernels take a pointer: read without its stride, a column gives wrong numbers and no message."""
    require(backend)
    limits = limits_on(backend, device, varlen=True)
    *tensors, starts, _ = packed("rows_behind", limits.dtypes[0], device, width=64, value_width=64)
    table = torch.stack([starts, torch.full_like(starts, 7)], 1)
    columns = [table[:, 0]] * 2 if same else [table[:, 0], starts.clone()]
    with torch.no_grad():
        actual = compiled_attn.varlen_attention(*tensors, *columns, backend=backend)
        expected = compiled_attn.varlen_attention(*tensors, starts, starts, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@on_every_backend
def test_equals_the_dense_call(backend, device):
    """B equal sequences packed behind one another are a batch."""
    require(backend)
    limits = limits_on(backend, device, varlen=True)
    assert limits is not None
    batch = torch.randn(3, 8, 4, 16).to(limits.dtypes[0]).to(device)
    lengths = torch.arange(0, 25, 8, dtype=torch.int32, device=device)
    flat = batch.flatten(0, 1)
    out = compiled_attn.varlen_attention(flat, flat, flat, lengths, lengths, 8, 8, backend=backend)
    expected, _ = reference.attention(batch, batch, batch)
    assert_as_good("out", out, expected.flatten(0, 1), plain(batch, batch, batch)[0].flatten(0, 1))


def test_lengths_that_make_no_sense_give_all_reasons():
    x = torch.randn(6, 2, 8)
    good = torch.tensor([0, 6], dtype=torch.int32)
    bad = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="packed sequences") as refused:
        compiled_attn.varlen_attention(x, x, x, bad, good, -1, -2)
    for text in (
        "cu_seqlens_q is torch.int64; give int32", "cu_seqlens_q has shape (1, 2)", "cu_seqlens_q is on meta",
        "max_seqlen_q=-1", "max_seqlen_k=-2",
    ):  # fmt: skip
        assert text in str(refused.value)
    with pytest.raises(ValueError, match="cu_seqlens_q is for 1 sequences, cu_seqlens_k for 2"):
        compiled_attn.varlen_attention(x, x, x, good, torch.tensor([0, 3, 6], dtype=torch.int32))


def test_a_dense_backend_without_a_varlen_kernel_refuses():
    x = torch.randn(6, 2, 8)
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="'stand_in' cannot run this call:\n  has no varlen kernel"):
        compiled_attn.varlen_attention(x, x, x, lengths, lengths, backend="stand_in")


def test_packed_and_batched_tensors_are_not_mixed_up():
    lengths, others = (torch.tensor([0, 6], dtype=torch.int32) for _ in range(2))
    packed, batched = torch.randn(6, 2, 8), torch.randn(1, 6, 2, 8)
    # served once, so that the memory of served calls is part of the test
    compiled_attn.varlen_attention(packed, packed, packed, lengths, others)
    compiled_attn.attention(batched, batched, batched)
    with pytest.raises(ValueError, match=r"query has 4 dimensions, expected 3: \(T, H, D\)"):
        compiled_attn.varlen_attention(batched, batched, batched, lengths, others)
    with pytest.raises(ValueError, match=r"query has 3 dimensions, expected 4: \(B, S, H, D\)"):
        compiled_attn.attention(packed, packed, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_math"])
def test_lengths_are_never_read_from_the_device(backend):
    """No host sync, with and without the maxima."""
    tensors = packed("uneven", torch.bfloat16, "cuda")
    compiled_attn.varlen_attention(*tensors, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compiled_attn.varlen_attention(*tensors, backend=backend)
        compiled_attn.varlen_attention(*tensors, 17, 23, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
