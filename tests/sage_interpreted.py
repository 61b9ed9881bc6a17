"""The kernel of ops/_sage_rounding.py in Triton's interpreter, against plain PyTorch; prints JSON.

A program of its own, started with TRITON_INTERPRET=1 by ``test_sage.py``, which takes the names of the cases from it.
"""

from __future__ import annotations

import itertools
import json
import math

import torch
from matrix import far_apart
from stand_ins import sage

# B, Sq, Sk, H, Hk, D
SHAPES = (
    (1, 1, 1, 1, 1, 64), (2, 17, 33, 2, 2, 64), (1, 129, 64, 4, 2, 40), (2, 128, 130, 2, 1, 128), (1, 5, 65, 2, 2, 13),
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


def wrong(got: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> str:
    """What tells the results of two round_blocks apart; a number at the edge of two may go either way."""
    names = ("int8 of Q", "int8 of K", "V", "scales of Q", "scales of K")
    for name, one, other in zip(names, got, right, strict=True):
        if (one.dtype, one.shape, one.is_contiguous()) != (other.dtype, other.shape, True):
            return f"{name}: {one.dtype} {tuple(one.shape)}"
        off = (one.double() - other.double()).abs()
        if one.dtype == torch.int8:
            if (off > 1).any() or (off > 0).double().mean() > 0.01:
                return f"{name}: {int((off > 0).sum())} of {off.numel()} differ, by up to {off.max()}"
        elif (off > 1e-6 + 1e-5 * other.double().abs()).any() or not bool(one.isfinite().all()):
            return f"{name}: off by {off.max()}"
    behind = got[-1].as_strided((got[-1].numel() + 1,), (1,))[-1]
    return "" if behind == 0 else "no 0 behind the scales of K"


def check(shape: tuple[int, ...], layout: str) -> str:
    from compiled_attn.ops import _sage_rounding

    torch.manual_seed(0)
    q, k, v = tensors(shape, layout)
    width = 64 if shape[-1] <= 64 else 128
    arguments = (q, k, v, k.mean(1, keepdim=True), 0.3, width)
    return wrong(_sage_rounding.round_blocks(*arguments), sage.round_blocks(*arguments)[0])


def main() -> None:
    empty = torch.empty

    def poisoned(*sizes: int, dtype: torch.dtype, **options: object) -> torch.Tensor:
        return empty(*sizes, dtype=dtype, **options).fill_(math.nan if dtype.is_floating_point else -7)  # type: ignore[call-overload,no-any-return]

    torch.empty = poisoned  # type: ignore[assignment]
    cases = itertools.product(SHAPES, LAYOUTS)
    print(json.dumps({name: check(*case) for name, case in zip(CASES, cases, strict=True)}))


if __name__ == "__main__":
    main()
