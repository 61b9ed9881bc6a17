"""FlashAttention-3: every line of its glue against float64, with a stand-in bound to the recorded signatures."""

from __future__ import annotations

import sys
import types

import flash_checks
import pytest
import torch
from flash_checks import POSITIONS, SHAPES, wide
from stand_ins import flash3 as stand_in
from test_varlen import LENGTHS

from compiled_attn import registry
from compiled_attn.ops import flash3

BACKENDS = ("_flash_3", "_flash_varlen_3")


@pytest.fixture(params=["flash-attn-3", "flash-attn-3-beta"])
def library(request, monkeypatch):
    """The stand-in, loaded in place of the library: 3.0.0, and the last beta without torch.compile."""
    return flash_checks.stand_in_for(flash3, stand_in.Library(request.param), monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(library, backend, shape, positions):
    flash_checks.dense(backend, flash_checks.tensors(shape), None, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_key_padding_masks(library, backend, shape):
    flash_checks.dense(backend, flash_checks.tensors(shape), flash_checks.padding(shape), "full")


@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_layouts_and_scale(library, masked):
    inputs = flash_checks.tensors("grouped", transposed=True)
    flash_checks.dense("_flash_3", inputs, flash_checks.padding("grouped") if masked else None, "full", scale=0.7)


def test_masked_keys_have_no_gradient(library):
    for backend in BACKENDS:
        flash_checks.masked_keys_have_no_gradient(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_may_hold_anything(library, backend):
    flash_checks.masked_keys_may_hold_anything(backend)


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(library, lengths, positions, key_heads):
    inputs = flash_checks.packed(lengths, key_heads)
    flash_checks.varlen("_flash_varlen_3", inputs, positions)
    flash_checks.varlen("_flash_3", inputs, positions, (50, 60))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_reaches_the_library(library, backend, deterministic):
    inputs = flash_checks.tensors("plain")
    operator = registry.find(backend).op
    out, *_ = operator(*inputs, None, None, 0.0, 0, None, False, None, deterministic, True)
    out.sum().backward()
    assert library.asked["deterministic"] is deterministic
    assert library.asked["softmax_scale"] == 0.25
    assert library.calls == ["_flash_attn_forward", "_flash_attn_backward"]
    # one function serves both: a dense call has no cu_seqlens
    assert (library.asked["cu_seqlens_k"] is None) == (backend == "_flash_3")


def test_bounds_of_nothing(library):
    flash_checks.only_rows_behind("_flash_3")


def test_half_precision(library):
    flash_checks.half_precision("_flash_3", torch.float16)


REFUSED = {
    "takes bfloat16/float16, not float32": {"dtypes": (torch.float32,) * 3},
    "head_dim=264 is over 256": wide(264),
    "has kernels for compute capability 8.x, 9.x, not 7.5": {"capability": (7, 5)},
    "for compute capability 8.x, 9.x, not 10.0": {"capability": (10, 0)},
    "no deterministic backward for head_dim=200 over 192": {"gradient": True, "deterministic": True, **wide(200)},
    "has no dropout": {"dropout_p": 0.1},
    "takes key_padding masks, so not a float mask": {"mask": "float"},
    "packs the real keys": {"mask": "key_padding", "window": (2, 2)},
    "not upper_left": {"key": (2, 9, 4, 64), "value": (2, 9, 4, 64), "causal": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(backend, reason):
    found = flash_checks.refusals(backend, **REFUSED[reason])
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_served(backend):
    served = (
        {"mask": "key_padding", "gradient": True, "lse": True, "deterministic": True}, {"capability": (8, 9)},
        {**wide(256), "gradient": True}, {**wide(192), "gradient": True, "deterministic": True}, {"window": (3, -1)},
    )  # fmt: skip
    for call in served:
        assert flash_checks.refusals(backend, **call) == []
    assert flash_checks.refusals(backend, varlen=True, causal=True, alignment="lower_right", gradient=True) == []
    (reason,) = flash_checks.refusals(backend, varlen=True, gradient=True, deterministic=True, **packed_wide())
    assert "no deterministic backward" in reason


def packed_wide():
    return dict.fromkeys(("query", "key", "value"), (6, 2, 256))


def test_packages_that_are_absent_or_not_as_expected(monkeypatch):
    flash3.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = registry.unavailable("_flash_3")
    assert reason.startswith("module 'flash_attn_interface' is not installed; build hopper/")
    monkeypatch.undo()
    # the first releases of 2024 knew no packed sequences here
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    old = types.ModuleType("flash_attn_interface")
    old._flash_attn_forward = lambda q, k, v, softmax_scale, causal, window_size: None
    old._flash_attn_backward = lambda dout, q, k, v, out, softmax_lse, dq, dk, dv: None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", old)
    (reason,) = registry.unavailable("_flash_3")
    assert "_flash_attn_forward takes no cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k" in reason
    flash3.PACKAGE.forget()


@pytest.mark.parametrize("disabled", [True, False, None])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_builds_without_kernels_for_this_gpu(monkeypatch, disabled, capability):
    """flash_attn_config lies beside the library since the betas of 2025."""
    flash3.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in.Library().module)
    config = types.ModuleType("flash_attn_config")
    config.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_SM8x": disabled}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", None if disabled is None else config)
    found = registry.unavailable("_flash_3")
    if disabled and capability == (8, 0):
        assert found == ["flash_attn_3: was built without kernels for compute capability 8; use flash"]
    else:
        assert found == []
    flash3.PACKAGE.forget()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "mask", "causal"])
def test_traced_without_the_library(backend, case):
    flash_checks.traced(backend, case)


def test_packed_traced_without_the_library():
    for backend in BACKENDS:
        flash_checks.traced_packed(backend)


def test_opcheck(library):
    for backend in BACKENDS:
        flash_checks.opcheck(backend)
