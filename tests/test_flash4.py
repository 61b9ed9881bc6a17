"""FlashAttention-4: every line of its glue against float64, with a stand-in bound to the recorded signatures."""

from __future__ import annotations

import contextlib
import math
import sys
import types

import flash_checks
import pytest
import torch
from flash_checks import POSITIONS, SHAPES, wide
from stand_ins import flash4 as stand_in
from test_varlen import LENGTHS

from compiled_attn import registry
from compiled_attn.ops import _flash_common, flash4


@pytest.fixture(params=[3, 2], ids=["five_results", "four_results"])
def library(request, monkeypatch):
    """The stand-in, loaded in place of the library; betas up to 32 gave one result less."""
    return flash_checks.stand_in_for(flash4, stand_in.Library(request.param), monkeypatch)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(library, shape, positions):
    flash_checks.dense("_flash_4", flash_checks.tensors(shape), None, positions)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_key_padding_masks(library, monkeypatch, shape, capability):
    """On 9.0 queries stay a dense batch beside packed keys; elsewhere that was not run, and wrong in betas up to 32."""
    monkeypatch.setattr(_flash_common, "capability_of", lambda q: capability)
    flash_checks.dense("_flash_4", flash_checks.tensors(shape), flash_checks.padding(shape), "full")
    given = [one["cu_seqlens_q"] is None for name, one in library.history if name == "_flash_attn_fwd"]
    assert set(given) <= {capability == (9, 0)}
    assert given or not math.prod(SHAPES[shape])


@pytest.mark.parametrize("width", [8, 40, 48, 64, 72, 96, 104, 128, 136])
def test_gradients_on_hopper_have_a_width_that_is_right_there(library, monkeypatch, width):
    """A multiple of 16 that is none of 32 gives wrong ones, up to 128."""
    for module in (flash4, _flash_common):
        monkeypatch.setattr(module, "capability_of", lambda q: (9, 0))
    monkeypatch.setitem(SHAPES, "width", (2, 5, 7, 4, 2, width))
    for keep in (None, flash_checks.padding("width")):
        flash_checks.dense("_flash_4", flash_checks.tensors("width"), keep, "full")
        asked = {one["q"].shape[-1] for name, one in library.history if name == "_flash_attn_bwd"}
        assert asked == {width if width > 128 or width % 32 in (0, 24) else 64 if width < 64 else 128}


@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_layouts_and_scale(library, masked):
    inputs = flash_checks.tensors("grouped", transposed=True)
    flash_checks.dense("_flash_4", inputs, flash_checks.padding("grouped") if masked else None, "full", scale=0.7)


def test_masked_keys_have_no_gradient(library):
    flash_checks.masked_keys_have_no_gradient("_flash_4")


def test_masked_keys_may_hold_anything(library):
    flash_checks.masked_keys_may_hold_anything("_flash_4")


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(library, lengths, positions, key_heads):
    inputs = flash_checks.packed(lengths, key_heads)
    flash_checks.varlen("_flash_4", inputs, positions)
    flash_checks.varlen("_flash_4", inputs, positions, (50, 60))


@pytest.mark.parametrize("positions", POSITIONS)
def test_open_sides_are_none(library, positions):
    """A -1 beside a bound would be a bound: one key less."""
    flash_checks.dense("_flash_4", flash_checks.tensors("plain"), None, positions)
    for side in ("window_size_left", "window_size_right"):
        assert library.asked[side] is None or library.asked[side] >= 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_backward(library, deterministic):
    inputs = flash_checks.tensors("plain")
    operator = registry.find("_flash_4").op
    out, *_ = operator(*inputs, None, None, 0.0, 0, None, False, None, deterministic, True)
    out.sum().backward()
    assert library.asked["deterministic"] is deterministic
    assert library.asked["softmax_scale"] == 0.25
    assert library.calls == ["_flash_attn_fwd", "_flash_attn_bwd"]


@pytest.mark.parametrize("lengths", [None, "uneven"], ids=["dense", "packed"])
def test_the_device_of_the_tensors_is_current_inside(library, monkeypatch, lengths):
    """The library asks the current device for its architecture, and has no guard of its own."""
    entered = []

    @contextlib.contextmanager
    def current(device):
        assert not library.calls[len(entered) :], "called outside"
        entered.append(device)
        yield
        assert len(library.calls) == len(entered)

    monkeypatch.setattr(flash4, "on", current)
    if lengths is None:
        inputs = flash_checks.tensors("plain")
        out, *_ = registry.find("_flash_4").op(*inputs, None, None, 0.0, 0, None, False, None, False, True)
    else:
        inputs = flash_checks.packed(lengths)
        out, *_ = registry.find("_flash_4").varlen_op(*inputs, 17, 24, 0.0, 0, None, False, None, False, True)
    out.sum().backward()
    assert entered == [torch.device("cpu")] * 2
    assert library.calls == ["_flash_attn_fwd", "_flash_attn_bwd"]


def test_bounds_of_nothing(library):
    flash_checks.only_rows_behind("_flash_4")


def test_half_precision(library):
    flash_checks.half_precision("_flash_4", torch.bfloat16)


REFUSED = {
    "takes bfloat16/float16, not float32": {"dtypes": (torch.float32,) * 3},
    "head_dim=264 is over 256": wide(264),
    "has kernels for compute capability 8.x-12.x, not 7.5": {"capability": (7, 5)},
    "for compute capability 8.x-12.x, not 13.0": {"capability": (13, 0)},
    "no backward on compute capability (8, 9); use flash": {"capability": (8, 9), "gradient": True},
    "no deterministic backward on compute capability (12, 0)": {
        "capability": (12, 0), "gradient": True, "deterministic": True,
    },
    "head_dim up to 128, or 256, on compute capability (10, 0), not 192": {"capability": (10, 0), **wide(192)},
    "head_dim up to 128 on compute capability (12, 1), not 136": {"capability": (12, 1), **wide(136)},
    "has no dropout": {"dropout_p": 0.1},
    "takes key_padding masks, so not a bool mask": {"mask": "bool"},
    "packs the real keys": {"mask": "key_padding", "causal": True},
    "not upper_left": {"key": (2, 9, 4, 64), "value": (2, 9, 4, 64), "causal": True},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    found = flash_checks.refusals("_flash_4", **REFUSED[reason])
    assert len(found) == 1
    assert reason in found[0]


def test_what_is_served():
    served = (
        {"mask": "key_padding", "gradient": True, "lse": True, "deterministic": True}, {"capability": (8, 0)},
        {"capability": (10, 0), **wide(250)}, {**wide(192), "gradient": True}, {"window": (3, -1)},
        {"capability": (12, 0), "gradient": True}, {"capability": None, "devices": ("meta",) * 3},
    )  # fmt: skip
    for call in served:
        assert flash_checks.refusals("_flash_4", **call) == []
    assert flash_checks.refusals("_flash_4", varlen=True, causal=True, alignment="lower_right", gradient=True) == []


def test_packages_that_are_absent_too_old_or_another(monkeypatch):
    flash4.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = registry.unavailable("_flash_4")
    assert reason.startswith("module 'flash_attn.cute' is not installed; pip install --pre flash-attn-4")
    monkeypatch.undo()
    # flash-attn alone brings a copy of flash_attn.cute
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert "is there, but not from 'flash-attn-4'" in registry.unavailable("_flash_4")[0]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0.0b9")
    assert "flash-attn-4 4.0.0b9 is older than 4.0.0b20" in registry.unavailable("_flash_4")[0]
    # the same copy, installed over flash-attn-4
    made = stand_in.Library()
    made.module.interface._flash_attn_bwd = lambda q, k, v, out, dout, lse, softmax_scale, causal: None
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0.0b36")
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", made.module)
    (reason,) = registry.unavailable("_flash_4")
    assert reason.startswith("flash-attn-4 4.0.0b36: _flash_attn_bwd takes no window_size_left")
    flash4.PACKAGE.forget()


def test_a_package_that_fails_to_import(monkeypatch):
    flash4.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0.0b36")
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    (reason,) = registry.unavailable("_flash_4")
    assert "flash-attn-4 4.0.0b36 is installed but broken: ModuleNotFoundError" in reason
    flash4.PACKAGE.forget()


@pytest.mark.parametrize("case", ["plain", "mask", "causal"])
def test_traced_without_the_library(case):
    flash_checks.traced("_flash_4", case)


def test_packed_traced_without_the_library():
    flash_checks.traced_packed("_flash_4")


def test_opcheck(library):
    flash_checks.opcheck("_flash_4")
