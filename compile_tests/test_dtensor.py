"""Attention on DTensors: two processes, numbers and gradients of the whole; refusals and graphs without them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stand_in  # noqa: F401  registers the backend
import torch
from graphs import Counter
from ranks import Ranks
from torch import Tensor, nn

import compiled_attn
from compiled_attn import attention, attention_with_lse, varlen_attention, varlen_attention_with_lse

if not torch.distributed.is_available():
    pytest.skip("this torch was built without torch.distributed", allow_module_level=True)

import torch.distributed as dist
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from compiled_attn.integrations import dtensor

BATCH, LENGTH, HEADS, WIDTH = 4, 6, 8, 4
BACKENDS = ("native", "_native_math", "_native_flash", "stand_in", "triton", "switch", "flex")
SHARDED = (Shard(0), Shard(2), Replicate())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture
def four() -> Iterator[Any]:
    """A mesh of four ranks, three of which do not exist: what a rank refuses and compiles does not need them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    dtensor.install()
    yield init_device_mesh("cpu", (4,))
    dtensor.uninstall()
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------- what the ranks run


def close(actual: Any, expected: Tensor | None) -> None:
    if isinstance(actual, DTensor):
        actual = actual.full_tensor()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def leaf(tensor: Tensor, placements: list[Placement] | None) -> Tensor:
    """A leaf that wants a gradient: ``tensor`` itself, or what a rank of the default mesh has of it."""
    if placements is None:
        return tensor.clone().requires_grad_()
    return distribute_tensor(tensor, mesh(), placements).requires_grad_()


def mesh() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def compare(
    call: Callable[..., Any],
    given: tuple[Tensor, ...],
    placements: tuple[Placement | None, ...],
    compiled: bool = False,
    expected_placements: tuple[Placement, ...] | None = None,
) -> None:
    """``call(*given)``, ``out`` or ``(out, lse)``, and all gradients: of the whole, and of DTensors (None: plain)."""
    dtensor.install()
    whole = [leaf(one, None) if one.is_floating_point() else one for one in given]
    parts = [
        (leaf(one, None if how is None else [how]) if one.is_floating_point() else one)
        if how is None or one.is_floating_point()
        else distribute_tensor(one, mesh(), [how])
        for one, how in zip(given, placements, strict=True)
    ]
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    results = []
    for function, arguments in ((call, whole), (run, parts)):
        found = function(*arguments)
        found = found if isinstance(found, tuple) else (found,)
        found[0].sin().sum().backward()
        results.append(found)
    for actual, expected in zip(results[1], results[0], strict=True):
        assert isinstance(actual, DTensor)
        close(actual, expected.detach())
    if expected_placements is not None:
        assert tuple(one.placements[0] for one in results[1]) == expected_placements
    for actual, expected in zip(parts, whole, strict=True):
        if expected.is_floating_point():
            close(actual.grad, expected.grad)


def qkv(heads: int = HEADS, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, LENGTH, HEADS, WIDTH),
        torch.randn(batch, LENGTH + 2, heads, WIDTH),
        torch.randn(batch, LENGTH + 2, heads, WIDTH),
    )


def plain_call(name: str, placement: Placement, compiled: bool) -> None:
    lse = Shard(1) if placement == Shard(2) else placement
    compare(
        lambda q, k, v: attention_with_lse(q, k, v, scale=0.4, is_causal=True, backend=name),
        qkv(),
        (placement,) * 3,
        compiled,
        (placement, lse),
    )


def masked_call(name: str, placement: Placement, shape: tuple[int, ...], kind: str, how: Placement | None) -> None:
    mask = torch.randn(shape)
    if kind != "float":
        mask = mask > -0.5
    option = "key_padding_mask" if kind == "padding" else "attn_mask"
    compare(
        lambda q, k, v, given: attention(q, k, v, **{option: given}, backend=name),
        (*qkv(), mask),
        (placement, placement, placement, how),
    )


def mixed_call(placements: tuple[Placement, ...], compiled: bool) -> None:
    compare(lambda q, k, v: attention(q, k, v, backend="stand_in"), qkv(), placements, compiled)


def grouped_call(placement: Placement, window: tuple[int, int] | None) -> None:
    compare(
        lambda q, k, v: attention(q, k, v, enable_gqa=True, window_size=window, backend="triton"),
        qkv(heads=2),
        (placement,) * 3,
    )


def partial_call() -> None:
    """Each rank holds one summand of the keys: attention needs the sum."""
    dtensor.install()
    q, k, v = qkv()
    parts = DTensor.from_local(k * (dist.get_rank() + 1) / 3, mesh(), [Partial()], run_check=False)
    shards = (distribute_tensor(one, mesh(), [Shard(0)]) for one in (q, v))
    sharded_q, sharded_v = shards
    close(attention(sharded_q, parts, sharded_v), attention(q, k, v))


def packed_call(name: str, placement: Placement, compiled: bool, replicated_lengths: bool) -> None:
    starts = torch.tensor([0, 2, 7], dtype=torch.int32)  # of 9 rows
    given = tuple(torch.randn(9, heads, WIDTH) for heads in (HEADS, 2, 2))

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Any:
        return varlen_attention_with_lse(q, k, v, lengths, lengths, is_causal=True, enable_gqa=True, backend=name)

    compare(
        call,
        (*given, starts),
        (placement, placement, placement, Replicate() if replicated_lengths else None),
        compiled,
        (placement, Shard(0) if placement == Shard(1) else placement),
    )


def a_mask_that_is_ambiguous_on_a_shard() -> None:
    """(B, Sk) with B = 4 and Sq = 2 is a key-padding mask; with the shard's B = 2 it would be refused."""
    q, k = torch.randn(4, 2, HEADS, WIDTH), torch.randn(4, 5, HEADS, WIDTH)
    compare(lambda a, b, m: attention(a, b, b, m), (q, k, torch.rand(4, 5) > 0.3), (Shard(0), Shard(0), None))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (HEADS, WIDTH)) for one in (self.q, self.k, self.v))
        return self.out(attention(q, k, v, is_causal=True).flatten(-2))


def tensor_parallel_block(compiled: bool) -> None:
    """Tensor parallelism as PyTorch does it: the projections are sharded by heads, and stay so through attention."""
    dtensor.install()
    torch.manual_seed(1)
    plain, parallel = Block(), Block()
    parallel.load_state_dict(plain.state_dict())
    column = ColwiseParallel(use_local_output=False)
    parallelize_module(parallel, mesh(), {"q": column, "k": column, "v": column, "out": RowwiseParallel()})
    compiled_attn.set_attention_backend(parallel, "stand_in")
    counter = Counter("aot_eager")
    run = torch.compile(parallel, fullgraph=True, backend=counter) if compiled else parallel
    x = torch.randn(BATCH, LENGTH, HEADS * WIDTH)
    close(run(x), plain(x))
    run(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    for actual, expected in zip(parallel.parameters(), plain.parameters(), strict=True):
        close(actual.grad, expected.grad)
    if compiled:
        assert counter.backends() == [["stand_in"]]


# --------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("placement", SHARDED, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_on_batches_heads_and_replicas(
    pair: Ranks, name: str, placement: Placement, compiled: bool
) -> None:
    if compiled and name in ("_native_math", "_native_flash"):
        pytest.skip("compiled like native")
    pair.run(plain_call, name, placement, compiled)


SHAPES = {
    "one": (1, 1, LENGTH, LENGTH + 2),
    "batch": (BATCH, 1, 1, LENGTH + 2),
    "rows of batches": (BATCH, 1, LENGTH, LENGTH + 2),
    "heads": (1, HEADS, LENGTH, LENGTH + 2),
    "all": (BATCH, HEADS, LENGTH, LENGTH + 2),
    "three": (BATCH, LENGTH, LENGTH + 2),
}


@pytest.mark.parametrize("placement", SHARDED, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("which", SHAPES)
def test_masks_follow_or_stay_whole(pair: Ranks, which: str, kind: str, placement: Placement) -> None:
    """Plain masks are those of all ranks. Gradients of float masks are the sums over all shards."""
    pair.run(masked_call, "_native_math", placement, SHAPES[which], kind, None)


@pytest.mark.parametrize("placement", SHARDED, ids=str)
@pytest.mark.parametrize("how", [None, Replicate(), Shard(0)], ids=str)
def test_masks_that_are_dtensors(pair: Ranks, how: Placement | None, placement: Placement) -> None:
    pair.run(masked_call, "switch", placement, SHAPES["all"], "float", how)
    pair.run(masked_call, "stand_in", placement, (BATCH, LENGTH + 2), "padding", how)
    pair.run(masked_call, "stand_in", placement, (1, LENGTH + 2), "padding", None)


def test_a_mask_means_what_it_means_for_the_whole(pair: Ranks) -> None:
    pair.run(a_mask_that_is_ambiguous_on_a_shard)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("placement", SHARDED[:2], ids=str)
def test_what_is_replicated_beside_shards_is_sliced(pair: Ranks, placement: Placement, compiled: bool) -> None:
    pair.run(mixed_call, (placement, Replicate(), Replicate()), compiled)
    pair.run(mixed_call, (Replicate(), placement, Replicate()), compiled)


@pytest.mark.parametrize("placement", SHARDED, ids=str)
def test_grouped_heads_and_windows(pair: Ranks, placement: Placement) -> None:
    pair.run(grouped_call, placement, None)
    pair.run(grouped_call, placement, (2, 1))


def test_partial_sums_are_added_up_first(pair: Ranks) -> None:
    pair.run(partial_call)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("placement", [Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("name", ["native", "triton", "switch"])
def test_packed_sequences_by_heads(pair: Ranks, name: str, placement: Placement, compiled: bool) -> None:
    pair.run(packed_call, name, placement, compiled, compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_under_tensor_parallelism(pair: Ranks, compiled: bool) -> None:
    pair.run(tensor_parallel_block, compiled)


# ------------------------------------------------------------------------------------------- graphs and meshes


class Graphs:
    """A compiler for AOTAutograd's graphs, in which DTensors are gone and communication shows."""

    def __init__(self) -> None:
        self.targets: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.targets.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


def test_compiled_shards_compute_without_communication(four: Any) -> None:
    from torch._dynamo.backends.common import aot_autograd

    seen = Graphs()
    run = torch.compile(lambda x: attention(x, x, x), fullgraph=True, backend=aot_autograd(fw_compiler=seen))
    x = distribute_tensor(torch.randn(BATCH, LENGTH, HEADS, WIDTH), four, [Shard(2)]).requires_grad_()
    names = ("stand_in", "switch", "stand_in", "switch")
    for name in names:
        with compiled_attn.attention_backend(name):
            run(x).to_local().sum().backward()
    forwards = [one for targets in seen.targets for one in targets if "compiled_attn" in one]
    assert forwards == [
        "compiled_attn.stand_in.v1", "compiled_attn.stand_in_backward.v1",
        "compiled_attn.switch.v1", "compiled_attn.switch_backward.v1",
    ]  # fmt: skip
    assert not [one for targets in seen.targets for one in targets if "c10d" in one]


def test_two_dimensions_of_a_mesh(four: Any) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    local = torch.randn(2, LENGTH, 4, WIDTH)
    x = DTensor.from_local(local, grid, [Shard(0), Shard(2)], run_check=False)
    mask = torch.randn(BATCH, HEADS, LENGTH, LENGTH)
    out, lse = attention_with_lse(x, x, x, mask)
    assert out.placements == (Shard(0), Shard(2)) and out.shape == (BATCH, LENGTH, HEADS, WIDTH)
    assert lse.placements == (Shard(0), Shard(1)) and lse.shape == (BATCH, HEADS, LENGTH)
    torch.testing.assert_close(out.to_local(), attention(local, local, local, mask[:2, :4]))
    both = distribute_tensor(torch.randn(BATCH, LENGTH, HEADS, WIDTH), grid, [Shard(0), Shard(0)])
    assert attention(both, both, both, backend="stand_in").to_local().shape == (1, LENGTH, HEADS, WIDTH)


# -------------------------------------------------------------------------------------------------- refusals


def on(four: Any, placement: Placement, *shape: int) -> Tensor:
    return distribute_tensor(torch.randn(*(shape or (BATCH, LENGTH, HEADS, WIDTH))), four, [placement])


def test_sequences_and_widths_are_not_sharded(four: Any) -> None:
    x = on(four, Shard(1), BATCH, 8, HEADS, WIDTH)
    words = (
        r"query is sharded over dimension 1, so over its sequence.*redistribute to Shard\(0\) \(batch\) or Shard\(2\)"
    )
    with pytest.raises(NotImplementedError, match=words):
        attention(x, x, x)
    with pytest.raises(Exception, match="sharded over dimension 1, so over its sequence"):
        torch.compile(lambda t: attention(t, t, t), fullgraph=True, backend="eager")(x)
    x = on(four, Shard(3))
    with pytest.raises(NotImplementedError, match="over its head_dim"):
        attention(x, x, x)
    x, starts = on(four, Shard(0), 8, HEADS, WIDTH), torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"over its sequence.*redistribute to Shard\(1\) \(heads\)"):
        varlen_attention(x, x, x, starts, starts)


def test_shards_are_of_one_size(four: Any) -> None:
    q, k = on(four, Shard(2)), on(four, Shard(2), BATCH, LENGTH, 2, WIDTH)
    with pytest.raises(NotImplementedError, match="key has heads=2 for 4 ranks; all shards must be of one size"):
        attention(q, k, k, enable_gqa=True)
    x = on(four, Shard(0), 6, LENGTH, HEADS, WIDTH)
    with pytest.raises(NotImplementedError, match="query has batch=6 for 4 ranks"):
        attention(x, x, x)


def test_dropout_is_refused_for_replicas_too(four: Any) -> None:
    for placement in SHARDED:
        x = on(four, placement)
        with pytest.raises(NotImplementedError, match=r"has no dropout \(dropout_p=0.1\): each rank would draw"):
            attention(x, x, x, dropout_p=0.1)


def test_tensors_that_do_not_go_together(four: Any) -> None:
    x, other = on(four, Shard(0)), on(four, Shard(2))
    with pytest.raises(ValueError, match="sharded over batch and over heads along one dimension of the mesh"):
        attention(x, other, x)
    with pytest.raises(ValueError, match="query is a DTensor and value is not"):
        attention(x, x, x.to_local())
    grid = init_device_mesh("cpu", (2, 2))
    elsewhere = distribute_tensor(torch.randn(BATCH, LENGTH, HEADS, WIDTH), grid, [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match="query and key are DTensors of different meshes"):
        attention(x, elsewhere, x)


def test_a_block_mask_is_refused(four: Any) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, LENGTH, LENGTH, device="cpu")
    x = on(four, Shard(0))
    with pytest.raises(NotImplementedError, match="a BlockMask cannot be divided"):
        attention(x, x, x, block_mask, backend="flex")


def test_rules_of_the_backend_hold_for_shards(four: Any) -> None:
    x = on(four, Shard(2))
    with pytest.raises(NotImplementedError, match="'_native_cudnn' cannot run this call"):
        attention(x, x, x, backend="_native_cudnn")
    with pytest.raises(ValueError, match="unknown attention backend 'flsh'"):
        attention(x, x, x, backend="flsh")


def test_without_install_a_dtensor_is_refused_by_name(four: Any) -> None:
    dtensor.uninstall()
    assert not dtensor.is_installed()
    x, starts = on(four, Shard(2)), torch.tensor([0, LENGTH], dtype=torch.int32)
    packed = on(four, Shard(1), LENGTH, HEADS, WIDTH)
    for call in (lambda: attention(x, x, x), lambda: varlen_attention(packed, packed, packed, starts, starts)):
        with pytest.raises(NotImplementedError, match=r"compiled_attn.integrations.dtensor.install\(\) once"):
            call()
    with pytest.raises(Exception, match=r"integrations.dtensor.install\(\) once"):
        torch.compile(lambda t: attention(t, t, t), fullgraph=True, backend="eager")(x)


def test_importing_the_package_imports_no_dtensor() -> None:
    code = (
        "import sys, compiled_attn; assert 'torch.distributed.tensor' not in sys.modules; "
        "compiled_attn.integrations.dtensor.install(); assert 'torch.distributed.tensor' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
