"""xFormers: every line of its glue against float64, with a stand-in bound to the recorded signatures."""

from __future__ import annotations

import sys
import types

import flash_checks
import operator_checks
import pytest
import torch
from flash_checks import SHAPES
from operator_checks import MASKS
from stand_ins import xformers as stand_in
from test_varlen import LENGTHS

import compiled_attn
from compiled_attn import registry
from compiled_attn.ops import _xformers_library, xformers
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL

PACKAGE = xformers.PACKAGE


@pytest.fixture(params=["pytorch", "flash-attn"])
def library(request, monkeypatch):
    """The stand-in, bound in place of the library: with PyTorch's flash kernels, and with those of flash-attn."""
    made = stand_in.Library(pytorch_flash=request.param == "pytorch")
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(PACKAGE.__dict__, "loaded", _xformers_library._bind(made.module))
    return made


# ---------------------------------------------------------------------------------------------- flash operator


@pytest.mark.parametrize("positions", flash_checks.POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flash(library, shape, positions):
    flash_checks.dense("xformers", flash_checks.tensors(shape), None, positions)
    assert not [call for call in library.calls if call.startswith("cutlass")]


@pytest.mark.parametrize("shape", SHAPES)
def test_key_padding_masks_are_packed(library, shape):
    flash_checks.dense("xformers", flash_checks.tensors(shape), flash_checks.padding(shape), "full")
    assert not [call for call in library.calls if call.startswith("cutlass")]


@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_layouts_and_scale(library, masked):
    inputs = flash_checks.tensors("grouped", transposed=True)
    flash_checks.dense("xformers", inputs, flash_checks.padding("grouped") if masked else None, "full", scale=0.7)


def test_masked_keys_have_no_gradient(library):
    flash_checks.masked_keys_have_no_gradient("xformers")


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", flash_checks.POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_flash_packed(library, lengths, positions, key_heads):
    flash_checks.varlen("xformers", flash_checks.packed(lengths, key_heads), positions)
    assert not [call for call in library.calls if call.startswith("cutlass")]


@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_dropout_and_its_gradient(library, masked):
    """out = W V with one W for all of V: <g, out> = <dv, V>; and differences of the same draw are the gradients."""
    inputs = flash_checks.tensors("grouped")
    keep = flash_checks.padding("grouped") if masked else None

    def call(tensors):
        torch.manual_seed(3)
        return registry.find("xformers").op(*tensors, None, keep, 0.4, 0, None, True, None, False, True)

    out, _, state = call(inputs)
    assert (state.shape, state.dtype) == ((2,), torch.int64)
    grad = torch.randn(out.shape, dtype=out.dtype)
    gradients = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close((grad * out).sum(), (gradients[2] * inputs[2]).sum())
    for which, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, dtype=out.dtype)
        sides = []
        for size in (1e-5, -1e-5):
            moved = [
                one.detach() + size * step if number == which else one.detach() for number, one in enumerate(inputs)
            ]
            sides.append(call(moved)[0])
        difference = ((sides[0] - sides[1]) * grad).sum() / 2e-5
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["no_query", "no_key", "no_batch"])
def test_dropout_of_nothing(library, shape):
    out, _, state = registry.find("xformers").op(
        *flash_checks.tensors(shape), None, None, 0.5, 0, None, SHAPES[shape][3] != SHAPES[shape][4], None, False, True
    )
    assert (state == 0).all()
    assert state.shape == (2,)
    assert (out == 0).all()


# -------------------------------------------------------------------------------------------- CUTLASS operator


@pytest.mark.parametrize("positions", operator_checks.POSITIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_alignments(library, mask, positions):
    causal, window = operator_checks.POSITIONS[positions]
    if causal & CAUSAL and mask not in ("none", "key_padding"):
        pytest.skip("causal composes with key padding alone")
    for shape in ("plain", "more_queries", "grouped", "padded_width", "one_query", "one_key"):
        operator_checks.dense(
            "xformers", flash_checks.tensors(shape), **operator_checks.made_mask(mask, shape), causal=causal,
            window=window,
        )  # fmt: skip


@pytest.mark.parametrize("mask", ["float", "float_row", "float_per_head"])
def test_gradient_of_a_mask(library, mask):
    for shape in ("plain", "grouped", "more_queries"):
        (bias,) = operator_checks.made_mask(mask, shape).values()
        bias = bias.masked_fill(bias == float("-inf"), -2.0).requires_grad_()
        operator_checks.dense("xformers", flash_checks.tensors(shape), bias)


@pytest.mark.parametrize("positions", ["full", "causal", "causal_lower"])
def test_a_head_dim_of_value_of_its_own(library, positions):
    query, key, _ = flash_checks.tensors("plain")
    value = torch.randn(2, 7, 4, 24, dtype=torch.float64, requires_grad=True)
    operator_checks.dense("xformers", [query, key, value], causal=operator_checks.POSITIONS[positions][0])
    assert not [call for call in library.calls if call.startswith("flash")]


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("causal", [0, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_cutlass_packed(library, lengths, causal, key_heads):
    """With bounds that fit, and with loose ones."""
    query, key, _, *starts = flash_checks.packed(lengths, key_heads)
    value = torch.randn(*key.shape[:2], 24, dtype=torch.float64, requires_grad=True)
    operator_checks.varlen("xformers", [query, key, value, *starts], causal, None)
    operator_checks.varlen("xformers", [query, key, value, *starts], causal, None, (40, 50))
    assert not [call for call in library.calls if call.startswith("flash")] or query.numel() * key.numel() == 0


@pytest.mark.parametrize("width", [16, 24], ids=["flash", "cutlass"])
@pytest.mark.parametrize("causal", [0, CAUSAL], ids=["full", "causal"])
def test_lengths_that_are_columns_of_a_table(library, causal, width):
    query, key, _, *starts = flash_checks.packed("uneven")
    starts = list(torch.stack(starts, 1).unbind(1))
    assert not starts[0].is_contiguous()
    value = torch.randn(*key.shape[:2], width, dtype=torch.float64, requires_grad=True)
    operator_checks.varlen("xformers", [query, key, value, *starts], causal, None)


def test_lengths_that_begin_at_one_place_are_not_one_tensor(library):
    """Causal from the upper left is for the CUTLASS operator: the other one aligns at the lower right."""
    table = torch.tensor([0, 3, 9, 0, 21], dtype=torch.int32)
    starts_q, starts_k = table[:3], table[::2]
    query = torch.randn(9, 4, 16, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(21, 4, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    operator_checks.varlen("xformers", [query, key, value, starts_q, starts_k], CAUSAL, None)
    assert library.calls == ["cutlass_forward", "cutlass_backward"]


@pytest.mark.parametrize("lengths", ["one", "uneven", "rows_behind", "empty_inside"])
def test_float32_packed_causal_of_one_tensor_of_lengths(library, lengths):
    query, *_, starts, _ = flash_checks.packed(lengths, dtype=torch.float32)
    inputs = [query, *(torch.randn_like(query, requires_grad=True) for _ in range(2)), starts, starts]
    for causal in (CAUSAL, CAUSAL | ALIGN_LOWER_RIGHT):
        out, lse, _ = registry.find("xformers").varlen_op(*inputs, 17, 17, 0.0, causal, None, False, None, False, True)
        expected, expected_lse = compiled_attn.reference.varlen_attention(*inputs, is_causal=True)
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-6, rtol=1e-5)
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, inputs[:3], grad)
        for one, right in zip(found, torch.autograd.grad(expected, inputs[:3], grad.double()), strict=True):
            torch.testing.assert_close(one, right, atol=1e-5, rtol=1e-4)
    assert "flash_forward" not in library.calls


def test_packed_causal_of_one_tensor_of_lengths_is_for_the_flash_operator(library):
    query, key, value, starts, _ = flash_checks.packed("rows_behind")
    operator_checks.varlen("xformers", [query, key, value, starts, starts], CAUSAL, None)
    assert library.calls == ["flash_forward", "flash_backward"]


# ----------------------------------------------------------------------------------------------------- refusals

BF16, F32 = (torch.bfloat16,) * 3, (torch.float32,) * 3
SMALL, WIDE = (2, 6, 4, 64), (2, 6, 4, 288)
REFUSED = [
    ("upper-left alignment needs its CUTLASS operator, which stops at compute capability (9, 0), not (10, 0)",
     {"causal": True, "key": (2, 7, 4, 64), "value": (2, 7, 4, 64), "capability": (10, 0)}),
    ("float32 needs its CUTLASS operator, which keeps the state of dropout on the host: no dropout with it",
     {"dtypes": F32, "dropout_p": 0.1}),
    ("a float mask needs its CUTLASS operator, which keeps the state", {"mask": "float", "dropout_p": 0.1}),
    ("a key-padding mask with positions needs its CUTLASS operator",
     {"mask": "key_padding", "causal": True, "dropout_p": 0.1}),
    ("a head_dim of value of its own needs its CUTLASS operator", {"value": (2, 6, 4, 32), "capability": (12, 0)}),
    ("head_dim=288 over 256 needs its CUTLASS operator",
     {"query": WIDE, "key": WIDE, "value": WIDE, "capability": (10, 0)}),
    ("float32 needs its CUTLASS operator, which has no window for packed sequences",
     {"dtypes": F32, "varlen": True, "window": (3, 3)}),
    ("upper-left alignment needs its CUTLASS operator, which has no window for packed sequences",
     {"varlen": True, "window": (3, 3)}),
    ("float32 needs its CUTLASS operator, which is causal from the upper left for packed sequences",
     {"dtypes": F32, "varlen": True, "causal": True, "alignment": "lower_right"}),
    ("has no dropout in the backward for head_dim=256 over 192 on compute capability (8, 9)",
     {**dict.fromkeys(("query", "key", "value"), (2, 6, 4, 256)), "dropout_p": 0.1, "gradient": True,
      "capability": (8, 9)}),
    ("has no dropout in the backward for head_dim=200 over 192 on compute capability (12, 0)",
     {**dict.fromkeys(("query", "key", "value"), (6, 4, 200)), "dropout_p": 0.1, "gradient": True,
      "capability": (12, 0), "varlen": True}),
    ("has no deterministic backward", {"gradient": True, "deterministic": True}),
    ("needs compute capability 8.0 or later, not 7.5", {"capability": (7, 5)}),
    ("takes bfloat16/float16/float32, not float64", {"dtypes": (torch.float64,) * 3}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "call"), REFUSED)
def test_refusals(reason, call):
    assert any(found.startswith(reason) for found in flash_checks.refusals("xformers", **call))


@pytest.mark.parametrize(
    "call",
    [
        {}, {"capability": (12, 0)}, {"mask": "key_padding", "capability": (12, 0), "dropout_p": 0.2},
        {"causal": True, "gradient": True}, {"causal": True, "alignment": "lower_right", "capability": (10, 0)},
        {"dtypes": F32, "mask": "float", "mask_gradient": True, "gradient": True},
        {"varlen": True, "causal": True}, {"varlen": True, "causal": True, "dtypes": F32, "same_lengths": True},
        {"varlen": True, "window": (3, 3), "alignment": "lower_right", "dropout_p": 0.1},
        {"varlen": True, "causal": True, "same_lengths": True, "capability": (10, 0), "window": (4, 0)},
    ],
)  # fmt: skip
def test_what_is_served(call):
    assert flash_checks.refusals("xformers", **call) == []


# ------------------------------------------------------------------------------------------------- the package


@pytest.fixture
def installed(monkeypatch):
    """What is installed: a stand-in that the test may break."""
    made = stand_in.Library()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.35")
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    PACKAGE.forget()
    yield made
    PACKAGE.forget()


def test_installed_and_whole(installed):
    assert registry.unavailable("xformers") == []


def test_absent_or_old(installed, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.28")
    assert registry.unavailable("xformers") == ["xformers 0.0.28 is older than 0.0.33; pip install xformers"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    assert registry.unavailable("xformers") == ["module 'xformers' is not installed; pip install xformers"]


def test_a_wheel_that_misses_its_cuda_runtime(installed):
    error = RuntimeError("xFormers can't load C++/CUDA extensions.")
    error.__cause__ = OSError("Could not load this library: xformers/_C.so")  # as torch.ops.load_library puts it
    error.__cause__.__cause__ = OSError("libcudart.so.12: cannot open shared object file: No such file or directory")
    installed.module._cpp_lib._cpp_library_load_exception = error
    (reason,) = registry.unavailable("xformers")
    assert reason.startswith("xformers 0.0.35: its compiled part does not load (libcudart.so.12: cannot open")
    assert "pip install nvidia-cuda-runtime-cu12 and put its lib folder on LD_LIBRARY_PATH" in reason
    assert "https://download.pytorch.org/whl/cu130" in reason


def test_a_wheel_for_another_torch(installed):
    error = RuntimeError("xFormers can't load C++/CUDA extensions.")
    error.__cause__ = OSError("undefined symbol: _ZN3c10")
    installed.module._cpp_lib._cpp_library_load_exception = error
    (reason,) = registry.unavailable("xformers")
    assert f"(undefined symbol: _ZN3c10); install the build for torch {torch.__version__}" in reason


class _Raises(types.ModuleType):
    def __getattr__(self, name):
        raise self.error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ModuleNotFoundError("No module named 'flash_attn.x'", name="flash_attn.flash_attn_interface"),
         "finds flash-attn-4, which has no flash_attn.flash_attn_interface, and takes it for flash-attn; "
         "pip install flash-attn beside it, or uninstall flash-attn-4"),
        (ImportError("Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.6.3."),
         "Requires Flash-Attention version >=2.7.1,<=2.8.4 but got 2.6.3. Install such a flash-attn, or none"),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"),
         "is installed but broken: ModuleNotFoundError: No module named 'scipy'"),
    ],
)  # fmt: skip
def test_what_breaks_its_import(installed, monkeypatch, error, text):
    broken = _Raises("xformers.ops")
    broken.error = error
    monkeypatch.setitem(sys.modules, "xformers.ops", broken)
    monkeypatch.delitem(sys.modules, stand_in.FMHA)
    (reason,) = registry.unavailable("xformers")
    assert text in reason


def test_operators_that_are_missing_or_other_ones(installed):
    fmha = installed.modules[stand_in.FMHA]
    known, fmha.flash.FwOp.OPERATOR = fmha.flash.FwOp.OPERATOR, stand_in.Operator(
        f"{stand_in.FMHA}.flash:_flash_bwd", installed.flash_backward
    )  # fmt: skip
    (reason,) = registry.unavailable("xformers")
    assert "its flash operator takes grads_share_storage, grad" in reason
    fmha.flash.FwOp.OPERATOR = known
    fmha.flash.FwOp.is_available = classmethod(lambda cls: False)
    PACKAGE.forget()
    (reason,) = registry.unavailable("xformers")
    assert "has no flash operator here: this PyTorch was built without it" in reason


def test_rocm_is_told_apart(installed, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert registry.unavailable("xformers") == ["its operators for ROCm are other ones; use 'aiter' or 'native'"]


# ------------------------------------------------------------------------------------- operators, without the library


@pytest.mark.parametrize("case", ["plain", "mask", "dropout", "causal"])
def test_traced_without_the_library(case):
    flash_checks.traced("xformers", case)


def test_packed_traced_without_the_library():
    flash_checks.traced_packed("xformers")


def test_opcheck(library):
    flash_checks.opcheck("xformers")
