"""Checks of values: each one, by set_checks and by environment, eager and inside compiled code."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch

import compiled_attn
from compiled_attn import checks, registry

X = torch.randn(2, 6, 2, 8)


@pytest.fixture(autouse=True)
def _checked():
    compiled_attn.set_checks(True)


def spoiled(value: float) -> torch.Tensor:
    return X.clone().index_put_(
        (torch.tensor(0), torch.tensor(1), torch.tensor(0), torch.tensor(3)), torch.tensor(value)
    )


DENSE = {
    "query": (lambda: (spoiled(math.nan), X, X, None), "query holds 1 NaN or Inf among 192 values"),
    "key": (lambda: (X, spoiled(math.inf), X, None), "key holds 1 NaN or Inf among 192 values"),
    "value": (lambda: (X, X, spoiled(-math.inf), None), "value holds 1 NaN or Inf among 192 values"),
    "zeros_and_ones": (
        lambda: (X, X, X, (torch.rand(2, 1, 6, 6) > 0.5).float()),
        "float mask that holds only 0 and 1, which are *added* to the scores",
    ),
    "all_ones": (lambda: (X, X, X, torch.ones(2, 1, 6, 6)), "mask.bool()"),
    "nan_mask": (lambda: (X, X, X, torch.full((1, 1, 6, 6), math.nan)), "attn_mask holds NaN or +Inf"),
    "inf_mask": (lambda: (X, X, X, torch.full((1, 1, 6, 6), math.inf)), "attn_mask holds NaN or +Inf"),
}
GOOD = {
    "none": None,
    "bool": torch.rand(2, 1, 6, 6) > 0.5,
    "zeros": torch.zeros(2, 1, 6, 6),
    "minus_infinity": torch.zeros(2, 1, 6, 6).masked_fill(torch.rand(2, 1, 6, 6) > 0.5, -math.inf),
    "numbers": torch.randn(1, 2, 6, 6),
}


@pytest.mark.parametrize("backend", ["native", "_native_math", "switch"])
@pytest.mark.parametrize("case", DENSE)
def test_each_dense_check(case, backend):
    make, text = DENSE[case]
    with pytest.raises(ValueError, match="bad values") as refused:
        compiled_attn.attention(*make(), backend=backend)
    assert text in str(refused.value)
    compiled_attn.set_checks(False)
    compiled_attn.attention(*make(), backend=backend)  # not checked unless asked for


@pytest.mark.parametrize("mask", GOOD)
def test_good_values_pass(mask):
    checked = compiled_attn.attention(X, X, X, GOOD[mask])
    compiled_attn.set_checks(False)
    torch.testing.assert_close(checked, compiled_attn.attention(X, X, X, GOOD[mask]), rtol=0, atol=0)


def test_all_reasons_at_once():
    with pytest.raises(ValueError, match="bad values") as refused:
        compiled_attn.attention(spoiled(math.nan), spoiled(math.inf), X, torch.ones(2, 1, 6, 6))
    assert len(str(refused.value).splitlines()) == 4


PACKED = torch.randn(9, 2, 8)


def lengths(*starts: int) -> torch.Tensor:
    return torch.tensor(starts, dtype=torch.int32)


VARLEN = {
    "start": ((lengths(1, 9), lengths(0, 9), 9, 9), "cu_seqlens_q starts with 1, not 0"),
    "decreases": ((lengths(0, 4, 9), lengths(0, 5, 3), 9, 9), "cu_seqlens_k decreases"),
    "over": ((lengths(0, 10), lengths(0, 9), 20, 9), "cu_seqlens_q ends with 10, over the packed length 9"),
    "maximum": ((lengths(0, 2, 9), lengths(0, 5, 9), 6, 5), "cu_seqlens_q has a sequence of 7, over max_seqlen 6"),
    "maximum_k": ((lengths(0, 2, 9), lengths(0, 5, 9), 7, 4), "cu_seqlens_k has a sequence of 5, over max_seqlen 4"),
}


@pytest.mark.parametrize("case", VARLEN)
def test_each_varlen_check(case):
    arguments, text = VARLEN[case]
    with pytest.raises(ValueError, match="bad values") as refused:
        compiled_attn.varlen_attention(PACKED, PACKED, PACKED, *arguments)
    assert text in str(refused.value)


def test_varlen_values_and_good_lengths():
    good = lengths(0, 0, 4, 9)
    compiled_attn.varlen_attention(PACKED, PACKED, PACKED, good, good, 5, 5)
    with pytest.raises(ValueError, match="value holds 144 NaN"):
        compiled_attn.varlen_attention(PACKED, PACKED, PACKED * math.nan, good, good)


@pytest.mark.parametrize("how", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_compiled_code_keeps_the_checks(how, training):
    """An operator without outputs would vanish from AOT graphs; the message comes through whole."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, mask: compiled_attn.attention(x, x, x, mask).sin(), fullgraph=True, backend=how)
    x = X.clone().requires_grad_(training)
    for mask in (GOOD["numbers"], GOOD["zeros"]):
        out = compiled(x, mask.expand(2, 2, 6, 6).contiguous())
        if training:
            out.sum().backward()
    with pytest.raises(ValueError, match="bad values") as refused:
        compiled(x, torch.ones(2, 2, 6, 6))
    assert "holds only 0 and 1" in str(refused.value)
    with pytest.raises(ValueError, match="query holds 192 NaN"):
        compiled((X * math.nan).requires_grad_(training), GOOD["numbers"].expand(2, 2, 6, 6).contiguous())


def test_switching_checks_on_compiles_once_more_and_off_again_is_free():
    torch._dynamo.reset()
    compiled_attn.set_checks(False)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda x: compiled_attn.attention(x, x, x), fullgraph=True, backend=counter)
    for enabled, frames in ((False, 1), (True, 2), (False, 2), (True, 2)):
        compiled_attn.set_checks(enabled)
        compiled(X)
        assert counter.frame_count == frames
    with pytest.raises(ValueError, match="NaN"):
        compiled(X * math.nan)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("COMPILED_ATTN_CHECKS", "1", True), ("COMPILED_ATTN_CHECKS", "0", False), ("COMPILED_ATTN_CHECKS", "", False),
        ("DIFFUSERS_ATTN_CHECKS", "yes", True), ("DIFFUSERS_ATTN_CHECKS", "TRUE", True),
        ("DIFFUSERS_ATTN_CHECKS", "no", False),
    ],
)  # fmt: skip
def test_environment_variables(variable, value, expected, monkeypatch):
    for name in ("COMPILED_ATTN_CHECKS", "DIFFUSERS_ATTN_CHECKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert checks._from_environment() is expected


def test_the_environment_is_read_at_import():
    code = "import compiled_attn; print(compiled_attn.registry.checks_enabled)"
    environment = {**os.environ, "DIFFUSERS_ATTN_CHECKS": "yes"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_set_checks_is_what_registry_says():
    assert registry.checks_enabled is True
    compiled_attn.set_checks(False)
    assert registry.checks_enabled is False
