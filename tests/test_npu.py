"""Ascend NPUs: every line of the glue against float64, with a stand-in bound to the recorded schemas."""

from __future__ import annotations

import sys
import types

import flash_checks
import operator_checks
import pytest
import torch
from operator_checks import MASKS
from stand_ins import npu as stand_in
from test_varlen import LENGTHS

from compiled_attn import registry
from compiled_attn.ops import npu
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, Call, reasons

SHAPES = ("plain", "more_queries", "grouped", "padded_width", "one_query", "one_key", "no_query", "no_key", "no_batch")


@pytest.fixture
def library(monkeypatch):
    """The stand-in, bound in place of the library."""
    made = stand_in.Library()
    monkeypatch.setitem(npu.PACKAGE.__dict__, "loaded", npu._bind(made.module))
    return made


@pytest.mark.parametrize("positions", operator_checks.POSITIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_alignments(library, mask, positions):
    causal, window = operator_checks.POSITIONS[positions]
    if causal & CAUSAL and mask not in ("none", "key_padding"):
        pytest.skip("causal composes with key padding alone")
    for shape in SHAPES if mask == "none" else SHAPES[:6]:
        operator_checks.dense(
            "_native_npu", flash_checks.tensors(shape), **operator_checks.made_mask(mask, shape), causal=causal,
            window=window,
        )  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5, 0.0])
def test_scale_and_layouts(library, scale):
    """A float mask is added after the scale: the library's default adds it before."""
    for mask in ("none", "float_per_head"):
        inputs = flash_checks.tensors("grouped", transposed=True)
        operator_checks.dense("_native_npu", inputs, **operator_checks.made_mask(mask, "grouped"), scale=scale)


@pytest.mark.parametrize(
    ("shape", "causal", "window", "mode"),
    [
        ("plain", 0, None, 0), ("plain", CAUSAL, None, 2), ("more_queries", CAUSAL, None, 2),
        ("grouped", CAUSAL, None, 3), ("plain", CAUSAL | ALIGN_LOWER_RIGHT, None, 3),
        ("more_queries", CAUSAL | ALIGN_LOWER_RIGHT, None, 1), ("plain", ALIGN_LOWER_RIGHT, (2, 1), 4),
        ("plain", 0, (2, 1), 1), ("grouped", 0, (2, 1), 4),
    ],
)  # fmt: skip
def test_which_mode_is_used(library, shape, causal, window, mode):
    operator_checks.dense("_native_npu", flash_checks.tensors(shape), causal=causal, window=window)
    assert library.asked["sparse_mode"] == mode


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", operator_checks.POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(library, lengths, positions, key_heads):
    operator_checks.varlen(
        "_native_npu", flash_checks.packed(lengths, key_heads), *operator_checks.POSITIONS[positions]
    )


def test_packed_calls_are_one_where_a_mode_serves_them(library):
    operator_checks.varlen("_native_npu", flash_checks.packed("uneven"), CAUSAL, None)
    assert library.calls == ["npu_fusion_attention_v2", "npu_fusion_attention_grad_v2"]
    assert library.asked["actual_seq_qlen"] == [3, 20, 21]
    library.calls.clear()
    # 17 queries for 1 key: each sequence by itself
    operator_checks.varlen("_native_npu", flash_checks.packed("uneven"), CAUSAL | ALIGN_LOWER_RIGHT, None)
    assert len(library.calls) == 6


@pytest.mark.parametrize("mask", ["none", "key_padding", "float"])
def test_dropout_and_its_gradient(library, mask):
    inputs = flash_checks.tensors("grouped")
    given = operator_checks.made_mask(mask, "grouped")

    def call(tensors):
        torch.manual_seed(3)
        return registry.find("_native_npu").op(
            *tensors, given.get("mask"), given.get("key_padding"), 0.4, 0, None, True, None, False, True
        )

    out, _, state = call(inputs)
    assert (state.shape, state.dtype) == ((3,), torch.int64)
    grad = torch.randn(out.shape, dtype=out.dtype)
    gradients = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close((grad * out).sum(), (gradients[2] * inputs[2]).sum())
    for which, gradient in enumerate(gradients):
        step = torch.randn(gradient.shape, dtype=out.dtype)
        sides = []
        for size in (1e-5, -1e-5):
            moved = [tensor.detach() for tensor in inputs]
            moved[which] = moved[which] + size * step
            sides.append(call(moved)[0])
        difference = ((sides[0] - sides[1]) * grad).sum() / 2e-5
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-6, atol=1e-6)


def test_masked_keys_have_no_gradient(library):
    flash_checks.masked_keys_have_no_gradient("_native_npu")


def test_refusals():
    shape = (2, 6, 4, 64)
    facts = {"query": shape, "key": shape, "value": shape, "dtypes": (torch.bfloat16,) * 3, "devices": ("npu",) * 3}
    limits = registry.backend_info("_native_npu")
    packed = {"query": shape[1:], "key": shape[1:], "value": shape[1:], "varlen": True}
    many, wide = (2, 6, 257, 64), (2, 6, 4, 776)
    for reason, call in (
        ("runs on npu, not cuda", {"devices": ("cuda",) * 3}),
        ("takes bfloat16/float16/float32, not float64", {"dtypes": (torch.float64,) * 3}),
        ("takes 256 heads at most, not 257", {"query": many, "key": many, "value": many}),
        ("head_dim=776 is over 768", {"query": wide, "key": wide, "value": wide}),
        ("needs one head_dim", {"value": (2, 6, 4, 32)}),
        ("has no dropout", {**packed, "dropout_p": 0.1}),
        ("gives no gradient for attn_mask", {"mask": "float", "mask_gradient": True}),
    ):  # fmt: skip
        chosen = limits.varlen_limits if call.get("varlen") else limits.limits
        assert any(found.startswith(reason) for found in reasons(chosen, Call(**{**facts, **call})))
    for call in (
        {},
        {"mask": "float", "dropout_p": 0.2, "gradient": True},
        {**packed, "causal": True, "window": (2, 2)},
    ):
        chosen = limits.varlen_limits if call.get("varlen") else limits.limits
        assert reasons(chosen, Call(**{**facts, **call})) == []
    assert {one.verified for one in (*limits.limits, *limits.varlen_limits)} == {"contract"}


def test_a_package_that_is_absent_or_old(monkeypatch):
    npu.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = registry.unavailable("_native_npu")
    assert reason.startswith("module 'torch_npu' is not installed; pip install torch-npu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.0")
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    assert registry.unavailable("_native_npu") == ["torch-npu 2.1.0: has no npu_fusion_attention_v2"]
    npu.PACKAGE.forget()
    made = stand_in.Library()
    made.module.npu_fusion_attention_grad_v2 = lambda query, key, value, dy, head_num, input_layout: None
    monkeypatch.setitem(sys.modules, "torch_npu", made.module)
    (reason,) = registry.unavailable("_native_npu")
    assert "npu_fusion_attention_grad_v2 takes no softmax_max, softmax_sum" in reason
    npu.PACKAGE.forget()


@pytest.mark.parametrize("case", ["plain", "mask", "dropout", "causal"])
def test_traced_without_the_library(case):
    flash_checks.traced("_native_npu", case)


def test_packed_traced_without_the_library():
    flash_checks.traced_packed("_native_npu")


def test_opcheck(library):
    flash_checks.opcheck("_native_npu")
