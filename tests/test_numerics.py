"""Every backend against the float64 reference: error at most twice that of plain PyTorch, plus rounding.

The matrix comes from the backends' own Limits: what they promise must be right, what they do not must be refused with
every reason. On a machine with a GPU the same matrix runs there.
"""

from __future__ import annotations

import pytest
import torch
from matrix import (
    LAYOUTS,
    MASKS,
    MASKS_AND_POSITIONS,
    POSITIONS,
    Case,
    assert_as_good,
    backends_and_devices,
    largest,
    limits_on,
    plain,
    require,
    verify,
)

import compiled_attn
from compiled_attn import reference

on_every_backend = pytest.mark.parametrize(("backend", "device"), backends_and_devices())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def own_dtype(backend: str, device: str) -> torch.dtype:
    """The first dtype that ``backend`` takes on ``device``."""
    limits = limits_on(backend, device)
    assert limits is not None
    return limits.dtypes[0]


@on_every_backend
@dtypes
@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize(("mask", "positions"), MASKS_AND_POSITIONS)
def test_masks_positions_heads_and_dtypes(backend, device, dtype, key_heads, mask, positions):
    require(backend)
    verify(backend, Case(device, dtype, key_heads=key_heads, mask=mask, positions=positions))


# (Sq, Sk, Hk)
SIZES = [(1, 1, 4), (1, 33, 1), (17, 1, 4), (33, 17, 1), (33, 33, 4), (0, 5, 4), (5, 0, 1), (0, 0, 4)]


@on_every_backend
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}-{'mha' if sizes[2] == 4 else 'mqa'}")
@pytest.mark.parametrize(("mask", "positions"), MASKS_AND_POSITIONS)
def test_odd_and_empty_lengths(backend, device, sizes, mask, positions):
    require(backend)
    q_length, k_length, key_heads = sizes
    dtype = own_dtype(backend, device)
    case = Case(
        device, dtype, q_length=q_length, k_length=k_length, key_heads=key_heads, mask=mask, positions=positions
    )
    verify(backend, case)


@on_every_backend
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batch", [0, 1], ids="batch{}".format)
def test_batches_of_none_and_one(backend, device, batch, mask):
    require(backend)
    verify(backend, Case(device, own_dtype(backend, device), batch=batch, mask=mask))


@on_every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", ["full", "causal", "window_lower"])
@pytest.mark.parametrize("mask", ["none", "key_padding", "bool", "float"])
def test_layouts(backend, device, layout, mask, positions):
    require(backend)
    if positions == "causal" and mask not in ("none", "key_padding"):
        positions = "full"
    dtype = own_dtype(backend, device)
    verify(backend, Case(device, dtype, key_heads=4, mask=mask, positions=positions, layout=layout))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("length", [33, 40], ids="{}keys".format)  # fused kernels want rows of a multiple of 8
@pytest.mark.parametrize(
    "layout", ["transposed", "strided_keys", "odd_rows", "expanded_keys", "expanded_rows", "offset"]
)
def test_layouts_of_masks(backend, device, layout, length, kind, dtype):
    require(backend)
    shape = {
        "transposed": (2, 4, length, 17), "strided_keys": (2, 4, 17, 2 * length), "odd_rows": (2, 4, 17, length + 1),
        "expanded_keys": (2, 4, 17, 1), "expanded_rows": (2, 4, 1, length), "offset": (2, 4, 17, length + 7),
    }[layout]  # fmt: skip
    mask = (torch.rand(shape) > 0.4 if kind == "bool" else torch.randn(shape).to(dtype)).to(device)
    mask = {
        "transposed": lambda: mask.transpose(2, 3), "strided_keys": lambda: mask[..., ::2],
        "odd_rows": lambda: mask[..., :length], "offset": lambda: mask[..., 7:],
    }.get(layout, lambda: mask.expand(2, 4, 17, length))()  # fmt: skip
    verify(backend, Case(device, dtype, k_length=length, options={"attn_mask": mask}))


@on_every_backend
@pytest.mark.parametrize("widths", [(1, 1), (8, 8), (20, 20), (64, 64), (128, 128), (16, 24), (24, 8)], ids=str)
@pytest.mark.parametrize("mask", ["none", "key_padding", "float"])
def test_head_dims(backend, device, widths, mask):
    require(backend)
    width, value_width = widths
    verify(backend, Case(device, own_dtype(backend, device), width=width, value_width=value_width, mask=mask))


@on_every_backend
@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_scale_is_never_dropped(backend, device, scale):
    require(backend)
    verify(backend, Case(device, own_dtype(backend, device), scale=scale, key_heads=2))


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 4, 17, 33), (1, 4, 17, 33), (2, 1, 17, 33), (1, 1, 1, 33)], ids=str)
def test_gradient_of_a_float_mask(backend, device, shape):
    """Where Limits promise it, in the broadcast shape of the mask; else refused."""
    require(backend)
    arguments = Case(device, own_dtype(backend, device), key_heads=2).arguments()
    mask = torch.randn(shape).to(arguments["query"].dtype).to(device).requires_grad_()
    limits = limits_on(backend, device)
    assert limits is not None
    if not limits.mask_gradient or "float" not in limits.masks:
        with pytest.raises(NotImplementedError, match="gives no gradient for attn_mask"):
            compiled_attn.attention(**arguments, attn_mask=mask, backend=backend)
        return
    out = compiled_attn.attention(**arguments, attn_mask=mask, backend=backend)
    (actual,) = torch.autograd.grad(out.sin().sum(), mask)
    (yardstick,) = torch.autograd.grad(plain(**arguments, attn_mask=mask)[0].sin().sum(), mask)
    double = {name: arguments[name].detach().double() for name in ("query", "key", "value")}
    mask64 = mask.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.attention(**double, attn_mask=mask64)[0].sin().sum(), mask64)
    assert_as_good("dmask", actual, expected, yardstick)


@on_every_backend
def test_an_input_without_gradient_gets_none(backend, device):
    require(backend)
    arguments = Case(device, own_dtype(backend, device)).arguments()
    for frozen in ("query", "key"):
        arguments[frozen] = arguments[frozen].detach()
        compiled_attn.attention(**arguments, backend=backend).sum().backward()
        assert arguments[frozen].grad is None
        assert arguments["value"].grad is not None
    arguments["value"] = arguments["value"].detach()
    out, lse = compiled_attn.attention_with_lse(**arguments, backend=backend)
    assert not out.requires_grad
    assert not lse.requires_grad


@on_every_backend
def test_lse_carries_no_gradient(backend, device):
    require(backend)
    out, lse = compiled_attn.attention_with_lse(**Case(device, own_dtype(backend, device)).arguments(), backend=backend)
    assert out.requires_grad
    assert not lse.requires_grad


@on_every_backend
def test_same_tensor_three_times(backend, device):
    require(backend)
    x = torch.randn(2, 9, 4, 16).to(own_dtype(backend, device)).to(device).requires_grad_()
    (actual,) = torch.autograd.grad(compiled_attn.attention(x, x, x, backend=backend).sin().sum(), x)
    x64 = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.attention(x64, x64, x64)[0].sin().sum(), x64)
    (yardstick,) = torch.autograd.grad(plain(x, x, x)[0].sin().sum(), x)
    # three gradients are added, each with its own rounding
    assert_as_good("dx", actual, expected, yardstick, 3 * largest(expected))


COTANGENTS = {
    "one_number": lambda: torch.randn(()).expand(2, 9, 4, 16),  # what sum() gives
    "strided_width": lambda: torch.randn(2, 9, 4, 32)[..., ::2],
    "transposed": lambda: torch.randn(2, 16, 4, 9).transpose(1, 3),
}


@on_every_backend
@pytest.mark.parametrize("layout", COTANGENTS)
def test_layouts_of_the_incoming_gradient(backend, device, layout):
    require(backend)
    dtype = own_dtype(backend, device)
    inputs = [torch.randn(2, 9, 4, 16).to(dtype).to(device).requires_grad_() for _ in range(3)]
    grad = COTANGENTS[layout]().to(device)
    grad = grad.to(dtype) if layout == "one_number" else grad.to(dtype).as_strided(grad.shape, grad.stride())
    double = [tensor.detach().double().requires_grad_() for tensor in inputs]
    right = torch.autograd.grad(reference.attention(*double)[0], double, grad.double())
    yardstick = torch.autograd.grad(plain(*inputs)[0], inputs, grad)
    actual = torch.autograd.grad(compiled_attn.attention(*inputs, backend=backend), inputs, grad)
    for what, one, expected, plainly in zip(("dq", "dk", "dv"), actual, right, yardstick, strict=True):
        assert_as_good(what, one, expected, plainly)


@on_every_backend
@pytest.mark.parametrize("positions", POSITIONS)
def test_dropout_is_honoured_or_refused(backend, device, positions):
    """Without masks every kept weight is scaled by 1 / (1 - p): the mean over many rows stays, the values do not."""
    require(backend)
    dtype = own_dtype(backend, device)
    limits = limits_on(backend, device)
    assert limits is not None
    query = torch.randn(1, 64, 4, 32).to(dtype).to(device)
    value = torch.ones(1, 64, 4, 32, dtype=dtype, device=device)
    options = {**POSITIONS[positions], "backend": backend}
    if not limits.dropout or ("window" in positions and not limits.window):
        with pytest.raises(NotImplementedError, match="has no "):
            compiled_attn.attention(query, query, value, dropout_p=0.5, **options)
        return
    with torch.no_grad():
        first = compiled_attn.attention(query, query, value, dropout_p=0.5, **options)
        other = compiled_attn.attention(query, query, value, dropout_p=0.5, **options)
        assert (first != other).any()
        torch.manual_seed(5)
        one = compiled_attn.attention(query, query, value, dropout_p=0.5, **options)
        torch.manual_seed(5)
        torch.testing.assert_close(one, compiled_attn.attention(query, query, value, dropout_p=0.5, **options))
    spread = first.double().std()
    assert spread > 0.01, "nothing was dropped"
    # 4 heads x 64 rows, each a mean of weights that are 0 or doubled
    torch.testing.assert_close(first.double().mean().item(), 1.0, atol=0.15, rtol=0)


@on_every_backend
def test_every_promise_of_limits_is_kept_by_a_call(backend, device):
    """The matrix is not satisfied by refusing everything: each mask kind and each yes of Limits serves a call."""
    require(backend)
    limits = limits_on(backend, device)
    assert limits is not None
    wanted = [("none", "full", {})]
    wanted += [(kind, "full", {}) for kind in limits.masks if kind in MASKS]
    wanted += [("none", "causal", {"q_length": 33})] if limits.causal else []
    wanted += [("none", "window", {"q_length": 33})] if limits.window else []
    wanted += [("none", "full", {"key_heads": 2})] if limits.gqa else []
    wanted += [("none", "full", {"value_width": 24})] if limits.value_head_dim else []
    for dtype in limits.dtypes:
        for mask, positions, sizes in wanted:
            arguments = Case(device, dtype, mask=mask, positions=positions, **sizes).arguments()
            options = {name: item for name, item in arguments.items() if name not in ("query", "key", "value")}
            tensors = (arguments[name] for name in ("query", "key", "value"))
            assert compiled_attn.why_not(backend, *tensors, **options) == []
