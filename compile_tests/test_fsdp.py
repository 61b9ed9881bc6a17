"""FSDP2: each block compiled, then sharded. Numbers of the unsharded model, a graph for each backend, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import stand_in  # noqa: F401  registers the backend
import torch
from graphs import Counter
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import compiled_attn
from compiled_attn import attention

if not torch.distributed.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BLOCKS, BATCH, LENGTH, HEADS, WIDTH = 3, 2, 6, 2, 8
NAMES = ("triton", "stand_in", "triton", "stand_in")  # inlined, opaque


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    group = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)) for part in self.qkv(x).chunk(3, -1))
        return x + self.out(attention(q, k, v, is_causal=True).flatten(-2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def sharded(counter: Counter | None, checkpointing: str) -> Model:
    """Checkpoint, compile, shard, in this order, each block by itself."""
    model = Model()
    for number, block in enumerate(model.blocks):
        if checkpointing != "none":
            options = {} if checkpointing == "plain" else {"context_fn": compiled_attn.checkpoint_context_fn}
            block = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT, **options)
        if counter is not None:
            block.compile(fullgraph=True, backend=counter)
        model.blocks[number] = fully_shard(block)
    return fully_shard(model)


def operators(counter: Counter) -> list[str]:
    """Our operators in all graphs, with those inside of what is checkpointed."""
    parts = [part for graph in counter.graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = [node.target for part in parts for node in part.graph.nodes]
    return [one._opname for one in targets if getattr(one, "namespace", "") == "compiled_attn"]


def train(names: tuple[str, ...], how: str, checkpointing: str, compiled: bool) -> None:
    """One step under each backend; each rank has its own batch, and FSDP takes the mean of the gradients."""
    # AOTAutograd takes seconds for each graph; what it does is recompute, and keep the one graph of switch
    counter = Counter("eager" if checkpointing == "none" and how != "switch" else "aot_eager") if compiled else None
    torch.manual_seed(0)
    plain = Model()
    torch.manual_seed(0)
    model = sharded(counter, checkpointing)
    if how == "switch":
        compiled_attn.set_attention_backend(model, "switch")
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in (plain, model)]
    compiles = []
    for step, name in enumerate(names):
        torch.manual_seed(step + 1)
        batches = torch.randn(dist.get_world_size(), BATCH, LENGTH, HEADS * WIDTH)
        if how == "pins":
            compiled_attn.set_attention_backend(model, name)
            out = model(batches[dist.get_rank()])
        else:
            with compiled_attn.attention_backend(name):
                out = model(batches[dist.get_rank()])
        out.sin().mean().backward()  # outside of the context
        expected = plain(batches.flatten(0, 1)).unflatten(0, batches.shape[:2])
        expected.sin().mean().backward()
        torch.testing.assert_close(out, expected[dist.get_rank()], rtol=1e-4, atol=1e-5)
        for actual, right in zip(model.parameters(), plain.parameters(), strict=True):
            assert isinstance(actual.grad, DTensor)
            torch.testing.assert_close(actual.grad.full_tensor(), right.grad, rtol=1e-4, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if counter is not None:
            compiles.append(counter.frame_count)
    if counter is None:
        return
    kinds = list(dict.fromkeys(names)) if how != "switch" else ["switch"]
    assert operators(counter) == [name for name in kinds for _ in range(compiles[0])]
    for step, name in enumerate(names):
        new = compiles[step] - (compiles[step - 1] if step else 0)
        first = name not in names[:step] if how != "switch" else step == 0
        assert new == (compiles[0] if first else 0), f"step {step}, {name}: {new} new graphs"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("how", ["contexts", "pins", "switch"])
def test_training_swaps_backends_between_steps(ranks: Ranks, how: str, compiled: bool) -> None:
    ranks.run(train, NAMES, how, "none", compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("how", "checkpointing"), [
    ("contexts", "context_fn"), ("pins", "plain"), ("pins", "context_fn"), ("switch", "context_fn"),
])  # fmt: skip
def test_checkpointed_blocks(ranks: Ranks, how: str, checkpointing: str, compiled: bool) -> None:
    """Pins need nothing; contexts need the context_fn, as backward and its recomputation are outside of them."""
    ranks.run(train, NAMES[:3], how, checkpointing, compiled)


def compiled_contexts_without_the_context_fn() -> None:
    train(NAMES[:3], "contexts", "plain", compiled=True)


def test_compiled_contexts_need_no_context_fn(ranks: Ranks) -> None:
    """The graph of the recomputation is that of the forward."""
    ranks.run(compiled_contexts_without_the_context_fn)


def state_dict_round_trip() -> None:
    model = sharded(None, "none")
    compiled_attn.set_attention_backend(model, "_native_math")
    assert set(model.state_dict()) == set(Model().state_dict())
    x = torch.randn(BATCH, LENGTH, HEADS * WIDTH)
    with compiled_attn.attention_backend("stand_in"):
        before = model(x)
    compiled_attn.reset_attention_backend(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_pins_add_nothing_to_the_state(ranks: Ranks) -> None:
    ranks.run(state_dict_round_trip)
