"""Masks of dynamic length for the CUDA kernels that want aligned rows: one program for all lengths, traced on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compiled_attn.ops._native_dense import aligned_bias

LENGTH, ROWS = torch.export.Dim("length", min=2, max=4096), torch.export.Dim("rows", min=2, max=4096)
# name -> example for (rows, keys), and its dynamic dimensions
MASKS = {
    "key_padding": (lambda rows, keys: torch.rand(2, keys) > 0.3, {1: LENGTH}),
    "bool": (lambda rows, keys: torch.rand(2, 4, rows, keys) > 0.3, {2: ROWS, 3: LENGTH}),
    "float": (lambda rows, keys: torch.randn(1, 1, rows, keys), {2: ROWS, 3: LENGTH}),
    "row": (lambda rows, keys: torch.randn(2, 1, 1, keys), {3: LENGTH}),
    "broadcast": (lambda rows, keys: torch.randn(2, 1, 1, keys).expand(2, 4, rows, keys), {2: ROWS, 3: LENGTH}),
}


class Operator(nn.Module):
    """The operator itself: ``attention`` would refuse a CPU. Exporting it runs its fake and no kernel."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.operator, self.padding = getattr(torch.ops.compiled_attn, name).v1, kind == "key_padding"

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        masks = (None, mask) if self.padding else (mask, None)
        return self.operator(query, key, key, *masks)[0]


@pytest.mark.parametrize("keys", [40, 41])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["_native_efficient", "_native_cudnn"])
def test_exported_for_every_length(name, kind, keys):
    made, dynamic = MASKS[kind]
    query, key = (torch.randn(2, length, 4, 64).bfloat16() for length in (43, keys))
    mask = made(43, keys)
    program = torch.export.export(
        Operator(name, kind),
        (query, key, mask if mask.dtype == torch.bool else mask.bfloat16()),
        dynamic_shapes={"query": {1: ROWS}, "key": {1: LENGTH}, "mask": dynamic},
    )
    assert [(int(one.lower), int(one.upper)) for one in program.range_constraints.values()] == [(2, 4096)] * 2
    assert f"compiled_attn.{name}.v1" in [str(node.target) for node in program.graph.nodes]


class Aligned(nn.Module):
    def forward(self, mask: Tensor) -> Tensor:
        return aligned_bias(mask)


@pytest.mark.parametrize("keys", [40, 41])
@pytest.mark.parametrize("kind", [kind for kind in MASKS if kind != "key_padding"])
def test_rows_are_aligned_at_every_length(kind, keys):
    made, dynamic = MASKS[kind]
    program = torch.export.export(Aligned(), (made(43, keys),), dynamic_shapes={"mask": dynamic}).module()
    for length in (7, 8, 9, 40, 47, 2048):
        mask = made(5, length)
        found = program(mask)
        torch.testing.assert_close(found.expand(mask.shape), mask, rtol=0, atol=0)
        sizes = zip(found.shape[:-1], found.stride()[:-1], strict=True)
        assert found.stride(-1) == 1 and all(stride % 8 == 0 for size, stride in sizes if size > 1)
        if kind == "broadcast":
            assert found.shape[1:3] == (1, 1)  # not written out


@pytest.mark.parametrize("keys", [40, 41])
def test_what_pytorch_asks_of_a_row_of_keys_is_true_for_every_length(keys):
    """scaled_dot_product_attention pads a mask whose strides are no multiples of 8."""

    class Asks(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            aligned = aligned_bias(mask)
            return aligned + 1 if all(stride % 8 == 0 for stride in aligned.stride()[:-1]) else aligned

    mask = torch.zeros(2, 1, 1, keys)
    program = torch.export.export(Asks(), (mask,), dynamic_shapes={"mask": {3: LENGTH}})
    torch.testing.assert_close(program.module()(mask[..., :33]), torch.ones(2, 1, 1, 33))
