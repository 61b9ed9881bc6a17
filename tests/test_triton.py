"""The Triton kernels in Triton's interpreter: the source that runs on a GPU, line by line on a CPU.

The interpreter replaces ``triton.jit`` when triton is imported, so these tests run in a process of their own
(``tests/interpreted.py``), once for all of them; each test reads its part of what that process found. float32 and
float16: the interpreter's bfloat16 products are garbage (raw 16-bit patterns are multiplied).
"""

from __future__ import annotations

import pathlib
import subprocess
import sys

import interpreted
import pytest
import torch
from triton_here import needs_interpreter, needs_triton, run_interpreted

import compiled_attn
from compiled_attn.ops import _triton_configs as configs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What was wrong with each case; "" for a case that is right."""
    return run_interpreted("interpreted.py")


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("name", list(interpreted.CASES))
def test_interpreted(found, name):
    assert found[name] == ""


@needs_triton
@needs_interpreter
def test_every_case_ran(found):
    assert set(found) == set(interpreted.CASES)
    assert len(found) > 80


def test_importing_the_package_does_not_import_triton():
    code = (
        "import sys, torch, compiled_attn\n"
        "x = torch.randn(1, 4, 2, 16)\n"
        "compiled_attn.attention(x, x, x, backend='triton')\n"
        "print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["triton", "triton_varlen"])
def test_both_names_serve_both_calls_on_a_cpu(name):
    query, key, value = (torch.randn(2, length, 4, 16) for length in (5, 9, 9))
    keep = torch.rand(2, 9) > 0.4
    torch.testing.assert_close(
        compiled_attn.attention(query, key, value, key_padding_mask=keep, backend=name),
        compiled_attn.attention(query, key, value, key_padding_mask=keep, backend="_native_math"),
    )
    starts = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    packed = torch.randn(10, 4, 16)
    torch.testing.assert_close(
        compiled_attn.varlen_attention(packed, packed, packed, starts, starts, backend=name),
        compiled_attn.varlen_attention(packed, packed, packed, starts, starts, backend="_native_math"),
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "has no dropout"),
        ({"value_width": 32}, "needs one head_dim"),
        ({"width": 264}, "head_dim=264 is over 256"),
        ({"mask_gradient": True}, "gives no gradient for attn_mask"),
    ],
)
def test_what_it_refuses(change, reason):
    width = change.pop("width", 16)
    value_width = change.pop("value_width", width)
    query, key, value = (torch.randn(1, 5, 2, size) for size in (width, width, value_width))
    mask = torch.randn(1, 2, 5, 5, requires_grad=True) if change.pop("mask_gradient", False) else None
    with pytest.raises(NotImplementedError, match=reason):
        compiled_attn.attention(query, key, value, mask, backend="triton", **change)


def test_head_dims_are_split_without_padding_to_the_next_power():
    """Columns computed for every head_dim in steps of 8, and the waste of the worst."""
    waste = {}
    for width in range(16, 257, 8):
        first, second = configs.parts(width)
        assert first >= width or first + second >= width
        waste[width] = (first + second) / width
    assert waste[64] == waste[80] == waste[96] == waste[160] == waste[192] == 1.0
    assert waste[72] == 80 / 72
    assert max(waste[width] for width in (64, 72, 80, 96, 112, 128, 256)) < 1.15


@pytest.mark.parametrize("target", [*configs.TABLE, "float32"])
def test_every_head_dim_has_a_configuration(target):
    dtype = torch.float32 if target == "float32" else torch.bfloat16
    table = "sm_90" if target == "float32" else target
    for kind in configs.KINDS:
        for masked in (False, True):
            for width in range(1, 257):
                config = configs.choose(kind, table, width, dtype, masked)
                assert config.block_q >= 16
                assert config.block_k >= 16
    with pytest.raises(ValueError, match="head_dim=257 is over 256"):
        configs.choose("dq", table, 257, dtype)
