"""Another backend for an exported program, without tracing the model again: every operator has one schema."""

from __future__ import annotations

import contextlib
import copy
import operator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from . import registry
from .operators import call_of
from .registry import Entry
from .spec import report


def retarget(
    program: torch.export.ExportedProgram, backend: str, *, keep_flex: bool = False
) -> torch.export.ExportedProgram:
    """A copy of ``program`` whose attention operators all run ``backend``; ``program`` stays as it is.

    A call whose lse nobody reads asks for none where ``backend`` has none; it is then for inference alone.

    Args:
        program: from ``torch.export.export`` of a model that calls this library, not yet decomposed.
        backend: a name of ``list_backends()``; packed calls go to its packed operator.
        keep_flex: FlexAttention's own operator, whose mask is code in the graph, cannot be pointed elsewhere, and who
            called it, this library or the model, cannot be told. True leaves it as it is, False refuses such a program.

    Returns:
        The new program. Weights are shared with ``program``; ``package`` takes it in place of a model.

    Raises:
        ValueError: the backend is unknown, or the program has no attention operator of this library.
        NotImplementedError: the backend cannot run here, or cannot serve one of the calls, at all of its dynamic
            sizes, or FlexAttention's operator is among them; all reasons, by node.

    >>> import torch, compiled_attn
    >>> class Block(torch.nn.Module):
    ...     def forward(self, x):
    ...         return compiled_attn.attention(x, x, x, backend="native")
    >>> program = torch.export.export(Block(), (torch.randn(1, 8, 2, 16),))
    >>> other = compiled_attn.export.retarget(program, "_native_math")
    >>> [node.target for node in other.graph.nodes if "compiled_attn" in str(node.target)]
    [<OpOverload(op='compiled_attn._native_math', overload='v1')>]
    """
    from torch.fx.experimental import symbolic_shapes  # sympy: not at import

    kinds = ("GuardOnDataDependentSymNode", "_ShapeEnvGuardError")  # torch 2.9 has not the second
    conditions = tuple(getattr(symbolic_shapes, kind) for kind in kinds if hasattr(symbolic_shapes, kind))
    registry.usable(backend)
    entry = registry.find(backend)
    module = copy.deepcopy(program.graph_module)
    calls = [(node, varlen) for node in nodes(module) if (varlen := _is_varlen(node.target)) is not None]
    if not calls:
        raise ValueError(
            "the program has no attention operator of compiled_attn to point elsewhere (FlexAttention's own operator, "
            "and a program that went through run_decompositions, have none left); export the model again"
        )
    found = []
    for node, varlen in calls:
        reasons = _refusal(entry, node, varlen)
        if reasons and _asks_for_lse_in_vain(node):
            node.args = (*node.args[:-1], False)
            for unread in [user for user in node.users if not user.users]:
                unread.graph.erase_node(unread)
            reasons = _refusal(entry, node, varlen)
        found += [f"{node.name}: {reason}" for reason in reasons]
    if not keep_flex:
        found += [
            f"{node.name}: is FlexAttention's own operator, which cannot be pointed elsewhere; export the model again "
            f"with {backend!r}, or leave it as it is: retarget(program, {backend!r}, keep_flex=True)"
            for node in nodes(module)
            if isinstance(node.target, torch._ops.HigherOrderOperator) and "attention" in node.target.name()
        ]
    if found:
        raise NotImplementedError(report(f"backend {backend!r} cannot run this program:", found))
    for node, varlen in calls:
        overload = entry.varlen_op if varlen else entry.op
        assert overload is not None  # refusal() has looked
        node.target = overload
        try:
            node.meta["val"] = _traced(overload, _values(node))
        except conditions as error:
            reason = str(error).split("\n")[0]
            found = [f"{node.name}: serves only some of its dynamic sizes ({reason}); export with {backend!r}"]
            raise NotImplementedError(report(f"backend {backend!r} cannot run this program:", found)) from error
    module.recompile()
    return torch.export.ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def nodes(module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """Call nodes of the graph and of those inside it (branches, loops)."""
    graphs = [one.graph for one in module.modules() if isinstance(one, torch.fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes if node.op == "call_function"]


def _is_varlen(target: Any) -> bool | None:
    """Whether ``target`` is a backend's dense (False) or packed (True) operator; None for anything else."""
    for entry in registry.BACKENDS.values():
        if target is entry.op:
            return False
        if target is entry.varlen_op:
            return True
    return None


def _values(node: torch.fx.Node) -> tuple[Any, ...]:
    return tree_map_only(torch.fx.Node, lambda one: one.meta["val"], node.args)  # type: ignore[no-any-return]


def _traced(overload: torch._ops.OpOverload, args: tuple[Any, ...]) -> Any:
    """What ``overload`` makes of the fake ``args``, without a new condition on their sizes where torch can tell.

    torch.export refuses a kernel that would hold for the example's lengths alone (``length % 8 == 0``); here nobody
    would, and the program would be compiled for them without a word. (torch 2.9 cannot be asked.)
    """
    from torch.fx.experimental import symbolic_shapes

    environment = args[0].fake_mode.shape_env
    strict = getattr(environment, "error_on_new_guards", contextlib.nullcontext)
    with args[0].fake_mode:
        # torch.export takes every size that varies for over 1; a program that was saved and loaded has forgotten it
        for size in (size for one in args if isinstance(one, torch.Tensor) for size in one.shape):
            if isinstance(size, torch.SymInt) and not symbolic_shapes.free_unbacked_symbols(size):
                bool(size > 1)
        with strict():
            return overload(*args)


def _asks_for_lse_in_vain(node: torch.fx.Node) -> bool:
    """Whether lse is computed and read by nobody: for a backward, as parameters want gradients, or by the model."""
    assert isinstance(node.target, torch._ops.OpOverload)
    asks = len(node.args) == len(node.target._schema.arguments) and node.args[-1] is True
    return asks and all(
        user.target is operator.getitem and (user.args[1] != 1 or not user.users) for user in node.users
    )


def _refusal(entry: Entry, node: torch.fx.Node, varlen: bool) -> list[str]:
    # exported programs have no backward of ours
    return registry.refusal(entry, call_of(_values(node), varlen))
