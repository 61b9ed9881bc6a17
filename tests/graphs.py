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
        """For each graph, in order of compilation, the names of our operators in it."""
        return [
            [node.target._opname for node in graph.graph.nodes if _is_ours(node.target)]  # type: ignore[union-attr]
            for graph in self.graphs
        ]

    def backends(self) -> list[list[str]]:
        """The same with the backend's name: a varlen one's dense operator is called ``<name>_dense``."""
        return [[name.removesuffix("_dense") for name in names] for names in self.operators()]


def _is_ours(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "compiled_attn"
