"""aiter: every line of its glue against float64, with a stand-in bound to the recorded signatures."""

from __future__ import annotations

import sys
import types

import flash_checks
import operator_checks
import pytest
import torch
from flash_checks import SHAPES
from operator_checks import MASKS
from recorded import bound
from stand_ins import aiter as stand_in
from test_varlen import LENGTHS

from compiled_attn import masks, reference, registry
from compiled_attn.ops import aiter
from compiled_attn.packages import Unfit
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL


@pytest.fixture
def library(monkeypatch):
    """The stand-in, bound in place of the library."""
    made = stand_in.Library()
    monkeypatch.setitem(aiter.PACKAGE.__dict__, "loaded", aiter.Aiter(made.module))
    return made


@pytest.mark.parametrize("positions", flash_checks.POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(library, shape, positions):
    flash_checks.dense("aiter", flash_checks.tensors(shape), None, positions)


@pytest.mark.parametrize("positions", ["full", "causal_lower", "window_lower", "causal_window_lower"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(library, mask, positions):
    causal, window = operator_checks.POSITIONS[positions]
    if causal & CAUSAL and mask not in ("none", "key_padding"):
        pytest.skip("causal composes with key padding alone")
    for shape in ("plain", "more_queries", "grouped", "padded_width", "one_query", "one_key"):
        operator_checks.dense(
            "aiter", flash_checks.tensors(shape), **operator_checks.made_mask(mask, shape), causal=causal,
            window=window,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "calls"), [("bool_shared", 1), ("bool", 2), ("float_per_head", 4), ("key_padding", 1)]
)
def test_one_call_for_each_bias(library, mask, calls):
    operator_checks.dense("aiter", flash_checks.tensors("grouped"), **operator_checks.made_mask(mask, "grouped"))
    assert len(library.calls) == 3 * calls  # with lse, its backward, without lse


@pytest.mark.parametrize("shape", ["no_query", "no_key", "no_batch"])
def test_masks_of_nothing(library, shape):
    inputs = flash_checks.tensors(shape)
    mask = torch.ones(1, 1, inputs[0].shape[1], inputs[1].shape[1], dtype=torch.bool)
    operator_checks.dense("aiter", inputs, mask)
    assert library.calls == []


def test_layouts_and_scale(library):
    inputs = flash_checks.tensors("grouped", transposed=True)
    for kind in ("none", "key_padding", "float_per_head"):
        operator_checks.dense("aiter", inputs, **operator_checks.made_mask(kind, "grouped"), scale=0.7)


def test_masked_keys_have_no_gradient(library):
    flash_checks.masked_keys_have_no_gradient("aiter")


@pytest.mark.parametrize("key_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("positions", flash_checks.POSITIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(library, lengths, positions, key_heads):
    flash_checks.varlen("aiter", flash_checks.packed(lengths, key_heads), positions)


def test_which_function_is_called(library):
    operator = registry.find("aiter").op
    lower = CAUSAL | ALIGN_LOWER_RIGHT
    for shape, causal, window, backward in (
        ("plain", 0, None, "_flash_attn_backward"), ("grouped", lower, None, "_flash_attn_backward"),
        ("plain", lower, None, "mha_bwd"), ("grouped", ALIGN_LOWER_RIGHT, [0, 0], "mha_bwd"),
    ):  # fmt: skip
        library.calls.clear()
        inputs = flash_checks.tensors(shape)
        gqa = SHAPES[shape][3] != SHAPES[shape][4]
        operator(*inputs, None, None, 0.0, causal, None, gqa, window, False, True)[0].sum().backward()
        assert library.calls == ["mha_fwd" if window else "_flash_attn_forward", backward]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_reaches_the_backward(library, deterministic):
    """The library's own default is True."""
    for kind in ("none", "bool"):
        inputs = flash_checks.tensors("plain")
        mask = operator_checks.made_mask(kind, "plain").get("mask")
        out, *_ = registry.find("aiter").op(*inputs, mask, None, 0.0, 0, None, False, None, deterministic, True)
        out.sum().backward()
        assert library.asked["deterministic"] is deterministic


@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_dropout_and_its_gradient(library, masked):
    inputs = flash_checks.tensors("grouped")
    keep = flash_checks.padding("grouped") if masked else None
    out, _, state = registry.find("aiter").op(*inputs, None, keep, 0.4, 0, None, True, None, False, True)
    whole, _, _ = registry.find("aiter").op(*inputs, None, keep, 0.0, 0, None, True, None, False, True)
    assert (out - whole).abs().max() > 0.1
    assert (state.shape, state.dtype) == ((2,), torch.int64)
    grad = torch.randn(out.shape, dtype=out.dtype)
    _, _, dv = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close((grad * out).sum(), (dv * inputs[2]).sum())


def test_half_precision_sums_over_biases_are_not_rounded(library):
    """dk is a sum over 4 heads that share a key head: added in float32, rounded once."""
    inputs = [one.detach().bfloat16().requires_grad_() for one in flash_checks.tensors("grouped")]
    mask = operator_checks.made_mask("float_per_head", "grouped")["mask"].bfloat16()
    out, _, _ = registry.find("aiter").op(*inputs, mask, None, 0.0, 0, None, True, None, False, True)
    expected, _ = reference.attention(*inputs, mask)
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(out, inputs, grad.bfloat16())
    for one, right in zip(found, torch.autograd.grad(expected, inputs, grad.bfloat16().double()), strict=True):
        torch.testing.assert_close(one, right, atol=0.03, rtol=0.02)


# ---------------------------------------------------------------------------------------------------- the Hub's


@pytest.fixture
def forward_only():
    """The Hub's build behind kernels of its own, as ops/hub.py makes them."""
    made = stand_in.Library()
    bundle = types.SimpleNamespace(load=lambda: aiter.AiterForward(stand_in.hub(made)))
    return (*aiter.hub_kernels(bundle), made)


@pytest.mark.parametrize("positions", flash_checks.POSITIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_hub(forward_only, positions, masked):
    dense, varlen, _ = forward_only
    assert dense.backward is None and varlen.backward is None
    causal, window = flash_checks.POSITIONS[positions]
    if masked and positions != "full":
        pytest.skip("refused")
    options = {"is_causal": bool(causal & CAUSAL), "causal_alignment": "lower_right", "window_size": window}
    for shape in SHAPES:
        inputs = [one.detach() for one in flash_checks.tensors(shape)]
        keep = flash_checks.padding(shape) if masked else None
        out, lse, _ = dense.forward(*inputs, None, keep, 0.0, causal, None, True, window, False, True)
        expected, expected_lse = reference.attention(*inputs, key_padding_mask=keep, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        torch.testing.assert_close(dense.forward(*inputs, None, keep, 0.0, causal, None, True, window)[0], expected)
    for lengths in LENGTHS if not masked else ():
        inputs = [one.detach() for one in flash_checks.packed(lengths, 2)]
        longest = (int(inputs[3].diff().max()), int(inputs[4].diff().max()))
        out, lse, _ = varlen.forward(*inputs, *longest, 0.0, causal, None, True, window, False, True)
        expected, expected_lse = reference.varlen_attention(*inputs, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)


# --------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ("aligns causal and window masks lower_right when Sq != Sk",
     {"causal": True, "key": (2, 7, 4, 64), "value": (2, 7, 4, 64)}),
    ("has no dropout with a mask that goes in as a bias", {"mask": "float", "dropout_p": 0.1}),
    ("has no dropout with a mask that goes in as a bias", {"mask": "key_padding", "causal": True, "dropout_p": 0.1}),
    ("gives no gradient for attn_mask", {"mask": "float", "mask_gradient": True}),
    ("needs one head_dim", {"value": (2, 6, 4, 32)}),
    ("takes bfloat16/float16, not float32", {"dtypes": (torch.float32,) * 3}),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "call"), REFUSED)
def test_refusals(reason, call):
    assert any(found.startswith(reason) for found in flash_checks.refusals("aiter", **call))


def test_what_is_served():
    for call in (
        {"capability": (9, 4), "gradient": True, "deterministic": True}, {"mask": "key_padding", "dropout_p": 0.1},
        {"causal": True, "mask": "key_padding"}, {"varlen": True, "same_lengths": True, "causal": True},
    ):  # fmt: skip
        assert flash_checks.refusals("aiter", **call) == []


@pytest.mark.parametrize(
    ("name", "seen", "reason"),
    [
        ("aiter", ["gfx942:sramecc+:xnack-", "gfx1100"], None),
        ("aiter", ["gfx90a:sramecc+"], None),
        ("aiter", ["gfx1201", "gfx1100"], "has kernels for gfx90a, gfx942, gfx950, and there is gfx1100, gfx1201"),
        ("aiter_fa2_hub", ["gfx950"], None),
        ("aiter_fa2_hub", ["gfx90a:sramecc+"], "has kernels for gfx942, gfx950, and there is gfx90a"),
    ],
)
def test_gpus_without_a_kernel(monkeypatch, name, seen, reason):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    gpus = [types.SimpleNamespace(gcnArchName=one) for one in seen]
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    found = [one for one in registry.unavailable(name) if one.startswith("has kernels for")]
    assert found == ([] if reason is None else [reason])


def test_another_package_of_the_same_name(monkeypatch):
    aiter.PACKAGE.forget()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    reason, elsewhere = registry.unavailable("aiter")
    assert reason.startswith("module 'aiter' is there, but not from 'amd-aiter'; pip install amd-aiter")
    assert "the package called aiter is another project: uninstall it" in reason
    assert elsewhere == "runs on ROCm alone, and this PyTorch is not built for it"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert registry.unavailable("aiter") == [reason]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.7")
    made = stand_in.Library()
    for name in ("aiter", "aiter.ops", stand_in.MODULE):
        monkeypatch.setitem(sys.modules, name, made.module)
    assert registry.unavailable("aiter") == []
    made.module.mha_bwd = lambda dout: None
    aiter.PACKAGE.forget()
    (reason,) = registry.unavailable("aiter")
    assert reason.startswith("amd-aiter 0.1.7: mha_bwd takes no q, k, v,")
    aiter.PACKAGE.forget()


def test_signatures_hidden_behind_an_operator(monkeypatch):
    """Installed, most functions are (*args, **kwargs) round torch.ops.aiter.<name>."""
    made = stand_in.Library()
    hidden = {}
    for name in ("mha_fwd", "_flash_attn_backward"):
        function = getattr(made.module, name)
        setattr(made.module, name, lambda *args, function=function, **kwargs: function(*args, **kwargs))
        arguments = [
            types.SimpleNamespace(name=one) for one in bound("amd-aiter", f"{stand_in.MODULE}:{name}").parameters
        ]
        schema = types.SimpleNamespace(_schema=types.SimpleNamespace(arguments=arguments))
        hidden[name] = types.SimpleNamespace(default=schema)
    with pytest.raises(Unfit, match="_flash_attn_backward takes no"):
        aiter.Aiter(made.module)
    monkeypatch.setattr(torch.ops, "aiter", types.SimpleNamespace(**hidden), raising=False)
    monkeypatch.setitem(aiter.PACKAGE.__dict__, "loaded", aiter.Aiter(made.module))
    flash_checks.dense("aiter", flash_checks.tensors("plain"), None, "window")


def test_sinks_of_later_releases_are_none(library):
    """window_size became a triple and the raw functions took sink_size: it is passed as 0."""
    known = library.module.mha_fwd

    def newer(q, k, v, dropout_p, softmax_scale, is_causal, window_size_left, window_size_right, sink_size,
              return_softmax_lse, return_dropout_randval, bias=None, alibi_slopes=None):  # fmt: skip
        assert sink_size == 0
        return known(q, k, v, dropout_p, softmax_scale, is_causal, window_size_left, window_size_right,
                     return_softmax_lse, return_dropout_randval, bias=bias, alibi_slopes=alibi_slopes)  # fmt: skip

    library.module.mha_fwd = newer
    aiter.PACKAGE.__dict__["loaded"] = aiter.Aiter(library.module)
    flash_checks.dense("aiter", flash_checks.tensors("plain"), None, "window")


def test_masks_are_cut_into_parts_that_share_a_bias():
    q, k, _ = flash_checks.tensors("grouped")
    full = masks.combined(torch.ones(2, 4, 6, 6, dtype=torch.bool), None, None)
    heads = [(sequences.start, head.start, key_head.start) for sequences, head, key_head, _ in aiter._parts(full, q, k)]
    assert heads == [(batch, head, head // 2) for batch in range(2) for head in range(4)]


# ------------------------------------------------------------------------------------- operators, without the library


@pytest.mark.parametrize("case", ["plain", "mask", "dropout", "causal"])
def test_traced_without_the_library(case):
    flash_checks.traced("aiter", case)


def test_packed_traced_without_the_library():
    flash_checks.traced_packed("aiter")


def test_opcheck(library):
    flash_checks.opcheck("aiter")
