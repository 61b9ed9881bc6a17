"""The kernels of ops/_packing_kernels.py in Triton's interpreter, against masks.packing; prints JSON.

A program of its own, started with TRITON_INTERPRET=1 by ``test_packing.py``, which takes the names of the cases from
it.
"""

from __future__ import annotations

import itertools
import json

import torch
from matrix import far_apart

from compiled_attn import masks

SHAPES = ((1, 1), (1, 33), (3, 17), (2, 150), (3, 0), (0, 5))
MASKS = ("holes", "all", "none", "one_sequence", "expanded")
LAYOUTS = ("contiguous", "transposed", "qkv_slice", "odd_width", "strided_width", "wider_values", "far_batches")
CASES = tuple("-".join(map(str, case)) for case in itertools.product(SHAPES, MASKS, LAYOUTS))


def _mask(batch: int, length: int, name: str) -> torch.Tensor:
    if name in ("all", "none"):
        return torch.full((batch, length), name == "all")
    keep = torch.rand(1 if name == "expanded" else batch, length) > 0.4
    if name == "one_sequence":
        keep[1:] = False
    return keep.expand(batch, length)


def _keys(batch: int, length: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "transposed":
        return tuple(torch.randn(2, batch, 2, length, 16).transpose(2, 3))  # type: ignore[return-value]
    if layout == "qkv_slice":
        return torch.randn(batch, length, 3, 2, 16).unbind(2)[1:]  # type: ignore[return-value]
    if layout == "strided_width":
        return tuple(torch.randn(2, batch, length, 2, 32)[..., ::2])  # type: ignore[return-value]
    if layout == "far_batches":
        return tuple(far_apart(*torch.randn(2, batch, length, 2, 16).half()))  # type: ignore[return-value]
    if layout == "wider_values":
        return torch.randn(batch, length, 2, 16), torch.randn(batch, length, 2, 40)
    return tuple(torch.randn(2, batch, length, 2, 13 if layout == "odd_width" else 16))  # type: ignore[return-value]


def wrong(shape: tuple[int, int], mask: str, layout: str) -> str:
    from compiled_attn.ops import _packing

    torch.manual_seed(0)
    keep = _mask(*shape, mask)
    packing = _packing.Packing(keep)
    source, target, cu_seqlens = masks.packing(keep)
    for what, got, right in (
        ("source", packing.source, source), ("target", packing._target, target),
        ("cu_seqlens", packing.cu_seqlens, cu_seqlens),
    ):  # fmt: skip
        if not torch.equal(got, right):
            return f"{what} {got.tolist()} is not {right.tolist()}"
    keys = _keys(*shape, layout)
    for got, rows in zip(packing.pack(*keys), keys, strict=True):
        if not got.is_contiguous() or not torch.equal(got, rows.flatten(0, 1).index_select(0, source)):
            return "other rows"
    return ""


def main() -> None:
    import types

    from compiled_attn.ops import _packing, _packing_kernels, _quick_launch

    empty = torch.empty
    torch.empty = lambda *args, **kw: empty(*args, **kw).fill_(-7)  # type: ignore[assignment]
    _packing._PLACE_BLOCK, _packing._ROW_BLOCK = 64, 32  # several steps
    modules: tuple[types.ModuleType, types.ModuleType] = (_quick_launch, _packing_kernels)
    _packing._kernels = lambda device: modules  # type: ignore[assignment]
    cases = itertools.product(SHAPES, MASKS, LAYOUTS)
    print(json.dumps({name: wrong(*case) for name, case in zip(CASES, cases, strict=True)}))


if __name__ == "__main__":
    main()
