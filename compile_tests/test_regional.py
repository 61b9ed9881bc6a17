"""Regional compilation: repeated blocks of Diffusers' models compile once a backend, however many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import compiled_attn
from compiled_attn.integrations import diffusers as integration

pytest.importorskip(
    "diffusers", minversion="0.36", reason="needs diffusers>=0.36: pip install 'compiled_attn[diffusers]'"
)

from diffusers.models import attention_dispatch

from compiled_attn.demo import models

NATIVE = ("native", "_native_math", "_native_flash")
# Depths, and the attention calls of one graph: a sort of block is one graph.
DEPTH: dict[str, dict[str, int]] = {
    "flux": {"num_layers": 3, "num_single_layers": 4},
    "wan": {"num_layers": 5},
    "qwen": {"num_layers": 4},
}
CALLS = {"flux": [1, 1], "wan": [2], "qwen": [1]}
# The first single block of flux gets a tensor of other strides: one graph more, until Dynamo knows that they vary.
FIRST = {**CALLS, "flux": [1, 1, 1]}


class Graphs:
    """A compiler backend that runs graphs as they are and keeps the attention operators of each."""

    def __init__(self) -> None:
        self.seen: list[Counter[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        ours = [node.target for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "compiled_attn"]
        self.seen.append(Counter(one._opname for one in ours))
        return graph


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    with torch.no_grad(), integration.installed():
        yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(active)


def deep(name: str, seed: int = 0) -> tuple[models.Subject, Graphs]:
    """A model of several equal blocks, whose blocks are compiled; all that is not in a block is not."""
    subject = models.build(name, "cpu", torch.float32, real=False, seed=seed)
    torch.manual_seed(seed)
    subject.model = type(subject.model).from_config({**subject.model.config, **DEPTH[name]}).eval()
    graphs = Graphs()
    subject.model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    return subject, graphs


def plain(subject: models.Subject) -> Tensor:
    """The same weights, uncompiled."""
    twin = type(subject.model).from_config(subject.model.config).eval()
    twin.load_state_dict(subject.model.state_dict())
    return subject(twin)


def under(subject: models.Subject, how: str, backend: str) -> Tensor:
    if how == "context":
        with compiled_attn.attention_backend(backend):
            return subject()
    if how == "default":
        compiled_attn.set_default_backend(backend)
    elif how == "pin":
        compiled_attn.set_attention_backend(subject.model, backend)
    elif how == "Diffusers' own":
        subject.model.set_attention_backend(backend)
    return subject()


@pytest.mark.parametrize("how", ["context", "default", "pin", "Diffusers' own"])
@pytest.mark.parametrize("name", DEPTH)
def test_a_graph_for_each_sort_of_block_and_backend_and_none_on_return(name: str, how: str) -> None:
    subject, graphs = deep(name)
    expected = plain(subject)
    for backend in NATIVE:
        before = len(graphs.seen)
        calls_of_graphs = CALLS[name] if before else FIRST[name]
        torch.testing.assert_close(under(subject, how, backend), expected, rtol=1e-5, atol=1e-5)
        assert graphs.seen[before:] == [{backend: calls} for calls in calls_of_graphs]
    known = len(graphs.seen)
    for backend in (*NATIVE, *reversed(NATIVE)):
        torch.testing.assert_close(under(subject, how, backend), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs.seen) == known


@pytest.mark.parametrize("name", DEPTH)
def test_switch_is_one_graph_for_each_sort_of_block(name: str) -> None:
    subject, graphs = deep(name)
    expected = plain(subject)
    compiled_attn.set_attention_backend(subject.model, "switch")
    outs = {}
    for backend in (*NATIVE, *NATIVE):
        with compiled_attn.attention_backend(backend):
            outs[backend] = subject()
        torch.testing.assert_close(outs[backend], expected, rtol=1e-5, atol=1e-5)
    assert graphs.seen == [{"switch": calls} for calls in FIRST[name]]
    assert not torch.equal(outs["_native_math"], outs["_native_flash"]), "what ran is what was chosen"


def test_pins_belong_to_their_model() -> None:
    first, graphs = deep("wan")
    second, others = deep("wan", seed=1)
    third, rest = deep("wan", seed=2)
    compiled_attn.set_attention_backend(first.model, "_native_math")
    second.model.set_attention_backend("_native_flash")
    for _ in range(2):
        with compiled_attn.attention_backend("native"):
            for subject in (first, second, third):
                torch.testing.assert_close(subject(), plain(subject), rtol=1e-5, atol=1e-5)
    assert (graphs.seen, others.seen, rest.seen) == ([{"_native_math": 2}], [{"_native_flash": 2}], [{"native": 2}])


def test_one_block_pinned_otherwise_is_one_graph_more() -> None:
    subject, graphs = deep("wan")
    compiled_attn.set_attention_backend(subject.model, "_native_flash")
    compiled_attn.set_attention_backend(subject.model.blocks[-1], "_native_math")
    expected = plain(subject)
    for _ in range(2):
        torch.testing.assert_close(subject(), expected, rtol=1e-5, atol=1e-5)
    assert graphs.seen == [{"_native_flash": 2}, {"_native_math": 2}]
    compiled_attn.reset_attention_backend(subject.model)
    with compiled_attn.attention_backend("_native_math"):
        torch.testing.assert_close(subject(), expected, rtol=1e-5, atol=1e-5)


def test_training_a_step_with_checkpointed_blocks() -> None:
    """Gradient checkpointing of Diffusers calls the compiled block again, in backward and outside of any context."""
    subject, graphs = deep("wan")
    compiled_attn.set_attention_backend(subject.model, "_native_math")
    twin = type(subject.model).from_config(subject.model.config)
    twin.load_state_dict(subject.model.state_dict())
    subject.model.enable_gradient_checkpointing()
    subject.model.train()
    with torch.enable_grad():
        subject().square().mean().backward()
        subject(twin.train()).square().mean().backward()
    for actual, expected in zip(subject.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-5)
    assert {name for graph in graphs.seen for name in graph} == {"_native_math"}
