"""`flex` in compiled code: eager == compiled, block lists built once in a graph, pointwise operations behind it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import compiled_attn
from compiled_attn import reference
from compiled_attn.ops import _flex_blocks as flex_blocks
from compiled_attn.spec import CAUSAL

LENGTH = 150  # two blocks of 128, the second one over the edge
BLOCKS = "compiled_attn.flex_blocks.v1"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(device: str = "cpu", dtype: torch.dtype = torch.float32, width: int = 16) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, LENGTH, 4, width).to(dtype).to(device)
    k, v = (torch.randn(2, LENGTH, 2, width).to(dtype).to(device) for _ in range(2))
    return q, k, v


def options(kind: str, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments for each kind of mask."""
    per_query = (2, 1, LENGTH, LENGTH)
    keep = torch.rand(2, LENGTH) > 0.3
    keep[:, :3] = False  # empty rows under causal
    found: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "key_padding": {"key_padding_mask": keep},
        "key_padding_causal": {"key_padding_mask": keep, "is_causal": True},
        "window": {"window_size": (20, 3)},
        "bool": {"attn_mask": torch.rand(per_query) > 0.5},
        "bool_per_head": {"attn_mask": torch.rand(2, 4, LENGTH, LENGTH) > 0.5},
        "float": {"attn_mask": torch.randn(per_query)},
        "float_window": {"attn_mask": torch.randn(1, 4, 1, LENGTH), "window_size": (20, 3)},
    }
    made = found[kind]
    return {name: item.to(device) if isinstance(item, torch.Tensor) else item for name, item in made.items()}


KINDS = ("none", "causal", "key_padding", "key_padding_causal", "window", "bool", "bool_per_head", "float",
         "float_window")  # fmt: skip


def call(q, k, v, arguments):
    return compiled_attn.attention(q, k, v, enable_gqa=True, backend="flex", **arguments)


def call_with_lse(q, k, v, arguments):
    return compiled_attn.attention_with_lse(q, k, v, enable_gqa=True, backend="flex", **arguments)


def right(q, k, v, arguments):
    return reference.attention(q, k, v, **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_inference(kind, backend):
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    arguments = options(kind)
    with torch.no_grad():  # inputs that require gradients make FlexAttention refuse on a CPU, even here
        out = torch.compile(call, fullgraph=True, backend=backend)(q, k, v, arguments)
        torch.testing.assert_close(out.double(), right(q, k, v, arguments)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(out, call(q, k, v, arguments), rtol=0, atol=1e-5)
    assert out.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_lse_and_training(kind):
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    arguments = options(kind)
    out, lse = torch.compile(call_with_lse, fullgraph=True, backend="aot_eager")(q, k, v, arguments)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected, expected_lse = right(*doubles, arguments)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
    assert not lse.requires_grad
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(found, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)


INDUCTOR = ["bool_per_head", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "bool_per_head")]


@pytest.mark.parametrize("kind", INDUCTOR)
def test_inductor_with_pointwise_neighbours(kind):
    """Inductor's CPU template fails on a pointwise operation behind it, and on a mask computed in the graph."""

    def block(q, k, v, arguments):
        changed = dict(arguments)
        if "attn_mask" in changed:
            mask = changed["attn_mask"]
            changed["attn_mask"] = mask.logical_not() if mask.dtype == torch.bool else mask * 0.5
        return (call(q, k, v, changed) + 1).cos()

    q, k, v = tensors()
    arguments = options(kind)
    with torch.no_grad():
        out = torch.compile(block, fullgraph=True)(q, k, v, arguments)
        torch.testing.assert_close(out, block(q, k, v, arguments), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inductor_low_precision(dtype):
    q, k, v = tensors(dtype=dtype)
    arguments = options("key_padding_causal")
    with torch.no_grad():
        out = torch.compile(call, fullgraph=True)(q, k, v, arguments)
    torch.testing.assert_close(out.double(), right(q, k, v, arguments)[0], rtol=0, atol=2e-2)


# ------------------------------------------------------------------------------------------- block lists in a graph


def three_layers(x, mask):
    for _ in range(3):
        x = x + compiled_attn.attention(x, x, x, mask, backend="flex")
    return x


def counted(model, *args) -> Counter[str]:
    """How often each operator is in the graph that a compiler would get, in inference."""
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module

    with torch.no_grad():
        out = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*args)
        torch.testing.assert_close(out, model(*args), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    return Counter(str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("shape", [(1, 1, LENGTH, LENGTH), (2, 4, LENGTH, LENGTH), (2, LENGTH, LENGTH), (2, LENGTH)],
                         ids=len)  # fmt: skip
def test_one_list_of_blocks_for_all_layers(shape):
    x = torch.randn(2, LENGTH, 4, 16)
    found = counted(three_layers, x, torch.rand(shape) > 0.4)
    assert found["flex_attention"] == 3
    assert found[BLOCKS] == 1


def test_one_list_of_blocks_for_a_mask_that_each_layer_makes_itself():
    def model(x, lengths):
        for _ in range(3):
            mask = torch.arange(LENGTH)[None] < lengths[:, None]
            x = x + compiled_attn.attention(x, x, x, key_padding_mask=mask, is_causal=True, backend="flex")
        return x

    found = counted(model, torch.randn(2, LENGTH, 4, 16), torch.tensor([90, 150]))
    assert found["flex_attention"] == 3
    assert found[BLOCKS] == 1


def test_other_masks_have_other_blocks():
    def model(x, mask):
        for window in (None, (3, 3), None):
            x = x + compiled_attn.attention(x, x, x, mask, window_size=window, backend="flex")
        mask = mask.clone()
        mask.logical_not_()
        return x + compiled_attn.attention(x, x, x, mask, backend="flex")

    found = counted(model, torch.randn(2, LENGTH, 4, 16), torch.rand(2, 1, LENGTH, LENGTH) > 0.4)
    assert found["flex_attention"] == 4
    assert found[BLOCKS] == 3


def test_masks_drawn_at_random_are_not_taken_for_one():
    def model(x):
        for _ in range(2):
            mask = torch.rand(2, 1, LENGTH, LENGTH) > 0.5
            x = compiled_attn.attention(x, x, x, mask, backend="flex")
        return x

    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module

    with torch.no_grad():
        torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(torch.randn(2, LENGTH, 4, 16))
    assert Counter(str(node.target) for node in graphs[0].graph.nodes)[BLOCKS] == 2


def test_a_graph_changed_in_place_gets_new_blocks():
    """Without functionalization, a graph may hold in-place operations."""

    def twice(mask):
        first = flex_blocks.build(mask, None, None, LENGTH, LENGTH, 0, None, mask.device)
        mask.logical_not_()
        return first[2], flex_blocks.build(mask, None, None, LENGTH, LENGTH, 0, None, mask.device)[2]

    graph = make_fx(twice)(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)).graph
    assert Counter(str(node.target) for node in graph.nodes)[BLOCKS] == 2


def test_off_the_cpu_the_graph_holds_plain_operators():
    """Inductor can fuse them, and a package needs no Python for them."""

    def twice(mask):
        one = flex_blocks.build(mask, None, None, LENGTH, LENGTH, CAUSAL, None, mask.device)
        return *one, *flex_blocks.build(mask, None, None, LENGTH, LENGTH, CAUSAL, None, mask.device)

    mask = torch.empty(1, 1, LENGTH, LENGTH, dtype=torch.bool, device="meta")
    found = Counter(str(node.target) for node in make_fx(twice)(mask).graph.nodes)
    assert found[BLOCKS] == 1


def test_lengths_may_be_dynamic():
    graphs = []

    def keep(module, inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(call, fullgraph=True, backend=keep, dynamic=True)
    with torch.no_grad():
        for length in (140, 200, 300):
            q, k, v = (torch.randn(2, length, 2, 16) for _ in range(3))
            arguments = {"key_padding_mask": torch.rand(2, length) > 0.3, "is_causal": True}
            out = compiled(q, k, v, arguments)
            torch.testing.assert_close(out.double(), right(q, k, v, arguments)[0], rtol=0, atol=1e-5)
    assert len(graphs) == 1


# -------------------------------------------------------------------------------------------------------- BlockMask


def mask_mod(b, h, i, j):
    return (i >= j + h) & (i - j < 40)


def block_mask_call(q, k, v, block_mask):
    return compiled_attn.attention(q, k, v, block_mask, enable_gqa=True, backend="flex").cos()


BLOCK_MASK_BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BLOCK_MASK_BACKENDS)
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_block_mask(backend, train):
    q, k, v = (tensor.requires_grad_(train) for tensor in tensors())
    block_mask = create_block_mask(mask_mod, None, 4, LENGTH, LENGTH, device="cpu")
    dense = create_mask(mask_mod, 1, 4, LENGTH, LENGTH, device="cpu")
    out = torch.compile(block_mask_call, fullgraph=True, backend=backend)(q, k, v, block_mask)
    expected = reference.attention(q, k, v, dense)[0].cos()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(out, block_mask_call(q, k, v, block_mask), rtol=0, atol=1e-5)
    if train:
        grad = torch.randn_like(out)
        wanted = torch.autograd.grad(expected, (q, k, v), grad.double())
        for one, other in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------- swaps, switch


def test_going_back_to_flex_compiles_nothing():
    compiled = compiled_attn.compile(lambda x: compiled_attn.attention(x, x, x), fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 20, 2, 16)
    graphs = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        graphs.clear()
        for rounds in range(2):
            for name in ("native", "flex", "_native_math"):
                with compiled_attn.attention_backend(name):
                    torch.testing.assert_close(compiled(x).double(), reference.attention(x, x, x)[0], rtol=0, atol=1e-5)
            assert graphs["unique_graphs"] == 3, f"round {rounds}"


def test_switch_over_flex():
    def model(q, k, v, mask):
        return compiled_attn.attention(q, k, v, mask, enable_gqa=True, backend="switch")

    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    mask = torch.rand(2, 4, LENGTH, LENGTH) > 0.5
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = reference.attention(q, k, v, mask)[0]
    grad = torch.randn(q.shape)
    wanted = torch.autograd.grad(expected, (q, k, v), grad.double())
    with compiled_attn.attention_backend("flex"):
        out = compiled(q, k, v, mask)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    for one, other in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_inference_on_a_gpu(kind):
    q, k, v = tensors("cuda", torch.bfloat16, 64)
    arguments = options(kind, "cuda")
    with torch.no_grad():
        out = torch.compile(lambda *args: call(*args) + 1, fullgraph=True)(q, k, v, arguments)
    torch.testing.assert_close(out.double() - 1, right(q, k, v, arguments)[0], rtol=0, atol=4e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_gpu(kind):
    q, k, v = (tensor.requires_grad_() for tensor in tensors("cuda", width=64))
    arguments = options(kind, "cuda")
    out, lse = torch.compile(call_with_lse, fullgraph=True)(q, k, v, arguments)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected, expected_lse = right(*doubles, arguments)
    # float32 on a GPU may use TF32 products
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-2)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), grad)
    for one, other in zip(found, torch.autograd.grad(expected, doubles, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2)
        assert bool(one.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128, 160])
@pytest.mark.parametrize("table", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_a_mask_read_for_each_pair_fits_into_shared_memory(table, width):
    """Lengths a multiple of 16: only then are its loads pipelined, and take shared memory once for each stage."""
    q, k, v = (torch.randn(1, 512, 2, width).to(torch.bfloat16).cuda().requires_grad_() for _ in range(3))
    mask = torch.randn(1, 1, 512, 512)
    mask = (mask > 0 if table == torch.bool else mask.to(table)).cuda()
    arguments = {"attn_mask": mask}
    out = torch.compile(call, fullgraph=True)(q, k, v, arguments)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    expected = right(*doubles, arguments)[0]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    for one, other in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-2)


@pytest.mark.gpu
def test_block_mask_trains_on_a_gpu():
    q, k, v = (tensor.requires_grad_() for tensor in tensors("cuda", width=64))
    block_mask = create_block_mask(mask_mod, None, 4, LENGTH, LENGTH, device="cuda")
    dense = create_mask(mask_mod, 1, 4, LENGTH, LENGTH, device="cuda")
    out = torch.compile(block_mask_call, fullgraph=True)(q, k, v, block_mask)
    expected = reference.attention(q, k, v, dense)[0].cos()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, (q, k, v), grad.double())
    for one, other in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2)


@pytest.mark.gpu
def test_cuda_graphs_after_a_swap():
    """mode="reduce-overhead" replays what the swap chose, with the masks of each call."""
    compiled = compiled_attn.compile(
        lambda x, mask: compiled_attn.attention(x, x, x, mask) + 1, fullgraph=True, mode="reduce-overhead"
    )
    x = torch.randn(2, LENGTH, 4, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for name in ("native", "flex", "native", "flex"):
            with compiled_attn.attention_backend(name):
                for _ in range(4):
                    mask = torch.rand(2, 1, LENGTH, LENGTH, device="cuda") > 0.5
                    torch.compiler.cudagraph_mark_step_begin()
                    out = compiled(x, mask).clone()
                    expected = reference.attention(x, x, x, mask)[0] + 1
                    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-2)


@pytest.mark.gpu
def test_one_list_of_blocks_for_all_layers_on_a_gpu():
    x = torch.randn(2, LENGTH, 4, 64, device="cuda")
    mask = torch.rand(2, 1, LENGTH, LENGTH, device="cuda") > 0.4
    found = counted(three_layers, x, mask)
    assert found["flex_attention"] == 3
    assert found[BLOCKS] == 1
