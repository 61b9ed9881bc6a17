"""FlashAttention-2: every line of its glue against float64, with a stand-in bound to the recorded signatures."""

from __future__ import annotations

import sys
import types

import flash_checks
import pytest
import torch
from flash_checks import POSITIONS, SHAPES
from stand_ins import flash2 as stand_in
from test_varlen import LENGTHS

import compiled_attn
from compiled_attn import registry
from compiled_attn.ops import flash2

BACKENDS = ("flash", "flash_varlen")


@pytest.fixture(params=["flash-attn", "flash-attn-2.6.3"])
def library(request, monkeypatch):
    """The stand-in, loaded in place of the library: as released last, and as the oldest release we take."""
    return flash_checks.stand_in_for(flash2, stand_in.Library(request.param), monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(library, backend, shape, positions):
    flash_checks.dense(backend, flash_checks.tensors(shape), None, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_key_padding_masks(library, backend, shape):
    flash_checks.dense(backend, flash_checks.tensors(shape), flash_checks.padding(shape), "full")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_layouts_and_scale(library, backend, masked):
    inputs = flash_checks.tensors("grouped", transposed=True)
    flash_checks.dense(backend, inputs, flash_checks.padding("grouped") if masked else None, "full", scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_have_no_gradient(library, backend):
    flash_checks.masked_keys_have_no_gradient(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_may_hold_anything(library, backend):
    flash_checks.masked_keys_may_hold_anything(backend)


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(library, lengths, positions, key_heads):
    inputs = flash_checks.packed(lengths, key_heads)
    flash_checks.varlen("flash_varlen", inputs, positions)
    flash_checks.varlen("flash", inputs, positions, (50, 60))  # its partner's kernels; bounds, not lengths


def test_one_query_a_sequence_is_not_taken_for_a_batch(library):
    """With a bound of 1 and grouped heads the library believes that there are as many rows as sequences."""
    inputs = [*flash_checks.packed("one", 2)[:3], *(torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1], [0, 3, 9]))]
    flash_checks.varlen("flash_varlen", inputs, "full")
    assert library.asked["max_seqlen_q"] == 2


def test_which_function_is_called(library):
    """The dense one without a mask, the packed one with it, or by a packed name, or where the dense one is wrong."""
    asked = {
        ("flash", None, "full"): "_flash_attn_forward",
        ("flash", None, "window"): "_flash_attn_forward",
        ("flash", None, "past_the_end"): "_flash_attn_varlen_forward",
        ("flash", None, "open_right"): "_flash_attn_varlen_forward",
        ("flash", None, "causal_window"): "_flash_attn_forward",
        ("flash", "mask", "full"): "_flash_attn_varlen_forward",
        ("flash_varlen", None, "full"): "_flash_attn_varlen_forward",
    }
    for (backend, mask, positions), function in asked.items():
        library.calls.clear()
        keep = flash_checks.padding("more_queries") if mask else None
        with torch.no_grad():
            flash_checks.call(backend, flash_checks.tensors("more_queries"), keep, positions)
        assert library.calls == [function], (backend, mask, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_dropout_and_its_gradient(library, backend, masked):
    """out = W V with one W for all of V: <g, out> = <dv, V>, and a step in V changes out by W."""
    query, key, value = flash_checks.tensors("grouped")
    keep = flash_checks.padding("grouped") if masked else None
    torch.manual_seed(3)
    out, _, state = flash_checks.call(backend, [query, key, value], keep, "full", 0.4)
    assert (state.shape, state.dtype) == ((2,), torch.int64)
    grad = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (query, key, value), grad)
    torch.testing.assert_close((grad * out).sum(), (dv * value).sum())
    whole, *_ = flash_checks.call(backend, [query, key, value], keep, "full")
    assert (whole - out).abs().max() > 0.1
    # the same numbers drawn again: the derivative along a direction, by a difference
    for which, gradient in enumerate((dq, dk, dv)):
        step = torch.randn_like(gradient)
        moved = [tensor.detach() for tensor in (query, key, value)]
        sides = []
        for sign in (1, -1):
            torch.manual_seed(3)
            there = [one + sign * 1e-5 * step if number == which else one for number, one in enumerate(moved)]
            sides.append(flash_checks.call(backend, there, keep, "full", 0.4)[0])
        difference = ((sides[0] - sides[1]) * grad).sum() / 2e-5
        torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-6, atol=1e-6)


def test_dropout_of_nothing(library):
    for shape in ("no_query", "no_key", "no_batch"):
        out, lse, state = flash_checks.call("flash", flash_checks.tensors(shape), None, "full", 0.5)
        assert (state == 0).all()
        assert state.shape == (2,)
        assert (out == 0).all()
        assert not lse.isfinite().any()


def test_dropout_of_packed_sequences(library):
    operator = registry.find("flash_varlen").varlen_op
    inputs = flash_checks.packed("uneven", 2)
    out, _, state = operator(*inputs, 17, 23, 0.4, 0, None, True, None, False, True)
    assert state.shape == (2,)
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, inputs[2], grad)
    torch.testing.assert_close((grad * out).sum(), (dv * inputs[2]).sum())


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_backward(library, deterministic):
    inputs = flash_checks.tensors("plain")
    for keep in (None, flash_checks.padding("plain")):
        out, *_ = flash_checks.call("flash", inputs, keep, "full", deterministic=deterministic)
        out.sum().backward()
        assert library.asked["deterministic"] is deterministic
        assert library.asked["softmax_scale"] == 0.25


def test_bounds_of_nothing(library):
    flash_checks.only_rows_behind("flash")


def test_half_precision(library):
    flash_checks.half_precision("flash", torch.bfloat16)


def test_what_a_library_wrapped_into_an_operator_is_unwrapped():
    made = stand_in.Library()

    class Wrapped:
        """Like torch.library's CustomOpDef: its signature says nothing."""

        def __init__(self, function):
            self._init_fn = function

        def __call__(self, *args, **kwargs):
            raise AssertionError("through the dispatcher")

    names = [name for name in vars(made.module) if name.startswith("_flash")]
    holder = types.SimpleNamespace(
        flash_attn_interface=types.SimpleNamespace(**{name: Wrapped(getattr(made.module, name)) for name in names})
    )
    q, k, v = flash_checks.tensors("plain", torch.float32)
    out, *_ = flash2.bind(holder).forward(q.detach(), k.detach(), v.detach(), None, 0.1, False, (-1, -1), 0.0, True)
    assert out.shape == q.shape


# ------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "takes bfloat16/float16, not float32": {"dtypes": (torch.float32,) * 3},
    "head_dim=264 is over 256": flash_checks.wide(264),
    "needs compute capability 8.0 or later, not 7.5": {"capability": (7, 5)},
    "takes key_padding masks, so not a bool mask": {"mask": "bool"},
    "takes key_padding masks, so not a float mask": {"mask": "float"},
    "needs one head_dim": {"value": (2, 6, 4, 32)},
    "not upper_left": {"key": (2, 9, 4, 64), "value": (2, 9, 4, 64), "causal": True},
    "packs the real keys": {"mask": "key_padding", "causal": True},
    "it cannot place a causal mask or a window": {"mask": "key_padding", "window": (1, 1)},
    "runs on cuda, not cpu": {"devices": ("cpu",) * 3, "capability": None},
}
WIDE = {"query": (1, 4, 2, 256), "key": (1, 4, 2, 256), "value": (1, 4, 2, 256), "capability": (8, 9)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(backend, reason):
    found = flash_checks.refusals(backend, **REFUSED[reason])
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_dropout_is_refused_where_the_library_launches_nothing(backend):
    found = flash_checks.refusals(backend, **WIDE, dropout_p=0.1, gradient=True)
    assert len(found) == 1
    assert "head_dim=256 over 192 on compute capability (8, 9)" in found[0]
    assert flash_checks.refusals(backend, **{**WIDE, "capability": (9, 0)}, dropout_p=0.1, gradient=True) == []
    assert flash_checks.refusals(backend, **WIDE, dropout_p=0.1) == []
    assert flash_checks.refusals(backend, **WIDE, gradient=True) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_served(backend):
    served = (
        {"mask": "key_padding", "gradient": True, "lse": True, "deterministic": True, "dropout_p": 0.5},
        {"causal": True}, {"window": (3, -1)}, {"key": (2, 6, 2, 64), "value": (2, 6, 2, 64), "gqa": True},
        {"key": (2, 9, 4, 64), "value": (2, 9, 4, 64), "causal": True, "alignment": "lower_right"},
    )  # fmt: skip
    for call in served:
        assert flash_checks.refusals(backend, **call) == []
    assert flash_checks.refusals(backend, varlen=True, causal=True, alignment="lower_right", gradient=True) == []
    assert flash_checks.refusals(backend, varlen=True, causal=True, same_lengths=True) == []
    (reason,) = flash_checks.refusals(backend, varlen=True, causal=True)
    assert "pass causal_alignment='lower_right'" in reason


def test_a_package_that_is_absent_or_not_as_expected(monkeypatch):
    flash2.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert registry.unavailable("flash") == [
        "module 'flash_attn.flash_attn_interface' is not installed; pip install flash-attn --no-build-isolation"
    ]
    with pytest.raises(NotImplementedError, match="'flash_varlen' cannot run here"):
        compiled_attn.set_default_backend("flash_varlen")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.5.9")
    assert registry.unavailable("flash")[0].startswith("flash-attn 2.5.9 is older than 2.6.3; pip install flash-attn")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.3")
    for function in ("_flash_attn_forward", "_flash_attn_varlen_backward"):
        made = stand_in.Library()
        setattr(made.module, function, lambda q, k, v: None)
        monkeypatch.setitem(sys.modules, stand_in.MODULE, made.module)
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        flash2.PACKAGE.forget()
        (reason,) = registry.unavailable("flash")
        assert f"flash-attn 2.8.3: {function} takes no " in reason
        with pytest.raises(NotImplementedError, match=f"{function} takes no"):
            flash2.PACKAGE.load()
    flash2.PACKAGE.forget()


# ------------------------------------------------------------------------------- operators, without the library


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "mask", "dropout", "causal"])
def test_traced_without_the_library(backend, case):
    flash_checks.traced(backend, case)


def test_packed_traced_without_the_library():
    for backend in BACKENDS:
        flash_checks.traced_packed(backend)


def test_opcheck(library):
    for backend in BACKENDS:
        flash_checks.opcheck(backend)
