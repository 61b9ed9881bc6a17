"""What really ran: attention operators of eager code and of compiled graphs, and the backends that `switch` found.

For commands that verify (``promises``). Nothing here is on the way of an ordinary call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import registry
from .operators import NAMESPACE


def attention_name(target: Any) -> str | None:
    """``namespace::name`` of an attention operator: ours, or one of PyTorch's fused ones; None for what is neither.

    A higher-order operator (FlexAttention's, a Triton kernel's) has its own name.

    >>> import torch
    >>> attention_name(torch.ops.compiled_attn.flex.v1), attention_name(torch.ops.aten.mm.default)
    ('compiled_attn::flex', None)
    """
    if isinstance(target, torch._ops.HigherOrderOperator):
        name = target.name()
        return name if "attention" in name or "triton_kernel" in name else None
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return target._schema.name if target.namespace == NAMESPACE or "attention" in target._opname else None


def attention_operators(graph: torch.fx.GraphModule) -> set[str]:
    """The names of the attention operators in ``graph``."""
    return {name for node in graph.graph.nodes if (name := attention_name(node.target)) is not None}


class Eager(TorchDispatchMode):
    """Names of the attention operators that eager code runs meanwhile, in ``operators``."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = attention_name(func)
        if name is not None:
            self.operators.add(name)
        return func(*args, **(kwargs or {}))


class Inductor:
    """A backend for torch.compile: TorchInductor, and what it was given.

    ``graphs`` are those that Dynamo made; ``forward`` and ``backward`` hold the attention operators of the graphs
    that AOTAutograd made of them, one set for each.
    """

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.forward: list[set[str]] = []
        self.backward: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **more: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(lowered: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            kept = self.backward if kwargs.get("is_backward") else self.forward
            kept.append(attention_operators(lowered))  # now: Inductor changes the graph
            return compile_fx_inner(lowered, *args, **kwargs)

        self.graphs.append(graph)
        # a graph found in AOTAutograd's cache is not lowered again, and `inner` would not see it
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compile_fx(graph, inputs, inner_compile=inner, config_patches=more.get("options"))


@contextlib.contextmanager
def backends_that_run(*names: str) -> Iterator[list[str]]:
    """Note in the list which of the backends ``names`` `switch` runs the dense forward of, in order.

    It finds them in the registry, where each gets a forward, or the function it delegates by, that says so.
    """
    ran: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.append(name)
            return function(*args)

        return run

    kept = {name: registry.find(name) for name in names}
    for name, entry in kept.items():
        backend = entry.backend
        if backend.delegate is not None:
            backend = dataclasses.replace(backend, delegate=noted(name, backend.delegate))
        elif backend.dense is not None:
            dense = dataclasses.replace(backend.dense, forward=noted(name, backend.dense.forward))
            backend = dataclasses.replace(backend, dense=dense)
        registry.BACKENDS[name] = dataclasses.replace(entry, backend=backend)
    try:
        yield ran
    finally:
        registry.BACKENDS.update(kept)
