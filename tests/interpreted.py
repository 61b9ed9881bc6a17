"""Runs the Triton kernels in Triton's interpreter and prints, as JSON, what was wrong with each case.

A program of its own, started with TRITON_INTERPRET=1 by ``test_triton.py``, which takes the names of the cases from it.
Small tiles instead of the shipped ones: an interpreted program costs milliseconds, whatever its size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from typing import Any

import torch
from matrix import POSITIONS, Case, assert_as_good, expectations, far_apart, largest
from torch import Tensor

from compiled_attn import masks, reference
from compiled_attn.ops._triton_configs import Config
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL

MASKS = ("none", "key_padding", "hole", "bool", "bool_per_head", "float", "float_row")
LENGTHS = {
    "one": ([0, 17], [0, 33], 0),
    "uneven": ([0, 3, 40, 41], [0, 9, 10, 63], 0),
    "empty_inside": ([0, 0, 5, 5, 37], [0, 4, 4, 9, 20], 0),
    "rows_behind": ([0, 6, 11], [0, 6, 11], 3),
    "no_keys": ([0, 5, 9], [0, 0, 7], 0),
    "all_zero": ([0, 0, 0], [0, 0, 0], 4),
}
SIZES = ((1, 1, 2), (1, 33, 1), (17, 1, 2), (33, 17, 1), (0, 5, 2), (5, 0, 1))
WIDTHS = (12, 24, 40, 72, 80, 96, 112)


def _cases() -> dict[str, tuple[str, dict[str, Any]]]:
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for mask in MASKS:
        for positions in POSITIONS:
            if mask in ("none", "key_padding", "hole") or not positions.startswith("causal"):
                options = {"mask": mask, "positions": positions, "key_heads": 1}
                found[f"{mask}-{positions}"] = ("dense", options)
    for q_length, k_length, key_heads in SIZES:
        sizes = {"q_length": q_length, "k_length": k_length, "key_heads": key_heads}
        for mask in ("none", "key_padding", "bool"):
            found[f"{q_length}x{k_length}-{mask}"] = ("dense", {**sizes, "mask": mask, "positions": "window_lower"})
    for width in WIDTHS:
        found[f"width{width}"] = ("dense", {"width": width, "scale": -0.3 if width == 72 else None})
        found[f"width{width}-half"] = ("dense", {"width": width, "dtype": torch.float16, "mask": "float"})
    for layout in ("transposed", "qkv_slice", "expanded_batch", "expanded_heads", "strided_width"):
        found[layout] = ("dense", {"layout": layout, "k_length": 17, "mask": "key_padding"})
    for lengths in LENGTHS:
        for positions in POSITIONS:
            found[f"packed-{lengths}-{positions}"] = ("packed", {"lengths": lengths, "positions": positions})
    found["packed-half"] = ("packed", {"lengths": "uneven", "positions": "full", "dtype": torch.float16})
    found["nan_neighbour"] = ("nan_neighbour", {})
    found["nan_under_the_mask"] = ("nan_under_the_mask", {})
    found["same_bits"] = ("same_bits", {})
    for mask in ("none", "key_padding"):
        found[f"far_batches-{mask}"] = ("far_batches", {"mask": mask})
    return found


CASES = _cases()


class Kernels:
    """The launchers, with small tiles and with outputs that begin as NaN."""

    def __init__(self) -> None:
        from compiled_attn.ops import _triton_launch

        self.launch = _triton_launch
        _triton_launch.choose = lambda *_: Config(32, 32, 1, 4)  # type: ignore[attr-defined]
        empty = torch.empty
        new_empty = Tensor.new_empty

        def poisoned(tensor: Tensor) -> Tensor:
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(2**30)

        torch.empty = lambda *args, **kw: poisoned(empty(*args, **kw))  # type: ignore[assignment]
        Tensor.new_empty = lambda self, *args, **kw: poisoned(new_empty(self, *args, **kw))  # type: ignore[assignment]

    def both(self, arguments: dict[str, Any], mask: Any, key_padding: Any, starts: Any = None) -> tuple[Tensor, ...]:
        """(out, lse, dq, dk, dv); the cotangent is that of matrix.measured."""
        query, key, value = (arguments[name].detach() for name in ("query", "key", "value"))
        causal = CAUSAL if arguments.get("is_causal") else 0
        causal |= ALIGN_LOWER_RIGHT if arguments.get("causal_alignment") == "lower_right" else 0
        rest = (causal, arguments.get("scale"), arguments.get("window_size"))
        out, lse = self.launch.forward(query, key, value, mask, key_padding, starts, *rest, True)
        torch.manual_seed(1)
        grad = torch.randn(out.shape).to(out.dtype)
        gradients = self.launch.backward(grad, query, key, value, mask, key_padding, starts, out, lse, *rest)
        assert lse is not None
        return out, lse, *gradients


def _compare(actual: tuple[Tensor, ...], right: tuple[Tensor, ...], yardstick: tuple[Tensor, ...]) -> None:
    size = largest(*right[2:])
    for what, one, expected, plainly in zip(("out", "lse", "dq", "dk", "dv"), actual, right, yardstick, strict=True):
        assert_as_good(what, one, expected, plainly, size if what.startswith("d") else 0.0)
        assert one.is_contiguous(), what


def dense(kernels: Kernels, mask: str = "none", **options: Any) -> None:
    case = Case(**{"heads": 2, "key_heads": 2, "mask": "none" if mask == "hole" else mask, **options})
    if mask == "hole":  # one in the middle and one at the end: runs that lie in place, before and behind
        case = dataclasses.replace(case, k_length=150)
    arguments = case.arguments()
    if mask == "hole":
        keep = torch.ones(case.batch, case.k_length, dtype=torch.bool)
        keep[:, 40:47] = False
        keep[0, -4:] = False
        arguments["key_padding_mask"] = keep
    given, key_padding = masks.canonical(
        arguments.get("attn_mask"), arguments.get("key_padding_mask"), arguments["query"], arguments["key"]
    )
    right, yardstick = expectations(arguments)
    _compare(kernels.both(arguments, given, key_padding), right, yardstick)


def _packed(lengths: str, dtype: torch.dtype) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    starts_q, starts_k, rest = LENGTHS[lengths]
    shapes = ((starts_q[-1] + rest, 2, 16), (starts_k[-1] + rest, 1, 16), (starts_k[-1] + rest, 1, 16))
    tensors = {
        name: torch.randn(shape).to(dtype) for name, shape in zip(("query", "key", "value"), shapes, strict=True)
    }
    starts = (torch.tensor(starts_q, dtype=torch.int32), torch.tensor(starts_k, dtype=torch.int32))
    return tensors, starts


def packed(kernels: Kernels, lengths: str, positions: str, dtype: torch.dtype = torch.float32) -> None:
    tensors, starts = _packed(lengths, dtype)
    options = POSITIONS[positions]
    actual = kernels.both({**tensors, **options}, None, None, starts)
    double = [tensor.double().requires_grad_() for tensor in tensors.values()]
    out, lse = reference.varlen_attention(*double, *starts, **options)
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to(dtype).double()
    right = (out.detach(), lse, *torch.autograd.grad(out, double, grad))
    single = [tensor.to(dtype) for tensor in right]  # rounding alone, and float32's where the dtype is that
    _compare(actual, right, tuple(single))


def nan_neighbour(kernels: Kernels) -> None:
    """NaN and inf in one sequence, and behind the last, reach no other: not forward, not backward."""
    tensors, starts = _packed("uneven", torch.float32)
    clean = kernels.both(tensors, None, None, starts)
    dirty = {name: tensor.clone() for name, tensor in tensors.items()}
    dirty["query"][3:40], dirty["key"][9:10], dirty["value"][9:10] = math.nan, math.inf, math.nan
    got = kernels.both(dirty, None, None, starts)
    torch.testing.assert_close(got[0][:3], clean[0][:3], rtol=0, atol=0)
    torch.testing.assert_close(got[0][40:], clean[0][40:], rtol=0, atol=0)
    for one, other, lost in zip(got[2:], clean[2:], ((3, 40), (9, 10), (9, 10)), strict=True):
        torch.testing.assert_close(one[: lost[0]], other[: lost[0]], rtol=0, atol=0)
        torch.testing.assert_close(one[lost[1] :], other[lost[1] :], rtol=0, atol=0)


def nan_under_the_mask(kernels: Kernels) -> None:
    """Keys that a key-padding mask leaves out are never read."""
    arguments = Case(mask="key_padding", k_length=70).arguments()
    keep = arguments["key_padding_mask"]
    clean = kernels.both(arguments, None, keep)
    for name in ("key", "value"):
        arguments[name] = torch.where(keep[:, :, None, None], arguments[name].detach(), math.nan)
    for one, other in zip(kernels.both(arguments, None, keep), clean, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def same_bits(kernels: Kernels) -> None:
    arguments = Case(mask="key_padding", key_heads=1, q_length=70).arguments()
    keep = arguments["key_padding_mask"]
    for one, other in zip(kernels.both(arguments, None, keep), kernels.both(arguments, None, keep), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def far_batches(kernels: Kernels, mask: str) -> None:
    """Batch strides past 2^31 elements change nothing."""
    arguments = Case(mask=mask, dtype=torch.float16, key_heads=2).arguments()
    near = kernels.both(arguments, None, arguments.get("key_padding_mask"))
    names = ("query", "key", "value")
    arguments.update(zip(names, far_apart(*(arguments[name].detach() for name in names)), strict=True))
    got = kernels.both(arguments, None, arguments.get("key_padding_mask"))
    for one, other in zip(got, near, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def main() -> None:
    torch.set_num_threads(1)
    kernels = Kernels()
    found = {}
    for name, (kind, options) in CASES.items():
        torch.manual_seed(0)
        found[name] = ""
        try:
            {
                "dense": dense, "packed": packed, "nan_neighbour": nan_neighbour,
                "nan_under_the_mask": nan_under_the_mask, "same_bits": same_bits, "far_batches": far_batches,
            }[kind](kernels, **options)  # fmt: skip
        except AssertionError as error:
            found[name] = str(error) or "assertion failed"
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
