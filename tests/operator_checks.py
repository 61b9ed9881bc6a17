"""Operators called by themselves on a CPU, masks and both alignments included, against the float64 reference.

For backends whose Limits name no CPU: behind each is an exact stand-in, so that float64 inputs leave no tolerance to
hide in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from flash_checks import SHAPES
from torch import Tensor

from compiled_attn import reference, registry
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL

# name -> causal, window
POSITIONS: dict[str, tuple[int, tuple[int, int] | None]] = {
    "full": (0, None),
    "causal": (CAUSAL, None),
    "causal_lower": (CAUSAL | ALIGN_LOWER_RIGHT, None),
    "window": (0, (3, 2)),
    "window_lower": (ALIGN_LOWER_RIGHT, (3, 2)),
    "open_right_lower": (ALIGN_LOWER_RIGHT, (1, -1)),
    "causal_window_lower": (CAUSAL | ALIGN_LOWER_RIGHT, (4, -1)),
}
MASKS = ("none", "key_padding", "bool", "bool_per_head", "bool_shared", "float", "float_row", "float_per_head")


def made_mask(kind: str, shape: str) -> dict[str, Tensor]:
    """A mask with holes, and with rows that attend to nothing, for a call of ``shape``."""
    batch, q_length, k_length, heads, *_ = SHAPES[shape]
    if kind == "none":
        return {}
    if kind == "key_padding":
        keep = torch.rand(batch, k_length) > 0.4
        keep[-1:] = False
        keep[:1, :2] = torch.tensor([False, True])[:k_length]
        return {"key_padding": keep}
    wide = {"bool": (batch, 1, q_length), "bool_shared": (1, 1, q_length), "float": (batch, 1, q_length)}
    wide |= {
        "bool_per_head": (batch, heads, q_length),
        "float_row": (1, heads, 1),
        "float_per_head": (1, heads, q_length),
    }
    keep = torch.rand(*wide[kind], k_length) > 0.3
    keep[:, -1:, -1:] = False
    if kind.startswith("bool"):
        return {"mask": keep}
    return {"mask": torch.randn(*keep.shape, dtype=torch.float64).masked_fill(~keep, float("-inf"))}


def compare(
    inputs: list[Tensor], actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], trained: list[Tensor]
) -> None:
    out, lse = actual
    assert out.is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1], check_dtype=False)
    empty = (expected[1] == -math.inf).transpose(-1, -2)
    assert (out[empty] == 0).all()
    # a layout that no kernel reads as it is
    grad = torch.randn(*out.shape[:-1], 2 * out.shape[-1], dtype=out.dtype)[..., ::2]
    found = torch.autograd.grad(out, trained, grad)
    wanted = torch.autograd.grad(expected[0], trained, grad)
    for name, one, right in zip(("dq", "dk", "dv", "dmask"), found, wanted, strict=False):
        assert one.is_contiguous()
        torch.testing.assert_close(one, right, msg=lambda text, name=name: f"{name}: {text}")
    assert (found[0][empty] == 0).all()


def dense(
    backend: str, inputs: list[Tensor], mask: Any = None, key_padding: Any = None, causal: int = 0,
    window: Any = None, scale: Any = None,
) -> None:  # fmt: skip
    """out, lse and gradients of the dense operator of ``backend`` are the reference's."""
    operator = registry.find(backend).op
    assert operator is not None
    gqa = inputs[0].shape[2] != inputs[1].shape[2]
    options = (0.0, causal, scale, gqa, None if window is None else list(window), False)
    out, lse, state = operator(*inputs, mask, key_padding, *options, True)
    assert state.numel() == 0
    expected = reference.attention(
        *inputs, mask, key_padding_mask=key_padding, is_causal=bool(causal & CAUSAL), window_size=window, scale=scale,
        causal_alignment="lower_right" if causal & ALIGN_LOWER_RIGHT else "upper_left",
    )  # fmt: skip
    trained = inputs if mask is None or not mask.requires_grad else [*inputs, mask]
    compare(inputs, (out, lse), expected, trained)
    with torch.no_grad():
        alone, no_lse, _ = operator(*inputs, mask, key_padding, *options, False)
    assert no_lse.shape == (0,)
    torch.testing.assert_close(alone, out.detach(), rtol=0, atol=0)


def varlen(
    backend: str, inputs: list[Tensor], causal: int, window: Any, longest: tuple[int, int] | None = None
) -> None:
    """The same for the packed operator, with bounds of the lengths as tight as they can be, or ``longest``."""
    operator = registry.find(backend).varlen_op
    assert operator is not None
    *qkv, starts_q, starts_k = inputs
    longest = longest or (int(starts_q.diff().max()), int(starts_k.diff().max()))
    gqa = qkv[0].shape[1] != qkv[1].shape[1]
    options = (0.0, causal, None, gqa, None if window is None else list(window), False)
    out, lse, _ = operator(*inputs, *longest, *options, True)
    expected = reference.varlen_attention(
        *inputs, is_causal=bool(causal & CAUSAL), window_size=window,
        causal_alignment="lower_right" if causal & ALIGN_LOWER_RIGHT else "upper_left",
    )  # fmt: skip
    compare(qkv, (out, lse), expected, qkv)
