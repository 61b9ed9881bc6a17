"""The rules between a call and a backend's Limits: each one alone, and all of them at once. No tensors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import compiled_attn
from compiled_attn import registry
from compiled_attn.spec import MASK_KINDS, Call, Limits, mistakes, reasons

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CALL = Call(
    query=(2, 17, 4, 64),
    key=(2, 33, 4, 64),
    value=(2, 33, 4, 64),
    dtypes=(F32, F32, F32),
    devices=("cpu", "cpu", "cpu"),
)
ALL = Limits(
    ("cpu",),
    (F32,),
    value_head_dim=True,
    masks=MASK_KINDS,
    mask_gradient=True,
    window=True,
    dropout=True,
)


def changed(**facts) -> Call:
    return dataclasses.replace(CALL, **facts)


def test_a_call_within_all_limits_has_no_reasons():
    assert mistakes(CALL) == []
    assert reasons((ALL,), CALL) == []


# field of Limits -> (the narrower value, a call that violates it, the reason)
VIOLATIONS = {
    "devices": (("cuda", "xpu"), {}, "runs on cuda/xpu, not cpu"),
    "dtypes": ((torch.float16, BF16), {}, "takes float16/bfloat16, not float32"),
    "min_capability": ((9, 0), {"capability": (8, 6)}, "needs compute capability 9.0 or later, not 8.6"),
    "capabilities": (
        ((8, 0), (12, None)),
        {"capability": (8, 6)},
        "has kernels for compute capability 8.0, 12.x, not 8.6",
    ),
    "min_head_dim": (65, {}, "head_dim=64 is under 65"),
    "max_head_dim": (63, {}, "head_dim=64 is over 63"),
    "head_dim_multiple": (48, {}, "head_dim=64 is not a multiple of 48"),
    "value_head_dim": (False, {"value": (2, 33, 4, 32)}, "needs one head_dim, not 64 for query/key and 32 for value"),
    "masks": (("none", "bool"), {"mask": "float"}, "takes bool masks, so not a float mask"),
    "mask_gradient": (False, {"mask": "float", "mask_gradient": True}, "gives no gradient for attn_mask"),
    "causal": (False, {"causal": True}, "has no causal mode"),
    "alignments": (("lower_right",), {"causal": True}, "when Sq != Sk (17 != 33), not upper_left"),
    "gqa": (False, {"gqa": True, "query": (2, 17, 8, 64)}, "has no grouped-query attention"),
    "window": (False, {"window": (3, 0)}, "has no sliding window"),
    "dropout": (False, {"dropout_p": 0.1}, "has no dropout (dropout_p=0.1)"),
    "lse": (False, {"lse": True}, "returns no lse"),
    "gradient": (False, {"gradient": True}, "is inference-only"),
    "deterministic": ("never", {"gradient": True, "deterministic": True}, "has no deterministic backward"),
    "also": ((lambda call: "is in a bad mood",), {}, "is in a bad mood"),
}


@pytest.mark.parametrize("field", VIOLATIONS)
def test_each_limit_alone(field):
    narrow, facts, reason = VIOLATIONS[field]
    call = changed(**facts)
    assert reasons((ALL,), call) == [], "the call must fit the wider limits"
    (found,) = reasons((dataclasses.replace(ALL, **{field: narrow}),), call)
    assert reason in found


def test_a_least_capability_and_a_list_of_them_exclude_each_other():
    with pytest.raises(ValueError, match="min_capability or capabilities, not both"):
        dataclasses.replace(ALL, min_capability=(8, 0), capabilities=((9, 0),))


def test_every_field_of_limits_is_tested():
    fields = {field.name for field in dataclasses.fields(Limits)}
    assert fields - set(VIOLATIONS) == {"verified", "rounding"}  # how the entry is known, how exact it is; no rules


MORE: list[dict] = [
    {},
    {"causal": True},
    {"dropout_p": 0.5},
    {"lse": True},
    {"deterministic": True},
    {"window": (3, 3)},
]


class OrderedBySmaller(tuple):
    """What Dynamo of torch 2.11 can compare of tuples: equal, and <."""

    def __gt__(self, other):
        raise AssertionError("a rule asks whether a tuple is greater; compare capability[0], or name capabilities")

    __ge__ = __le__ = __gt__


@pytest.mark.parametrize("name", compiled_attn.list_backends())
def test_rules_can_be_traced_by_dynamo_of_torch_2_11(name):
    """Found on an H200 where compiled calls of sage_hub ended in an error inside Dynamo."""
    backend = registry.backend_info(name)
    for capability in ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 1), (13, 0)):
        facts = {"devices": ("cuda",) * 3, "dtypes": (BF16,) * 3, "capability": OrderedBySmaller(capability)}
        for gradient, head_dim, mask, more in itertools.product(
            (False, True), (64, 256), ("none", "key_padding", "bool", "float"), MORE
        ):
            for limits, shape in ((backend.limits, (2, 40, 4)), (backend.varlen_limits, (40, 4))):
                shapes = dict.fromkeys(("query", "key", "value"), (*shape, head_dim))
                call = changed(**facts, **shapes, **more, gradient=gradient, mask=mask, varlen=len(shape) == 2)
                if limits:
                    reasons(limits, call)


def test_all_reasons_at_once():
    together = ("head_dim_multiple", "value_head_dim", "masks", "causal", "gqa", "window", "dropout", "lse", "gradient")
    facts: dict = {"capability": (8, 6), "mask_gradient": True}
    limits: dict = {name: VIOLATIONS[name][0] for name in (*together, "devices", "dtypes", "min_capability", "also")}
    for name in together:
        facts.update(VIOLATIONS[name][1])
    limits["mask_gradient"] = False
    found = reasons((dataclasses.replace(ALL, **limits),), changed(**facts))
    assert len(found) == len(together) + 5
    for name in (*together, "devices", "dtypes", "min_capability", "also", "mask_gradient"):
        assert any(VIOLATIONS[name][2] in reason for reason in found), name


def test_deterministic_by_the_process():
    limits = (dataclasses.replace(ALL, deterministic="global"),)
    asked = changed(gradient=True, deterministic=True)
    (found,) = reasons(limits, asked)
    assert "use_deterministic_algorithms(True)" in found
    assert reasons(limits, dataclasses.replace(asked, globally_deterministic=True)) == []
    assert reasons(limits, changed(deterministic=True)) == [], "without a gradient there is no backward"


@pytest.mark.parametrize("positional", [{"causal": True}, {"window": (2, 2)}], ids=["causal", "window"])
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
def test_with_equal_lengths_both_alignments_are_one(positional, alignment):
    other = "lower_right" if alignment == "upper_left" else "upper_left"
    limits = (dataclasses.replace(ALL, alignments=(other,)),)
    square = {"query": (2, 33, 4, 64)}
    assert reasons(limits, changed(alignment=alignment, **positional, **square)) == []
    assert len(reasons(limits, changed(alignment=alignment, **positional))) == 1


def test_packed_lengths_are_equal_only_when_they_are_one_tensor():
    packed = {"query": (40, 4, 64), "key": (40, 4, 64), "value": (40, 4, 64), "varlen": True, "causal": True}
    limits = (dataclasses.replace(ALL, alignments=("lower_right",)),)
    assert len(reasons(limits, changed(**packed))) == 1
    assert reasons(limits, changed(**packed, same_lengths=True)) == []


def test_the_entry_of_the_device_counts():
    cuda = dataclasses.replace(ALL, devices=("cuda",), dtypes=(BF16,))
    assert reasons((cuda, ALL), CALL) == []
    assert reasons((ALL, cuda), changed(devices=("cuda",) * 3, dtypes=(BF16,) * 3)) == []
    assert reasons((cuda, ALL), changed(devices=("cuda",) * 3)) == ["takes bfloat16, not float32"]
    assert reasons((cuda, ALL), changed(devices=("npu",) * 3))[0] == "runs on cuda/cpu, not npu"


# rule -> (facts, text)
MISTAKES = {
    "rank_query": ({"query": (2, 17, 64)}, "query has 3 dimensions, expected 4: (B, S, H, D)"),
    "rank_packed": ({"varlen": True}, "query has 4 dimensions, expected 3: (T, H, D)"),
    "dtypes": ({"dtypes": (F32, F64, F32)}, "query, key and value have dtypes float32/float64/float32"),
    "devices": ({"devices": ("cpu", "cpu", "meta")}, "query, key and value are on cpu/cpu/meta"),
    "integers": ({"dtypes": (torch.int32,) * 3}, "query is int32; attention needs a floating point dtype"),
    "batch": ({"query": (3, 17, 4, 64)}, "batch sizes differ: query 3, key 2, value 2"),
    "lengths": ({"value": (2, 34, 4, 64)}, "key has length 33, value 34"),
    "value_heads": ({"value": (2, 33, 2, 64)}, "key has 4 heads, value 2"),
    "head_dim": ({"key": (2, 33, 4, 32)}, "query has head_dim 64, key 32"),
    "heads": ({"query": (2, 17, 8, 64)}, "pass enable_gqa=True"),
    "groups": ({"query": (2, 17, 6, 64), "gqa": True}, "a multiple of key heads (4)"),
    "no_key_heads": ({"key": (2, 33, 0, 64), "value": (2, 33, 0, 64), "gqa": True}, "a multiple of key heads (0)"),
    "dropout_one": ({"dropout_p": 1.0}, "dropout_p=1.0 is not in [0, 1)"),
    "dropout_negative": ({"dropout_p": -0.1}, "dropout_p=-0.1 is not in [0, 1)"),
    "alignment": ({"alignment": "diagonal"}, "causal_alignment='diagonal' is none of"),
    "window": ({"window": (3, -2)}, "window_size=(3, -2) has an entry below -1"),
    "causal_bool": ({"causal": True, "mask": "bool"}, "is_causal=True with a bool attn_mask"),
    "causal_float": ({"causal": True, "mask": "float"}, "is_causal=True with a float attn_mask"),
    "causal_block": ({"causal": True, "mask": "block"}, "is_causal=True with a block attn_mask"),
}


@pytest.mark.parametrize("rule", MISTAKES)
def test_each_mistake(rule):
    facts, text = MISTAKES[rule]
    found = mistakes(changed(**facts))
    assert sum(text in one for one in found) == 1, found


def test_all_mistakes_at_once():
    found = mistakes(
        changed(
            query=(3, 17, 8, 64), key=(2, 33, 4, 32), value=(2, 34, 4, 64), dtypes=(F32, F32, F64),
            devices=("cpu", "meta", "cpu"), dropout_p=2.0, alignment="x", window=(-3, 0), causal=True, mask="bool",
        )
    )  # fmt: skip
    for text in (
        "dtypes", "are on cpu/meta/cpu", "batch sizes differ", "key has length", "head_dim 64, key 32", "enable_gqa",
        "dropout_p=2.0", "causal_alignment", "window_size", "is_causal=True",
    ):  # fmt: skip
        assert sum(text in one for one in found) == 1, text
    assert len(found) == 10


def test_key_padding_and_causal_compose():
    assert mistakes(changed(causal=True, mask="key_padding")) == []


def test_meta_serves_every_backend_under_its_first_entry():
    limits = (dataclasses.replace(ALL, devices=("cuda",), masks=("none",)),)
    assert reasons(limits, changed(devices=("meta",) * 3)) == []
    assert reasons(limits, changed(devices=("meta",) * 3, mask="bool")) == ["takes no masks, so not a bool mask"]
