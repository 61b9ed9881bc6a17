"""The kernels of ops/_sage_rounding.py in Triton's interpreter, against plain PyTorch; prints JSON.

A program of its own, started with TRITON_INTERPRET=1 by ``test_sage.py``, which takes the names of the cases from it.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import torch
from matrix import far_apart
from stand_ins.sage import Rounding

from compiled_attn import masks
from compiled_attn.ops import _sage_kernels

# B, Sq, Sk, H, Hk, D
SHAPES = (
    (1, 1, 1, 1, 1, 64), (2, 17, 33, 2, 2, 64), (1, 129, 64, 4, 2, 40), (2, 128, 330, 2, 1, 128), (3, 5, 65, 2, 2, 13),
)  # fmt: skip
LAYOUTS = ("contiguous", "transposed", "qkv_slice", "strided_width", "far_batches", "zeros")
CASES = tuple("-".join(map(str, case)) for case in itertools.product(SHAPES, LAYOUTS))


def tensors(shape: tuple[int, ...], layout: str) -> list[torch.Tensor]:
    batch, q_length, k_length, heads, key_heads, width = shape
    made = []
    for length, count in ((q_length, heads), (k_length, key_heads), (k_length, key_heads)):
        one = torch.randn(batch, length, count, width).half() + 2.0
        if layout == "transposed":
            one = one.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "qkv_slice":
            one = torch.stack((one, -one, one), 2)[:, :, 1]
        elif layout == "strided_width":
            one = torch.stack((one, -one), -1)[..., 0]
        elif layout == "far_batches" and batch > 1 and width <= 64:
            (one,) = far_apart(one)
        elif layout == "zeros":
            one = torch.zeros_like(one)
        made.append(one)
    return made


def wrong(got: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...], rows: tuple[Any, Any]) -> str:
    """What tells two results apart, in ``rows`` of Q and of K; a number at the edge of two may go either way."""
    names = ("int8 of Q", "int8 of K", "V", "scales of Q", "scales of K")
    parts = (rows[0], rows[1], rows[1], ..., ...)
    for name, one, other, part in zip(names, got, right, parts, strict=True):
        if (one.dtype, one.shape, one.is_contiguous()) != (other.dtype, other.shape, True):
            return f"{name}: {one.dtype} {tuple(one.shape)}, not {tuple(other.shape)}"
        one, other = one[part], other[part]
        off = (one.double() - other.double()).abs()
        if one.dtype == torch.int8:
            if (off > 1).any() or (off > 0).double().mean() > 0.01:
                return f"{name}: {int((off > 0).sum())} of {off.numel()} differ, by up to {off.max()}"
        elif (off > 1e-6 + 1e-5 * other.double().abs()).any() or not bool(one.isfinite().all()):
            return f"{name}: off by {off.max()}"
    return ""


def check(rounding: Any, shape: tuple[int, ...], layout: str, device: str, dtype: torch.dtype) -> str:
    """What is wrong with ``rounding``: dense, packed by a mask with holes, and packed as it is."""
    torch.manual_seed(0)
    q, k, v = (tensor.to(dtype) if tensor.dtype != dtype else tensor for tensor in tensors(shape, layout))
    batch, q_length, k_length = shape[:3]
    width = 64 if shape[-1] <= 64 else 128

    def both(name: str, *given: Any) -> tuple[Any, Any]:
        moved = [
            tuple(one.to(device) if isinstance(one, torch.Tensor) else one for one in each)
            if isinstance(each, tuple) else each.to(device) if isinstance(each, torch.Tensor) else each
            for each in given
        ]  # fmt: skip
        found = getattr(rounding, name)(*moved)
        return found, getattr(Rounding(), name)(*given)

    found, right = both("dense", q, k, v, k.mean(1, keepdim=True), 0.3, width)
    if found[4].as_strided((found[4].numel() + 1,), (1,))[-1] != 0:
        return "no 0 behind the scales of K"
    fault = wrong(tuple(one.cpu() for one in found), right, (..., ...))
    if fault:
        return f"dense: {fault}"

    keep = torch.rand(batch, k_length) > 0.4
    keep[-1:] &= batch == 1  # of several, one has no key
    clean, dirty = k, k.masked_fill(~keep[:, :, None, None], math.nan)
    mean, expected = both("mean_of_real", dirty, keep)
    if not torch.allclose(mean.cpu(), expected, rtol=1e-4, atol=1e-4):
        return f"mean: off by {(mean.cpu() - expected).abs().max()}"
    source, _, starts_k = masks.packing(keep)
    starts_q = masks.dense_cu_seqlens(batch, q_length, q.device)
    starts = starts_q, starts_k
    blocks = _sage_kernels._blocks(starts_q, 128), _sage_kernels._blocks(starts_k, 64)
    longest = q_length, k_length
    real = int(starts_k[-1])
    for name, keys, values, of in (
        ("gathered", dirty if layout != "far_batches" else clean, v, source),
        ("packed", clean.flatten(0, 1), v.flatten(0, 1), None),
    ):
        given = (q.flatten(0, 1), keys, values, expected, of, starts, blocks, longest, 0.3, width)
        found, right = both("packed", *given)
        fault = wrong(tuple(one.cpu() for one in found), right, (..., slice(0, real)))
        if fault:
            return f"{name}: {fault}"
    return ""


def main() -> None:
    from compiled_attn.ops import _sage_rounding

    empty = torch.empty

    def poisoned(*sizes: int, dtype: torch.dtype, **options: object) -> torch.Tensor:
        return empty(*sizes, dtype=dtype, **options).fill_(math.nan if dtype.is_floating_point else -7)  # type: ignore[call-overload,no-any-return]

    found = {}
    for name, (shape, layout) in zip(CASES, itertools.product(SHAPES, LAYOUTS), strict=True):
        torch.empty = poisoned  # type: ignore[assignment]
        found[name] = check(_sage_rounding, shape, layout, "cpu", torch.float16)
        torch.empty = empty
    print(json.dumps(found))


if __name__ == "__main__":
    main()
