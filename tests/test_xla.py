"""TPUs: every line of the glue against float64, with a stand-in bound to the recorded signatures."""

from __future__ import annotations

import sys
import types

import flash_checks
import operator_checks
import pytest
import torch
from flash_checks import SHAPES
from stand_ins import xla as stand_in
from test_varlen import LENGTHS

from compiled_attn import registry
from compiled_attn.ops import xla
from compiled_attn.spec import CAUSAL, Call, reasons


@pytest.fixture
def library(monkeypatch):
    """The stand-in, bound in place of the library."""
    made = stand_in.Library()
    monkeypatch.setitem(xla.PACKAGE.__dict__, "loaded", xla._bind(made.module))
    return made


@pytest.mark.parametrize("mask", ["none", "key_padding"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(library, shape, mask):
    operator_checks.dense("_native_xla", flash_checks.tensors(shape), **operator_checks.made_mask(mask, shape))


@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_causal_layouts_and_scale(library, mask):
    """A hole in front leaves the first rows of a causal call without a key."""
    inputs = flash_checks.tensors("grouped", transposed=True)
    for scale in (None, 1.0, 0.3, -0.5):
        given = operator_checks.made_mask(mask, "grouped")
        operator_checks.dense("_native_xla", inputs, **given, causal=CAUSAL, scale=scale)


@pytest.mark.parametrize("causal", [0, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("length", [127, 128, 129, 300, 513])
def test_lengths_that_are_no_blocks(library, length, causal):
    """The library would fill up keys with zeros that count."""
    inputs = [torch.randn(1, length, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    operator_checks.dense("_native_xla", inputs, causal=causal)
    keep = torch.rand(1, length) > 0.5
    operator_checks.dense("_native_xla", inputs, key_padding=keep, causal=causal)


def test_whole_blocks():
    assert [xla._whole(length, xla._BLOCK_K) for length in (1, 128, 129, 300, 512, 513, 4608)] == [
        128, 128, 256, 512, 512, 1024, 4608,
    ]  # fmt: skip
    assert [xla._whole(length, xla._BLOCK_Q) for length in (512, 513, 1025, 4608)] == [512, 1024, 2048, 5120]


def test_nothing_is_added_to_whole_blocks(library):
    inputs = [torch.randn(1, 128, 1, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    operator_checks.dense("_native_xla", inputs)
    assert library.asked["q_segment_ids"] is None
    assert library.asked["k"].shape == (1, 1, 128, 8)


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(library, lengths, key_heads):
    operator_checks.varlen("_native_xla", flash_checks.packed(lengths, key_heads), 0, None)


@pytest.mark.parametrize("lengths", ["one", "uneven", "rows_behind", "empty_inside"])
def test_packed_causal(library, lengths):
    query, *_, starts, _ = flash_checks.packed(lengths)
    key, value = (torch.randn_like(query, requires_grad=True) for _ in range(2))
    operator_checks.varlen("_native_xla", [query, key, value, starts, starts], CAUSAL, None)


def test_masked_keys_have_no_gradient(library):
    flash_checks.masked_keys_have_no_gradient("_native_xla")


def test_refusals():
    shape = (2, 6, 4, 64)
    facts = {"query": shape, "key": shape, "value": shape, "dtypes": (torch.bfloat16,) * 3, "devices": ("xla",) * 3}
    record = registry.backend_info("_native_xla")
    longer, wide = (2, 7, 4, 64), (2, 6, 4, 192)
    packed = {"query": shape[1:], "key": shape[1:], "value": shape[1:], "varlen": True}
    for reason, call in (
        ("runs on xla, not cpu", {"devices": ("cpu",) * 3}),
        ("takes bfloat16/float32, not float16", {"dtypes": (torch.float16,) * 3}),
        ("takes key_padding masks, so not a bool mask", {"mask": "bool"}),
        ("is causal for Sq == Sk only, not 6 and 7", {"causal": True, "key": longer, "value": longer}),
        ("is causal over packed rows only where one tensor", {**packed, "causal": True}),
        ("takes a head_dim up to 128, or a multiple of it, not 192", {"query": wide, "key": wide, "value": wide}),
        ("has no dropout", {"dropout_p": 0.1}), ("has no sliding window", {"window": (1, 1)}),
    ):  # fmt: skip
        limits = record.varlen_limits if call.get("varlen") else record.limits
        assert any(found.startswith(reason) for found in reasons(limits, Call(**{**facts, **call})))
    for call in (
        {"causal": True, "mask": "key_padding", "gradient": True, "lse": True}, {"alignment": "lower_right"},
        {**packed, "causal": True, "same_lengths": True},
    ):  # fmt: skip
        limits = record.varlen_limits if call.get("varlen") else record.limits
        assert reasons(limits, Call(**{**facts, **call})) == []
    assert {one.verified for one in (*record.limits, *record.varlen_limits)} == {"contract"}


def test_a_package_that_is_absent_or_another(monkeypatch):
    xla.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = registry.unavailable("_native_xla")
    assert reason.startswith("module 'torch_xla.experimental.custom_kernel' is not installed; pip install torch_xla")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.3.0")
    made = stand_in.Library()
    made.module.fa_custom_backward = lambda q, k, v: None
    for name in ("torch_xla", "torch_xla.experimental"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.MODULE, made.module)
    (reason,) = registry.unavailable("_native_xla")
    assert reason.startswith("torch_xla 2.3.0: fa_custom_backward takes no grad_output, o, l, m")
    xla.PACKAGE.forget()


@pytest.mark.parametrize("case", ["plain", "mask", "causal"])
def test_traced_without_the_library(case):
    flash_checks.traced("_native_xla", case)


def test_packed_traced_without_the_library():
    flash_checks.traced_packed("_native_xla")


def test_opcheck(library):
    flash_checks.opcheck("_native_xla")
