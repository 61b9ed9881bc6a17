"""What compiled code is made of: counts of graphs, and the attention operators in them."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend


class Counter(CompileCounterWithBackend):
    """A backend for torch.compile that counts its graphs and names the attention operators in them."""

    def __init__(self, backend: str = "eager") -> None:
        super().__init__(backend)

    def operators(self) -> list[list[str]]:
        """For each graph, in order of compilation, the backends whose dense operators are in it."""
        return [[_backend(node.target) for node in graph.graph.nodes if _is_ours(node.target)] for graph in self.graphs]


def _is_ours(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "compiled_attn"


def _backend(target: Any) -> str:
    """``flash_varlen`` of ``flash_varlen_dense``: a varlen name keeps its own name for packed calls."""
    return target._opname.removesuffix("_dense")
