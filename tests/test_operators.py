"""The machinery that turns kernel functions into operators: gradients, autocast, meta, FLOP, errors."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import stand_in  # noqa: F401  registers the backend
import torch
from matrix import Case, backends_and_devices, limits_on, require
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import compiled_attn
from compiled_attn import operators, reference, registry

DENSE = [pytest.param(*each.values[:1], id=each.values[0]) for each in backends_and_devices() if "cpu" in each.id]
VARLEN = [
    pytest.param(*each.values[:1], id=each.values[0]) for each in backends_and_devices(varlen=True) if "cpu" in each.id
]


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("active", ["native", "_native_math", "stand_in"])
@pytest.mark.parametrize("mask", ["none", "key_padding", "causal", "gqa"])
@pytest.mark.parametrize("backend", DENSE)
def test_gradcheck_of_dense_backends(backend, mask, active):
    if active != "native" and backend != "switch":
        pytest.skip("the active backend concerns switch alone")
    heads = 1 if mask == "gqa" else 2
    inputs = double(2, 3, 2, 4), double(2, 5, heads, 4), double(2, 5, heads, 4)
    options = {
        "none": {},
        "key_padding": {"key_padding_mask": torch.tensor([[False, True, False, True, True], [False] * 5])},
        "causal": {"is_causal": True},
        "gqa": {"enable_gqa": True},
    }[mask]
    with compiled_attn.attention_backend(active):
        assert torch.autograd.gradcheck(lambda *x: compiled_attn.attention(*x, **options, backend=backend), inputs)


@pytest.mark.parametrize("backend", DENSE)
def test_gradcheck_of_a_float_mask(backend):
    limits = limits_on(backend, "cpu")
    assert limits is not None
    if not limits.mask_gradient or "float" not in limits.masks:
        pytest.skip("Limits: no gradient for attn_mask; refused, see test_numerics")
    query, key, value = (double(2, 3, 2, 4), double(2, 5, 2, 4), double(2, 5, 2, 4))
    mask = double(1, 2, 3, 5)
    # what switch runs must give the mask a gradient too
    with compiled_attn.attention_backend("_native_math"):
        assert torch.autograd.gradcheck(
            lambda q, m: compiled_attn.attention(q, key, value, m, backend=backend), (query, mask)
        )


@pytest.mark.parametrize("active", ["native", "_native_math"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", VARLEN)
def test_gradcheck_of_varlen_backends(backend, causal, active):
    inputs = double(6, 2, 4), double(7, 1, 4), double(7, 1, 4)
    cu_seqlens_q = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 3, 4, 7], dtype=torch.int32)
    with compiled_attn.attention_backend(active):
        assert torch.autograd.gradcheck(
            lambda *x: compiled_attn.varlen_attention(
                *x, cu_seqlens_q, cu_seqlens_k, is_causal=causal, enable_gqa=True, backend=backend
            ),
            inputs,
        )


def test_double_backward_of_an_opaque_operator_raises_clearly():
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    out = compiled_attn.attention(x, x, x, backend="stand_in")
    (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="stand_in has no double backward; use backend '_native_math'"):
        torch.autograd.grad(first.sum(), x)


def test_double_backward_of_native_math_is_right():
    inputs = double(1, 3, 2, 4), double(1, 3, 2, 4), double(1, 3, 2, 4)
    assert torch.autograd.gradgradcheck(lambda *x: compiled_attn.attention(*x, backend="_native_math"), inputs)


@pytest.mark.parametrize("name", ["stand_in", "switch", "native_varlen", "_native_flash_varlen", "switch_varlen"])
def test_a_raw_operator_without_lse_has_its_gradient(name):
    x = (
        torch.randn(4, 2, 8, requires_grad=True)
        if name.endswith("varlen")
        else torch.randn(1, 4, 2, 8).requires_grad_()
    )
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    structure = (lengths, lengths, 4, 4) if name.endswith("varlen") else ()
    out, lse, _ = getattr(torch.ops.compiled_attn, name).v1(x, x, x, *structure)
    assert lse.numel() == 0
    (actual,) = torch.autograd.grad(out.sin().sum(), x)
    call = compiled_attn.varlen_attention if structure else compiled_attn.attention
    (expected,) = torch.autograd.grad(call(x, x, x, *structure, backend="_native_math").sin().sum(), x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_autograd_calls_a_node_by_its_operator():
    x = torch.randn(1, 4, 2, 8).requires_grad_()
    out = compiled_attn.attention(x, x, x, backend="stand_in")
    assert out.grad_fn.name() == "stand_in_backward"
    assert "stand_in_backward object" in repr(out.grad_fn)


@pytest.mark.parametrize("shapes", [(2, 17, 33, 4, 4, 16, 16), (1, 8, 8, 6, 2, 32, 24)], ids=str)
def test_flops_of_an_opaque_operator(shapes):
    batch, q_length, k_length, heads, key_heads, width, value_width = shapes
    query = torch.randn(batch, q_length, heads, width, requires_grad=True)
    key = torch.randn(batch, k_length, key_heads, width)
    value = torch.randn(batch, k_length, key_heads, value_width)
    with FlopCounterMode(display=False) as forward:
        out = compiled_attn.attention(query, key, value, enable_gqa=heads != key_heads, backend="stand_in")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pairs = batch * heads * q_length * k_length
    assert forward.get_total_flops() == 2 * pairs * (width + value_width)
    # five products: QK^T, dQ, dK over D and dP, dV over Dv
    assert backward.get_total_flops() == 2 * pairs * (3 * width + 2 * value_width)


def test_flops_agree_with_the_native_ones():
    query = torch.randn(2, 16, 4, 32)
    counts = []
    for name in ("stand_in", "_native_math", "switch"):
        with FlopCounterMode(display=False) as counter:
            compiled_attn.attention(query, query, query, backend=name)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] == 2 * 2 * 2 * 4 * 16 * 16 * 32


def test_flops_of_packed_sequences_follow_their_lengths():
    x = torch.randn(10, 2, 16)
    lengths = torch.tensor([0, 3, 10], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        compiled_attn.varlen_attention(x, x, x, lengths, lengths, backend="_native_flash")
    assert counter.get_total_flops() >= 2 * 2 * (9 + 49) * 2 * 16


_COUNTED_LATE = """
import importlib, importlib.util
import torch, compiled_attn
assert importlib.util.find_spec("torch.utils.flop_counter") is not None  # a look is no import

def ours(counter):
    return {str(operator) for operator in counter.flop_registry if str(operator).startswith("compiled_attn.")}

import torch.utils.flop_counter as counter
first = ours(counter)
assert {"compiled_attn.switch", "compiled_attn.switch_backward", "compiled_attn.switch_varlen"} <= first, first
assert ours(importlib.reload(counter)) == first
"""


def test_flop_formulas_are_handed_over_at_every_import_of_the_counter():
    done = subprocess.run([sys.executable, "-c", _COUNTED_LATE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", DENSE)
def test_autocast_is_honoured(backend, dtype):
    inputs = [torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=dtype):
        out = compiled_attn.attention(*inputs, backend=backend)
        _, lse = compiled_attn.attention_with_lse(*inputs, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    low = [tensor.detach().to(dtype) for tensor in inputs]
    torch.testing.assert_close(out, compiled_attn.attention(*low, backend=backend), rtol=0, atol=0)
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_autocast_leaves_float64_and_mixed_inputs_get_one_dtype():
    x = torch.randn(1, 8, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled_attn.attention(x.double(), x.double(), x.double()).dtype == torch.float64
        assert compiled_attn.attention(x.bfloat16(), x, x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtypes"):
        compiled_attn.attention(x.bfloat16(), x, x)


NAMES = [name for name in compiled_attn.list_backends() if not name.startswith(("probe_", "tmp_"))]
ALL_DENSE = [name for name in NAMES if compiled_attn.backend_info(name).dense is not None]
ALL_VARLEN = [name for name in NAMES if compiled_attn.backend_info(name).varlen is not None]


def served_dtype(name: str, varlen: bool = False) -> torch.dtype:
    info = compiled_attn.backend_info(name)
    return (info.varlen_limits if varlen else info.limits)[0].dtypes[0]


@pytest.mark.parametrize("name", ALL_DENSE)
def test_every_dense_backend_traces_on_meta(name):
    """Installed or not, with a GPU or without: shapes, strides and dtypes are known, forward and backward."""
    dtype = served_dtype(name)
    query, key = (torch.randn(2, length, 4, 64, dtype=dtype, device="meta", requires_grad=True) for length in (17, 33))
    limits = compiled_attn.backend_info(name).limits[0]
    if not limits.gradient:
        query, key = query.detach(), key.detach()
    out = compiled_attn.attention(query, key, key, backend=name)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 17, 4, 64), dtype, True)
    if limits.lse:
        out, lse = compiled_attn.attention_with_lse(query, key, key, backend=name)
        assert (lse.shape, lse.dtype) == ((2, 4, 17), operators.lse_dtype(dtype))
    if limits.gradient:
        dq, dk = torch.autograd.grad(out, (query, key), torch.empty_like(out))
        assert (dq.shape, dk.shape, dq.device.type) == (query.shape, key.shape, "meta")


@pytest.mark.parametrize("name", ALL_VARLEN)
def test_every_varlen_backend_traces_on_meta(name):
    dtype = served_dtype(name, varlen=True)
    limits = compiled_attn.backend_info(name).varlen_limits[0]
    x = torch.randn(9, 4, 64, dtype=dtype, device="meta", requires_grad=limits.gradient)
    lengths = torch.empty(3, dtype=torch.int32, device="meta")
    out = compiled_attn.varlen_attention(x, x, x, lengths, lengths, backend=name)
    assert out.shape == (9, 4, 64)
    if limits.lse:
        out, lse = compiled_attn.varlen_attention_with_lse(x, x, x, lengths, lengths, backend=name)
        assert lse.shape == (4, 9)
    if limits.gradient:
        (gradient,) = torch.autograd.grad(out, x, torch.empty_like(out))
        assert gradient.shape == x.shape


FAKE_CUDA = [
    name
    for name in ALL_DENSE
    if limits_on(name, "cuda") is not None and compiled_attn.backend_info(name).family == "PyTorch"
]


KINDS = ["none", "key_padding", "bool", "float"]

# calls that need nothing of torch which only some builds have, see below
FAKED_ANYWHERE = [("_native_flash", "none"), ("_native_cudnn", "none"), *(("flex", kind) for kind in KINDS)]


@functools.cache
def refusal_of_fake_cuda() -> str:
    """What torch says to `contiguous` (and to `~` and slices) of a fake cuda tensor; empty where it obeys.

    A build without CUDA has no such device, and the CUDA build of torch 2.9 asks the driver for it.
    """
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        try:
            x.t().contiguous()
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAKE_CUDA)
def test_fake_cuda_tensors_trace(name, kind, monkeypatch):
    """On any machine: what the CUDA kernels would return has the promised shape, dtype and strides."""
    limits = limits_on(name, "cuda")
    assert limits is not None
    if kind not in limits.masks:
        pytest.skip(f"Limits: takes no {kind} mask")
    if not torch.cuda.is_available() and (name, kind) not in FAKED_ANYWHERE and refusal_of_fake_cuda():
        pytest.skip(f"this torch refuses `contiguous` and `~` of fake cuda tensors here: {refusal_of_fake_cuda()}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        query = torch.empty(2, 17, 4, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(2, 33, 4, 64, dtype=torch.bfloat16, device="cuda")
        masks = {
            "none": {},
            "key_padding": {"key_padding_mask": torch.empty(2, 33, dtype=torch.bool, device="cuda")},
            "bool": {"attn_mask": torch.empty(2, 1, 17, 33, dtype=torch.bool, device="cuda")},
            "float": {"attn_mask": torch.empty(1, 4, 17, 33, dtype=torch.bfloat16, device="cuda")},
        }[kind]
        out = compiled_attn.attention(query, key, key, **masks, backend=name)
        assert (out.shape, out.dtype, out.device.type, out.is_contiguous()) == (
            (2, 17, 4, 64), torch.bfloat16, "cuda", True,
        )  # fmt: skip
        if name != "native":  # whose choice needs a real device
            out, lse = compiled_attn.attention_with_lse(query, key, key, **masks, backend=name)
            assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, 17), torch.float32, True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "stand_in", "switch"])
def test_function_transforms_are_right_or_refused(name, transform):
    """Never a zero tangent or a missing gradient without a word."""
    x = torch.randn(1, 5, 2, 8)

    def loss(tensor):
        return compiled_attn.attention(tensor, tensor, tensor, backend=name).sin().sum()

    def right(tensor):
        return reference.attention(tensor, tensor, tensor)[0].sin().sum()

    tangent = torch.randn_like(x)
    calls = {
        "grad": lambda function, value: torch.func.grad(function)(value),
        "jvp": lambda function, value: torch.func.jvp(function, (value,), (tangent.to(value.dtype),))[1],
        "vmap": lambda function, value: torch.func.vmap(function)(torch.stack([value, 2 * value])),
    }
    expected = calls[transform](right, x.double())
    try:
        actual = calls[transform](loss, x)
    except (RuntimeError, NotImplementedError) as refused:
        assert name != "_native_math", f"the backend named by the errors must serve: {refused}"
        return
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-4)


def test_every_schema_is_one_of_two_and_versioned():
    for name in compiled_attn.list_backends():
        entry = registry.find(name)
        for op, schema in ((entry.op, operators.SCHEMAS[False]), (entry.varlen_op, operators.SCHEMAS[True])):
            if op is None:
                continue
            assert op._overloadname == operators.VERSION
            assert str(op._schema).split("(", 1)[1] == str(torch._C.parse_schema(f"x{schema}")).split("(", 1)[1]


@pytest.mark.parametrize("name", ["stand_in", "switch"])
def test_a_kernel_gets_every_argument(name):
    """The dispatcher drops trailing arguments that equal their defaults; kernel functions never see that."""
    x = torch.randn(1, 4, 2, 8)
    short = getattr(torch.ops.compiled_attn, name).v1(x, x, x)[0]
    torch.testing.assert_close(short.double(), reference.attention(x, x, x)[0], atol=2e-6, rtol=1e-5)


def test_operators_do_not_alias_or_write_their_inputs():
    for name in ("native", "_native_math", "_native_flash", "stand_in", "switch"):
        arguments = Case(mask="key_padding").arguments()
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
        out, lse = compiled_attn.attention_with_lse(**arguments, backend=name)
        out.sum().backward()
        for tensor, (copy, version) in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0)
            assert tensor._version == version
            assert tensor.untyped_storage().data_ptr() not in (
                out.untyped_storage().data_ptr(), lse.untyped_storage().data_ptr(),
            )  # fmt: skip


def test_require_skips_nothing_on_this_machine():
    """The matrix covers the native family; a skip there would hide it."""
    for name in ("native", "_native_math", "_native_flash", "switch", "stand_in"):
        require(name)
