"""More than 2^31 elements in each tensor, on a GPU: what counts them in 32 bits reads and writes somewhere else.

SageAttention does, and refuses such calls (tests/test_sage.py).
"""

from __future__ import annotations

import pytest
import torch
from matrix import assert_as_good, largest, plain, require

import compiled_attn
from compiled_attn import masks, reference

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
BACKENDS = (
    "flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "_flash_4", "xformers", "triton", "triton_varlen",
    "triton_hopper", "triton_hopper_varlen",
)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packs", [False, True])
def test_offsets_past_31_bits(backend, packs):
    """2,200 million elements in each of query, key and value; the last sequence must be right, and its gradients."""
    require(backend)
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs 70 GiB of device memory")
    batch, length, heads, width = 718, 1024, 24, 128
    inputs = [torch.randn(batch, length, heads, width, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    if packs:
        starts = masks.dense_cu_seqlens(batch, length, inputs[0].device)
        flat = [tensor.flatten(0, 1) for tensor in inputs]
        out = compiled_attn.varlen_attention(*flat, starts, starts, length, length, backend=backend)
        out = out.unflatten(0, (batch, length))
    else:
        out = compiled_attn.attention(*inputs, backend=backend)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    last = [tensor[-1:, :, -1:].detach().requires_grad_() for tensor in inputs]
    yardstick = plain(*last)[0]
    double = [tensor.detach().double().requires_grad_() for tensor in last]
    right = reference.attention(*double)[0]
    assert_as_good("out", out[-1:, :, -1:].detach(), right.detach(), yardstick.detach())
    wanted = torch.autograd.grad(right, double, torch.ones_like(right))
    plainly = torch.autograd.grad(yardstick, last, torch.ones_like(yardstick))
    for what, one, expected, near in zip(("dq", "dk", "dv"), gradients, wanted, plainly, strict=True):
        assert_as_good(what, one[-1:, :, -1:], expected, near, largest(*wanted))
