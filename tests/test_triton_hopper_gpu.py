"""`triton_hopper` on an H100 or H200: many tiles and blocks, neighbours with NaN, gradients, CUDA graphs, offsets.

test_numerics.py and test_varlen.py have the matrix of small calls, this file what takes several blocks of keys and
several turns of a program.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import compiled_attn
from compiled_attn import reference, registry

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


@pytest.fixture
def hopper():
    missing = registry.unavailable("triton_hopper")
    if missing:
        pytest.skip("; ".join(missing))


def close(actual, expected):
    """bfloat16 results against float64: relative to the size of all."""
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < 5e-3, error


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


def starts_of(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("width", [16, 64, 72, 96, 128, 256])
@pytest.mark.parametrize("positions", ["full", "causal", "causal_lower", "window"])
def test_many_tiles(width, positions, dtype):
    """More tiles than multiprocessors, so that a program takes several; keys of several blocks."""
    options = {
        "full": {}, "causal": {"is_causal": True},
        "causal_lower": {"is_causal": True, "causal_alignment": "lower_right"},
        "window": {"window_size": (150, 20), "causal_alignment": "lower_right"},
    }[positions]  # fmt: skip
    query, key, value = random(3, 1000, 16, width, dtype=dtype), *(random(3, 517, 4, width, dtype=dtype) for _ in "kv")
    out, lse = compiled_attn.attention_with_lse(query, key, value, enable_gqa=True, backend="triton_hopper", **options)
    right, right_lse = reference.attention(query.double(), key.double(), value.double(), **options)
    close(out, right)
    torch.testing.assert_close(lse.double(), right_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [72, 128])
@pytest.mark.parametrize(
    ("batch", "q_length", "k_length", "heads"),
    [(1, 1, 1, 1), (2, 17, 300, 3), (1, 257, 129, 2), (2, 4500, 700, 40), (3, 640, 5000, 24)],
)
def test_programs_in_pairs_compute_what_programs_alone_do(batch, q_length, k_length, heads, width, masked):
    """To the bit: they share loads and nothing else. One half of a pair is idle where the number of tiles is odd."""
    from compiled_attn.ops import _hopper_launch as launch

    query = random(batch, q_length, 2 * heads, width)
    key, value = (random(batch, k_length, heads, width) for _ in "kv")
    keep = None
    if masked:
        keep = torch.rand(batch, k_length, device="cuda") < 0.9
        keep[:, : k_length // 2] = True
    pairs, alone = launch.TABLE[128][:2]
    assert (pairs.paired, alone.paired) == (True, False)
    found = [
        launch.forward(query, key, value, keep, None, 0, None, None, True, config=config)
        for config in (pairs, alone, pairs, pairs)
    ]
    for one in found:
        torch.testing.assert_close(one, found[1], rtol=0, atol=0)


@pytest.mark.parametrize("width", [64, 128])
def test_a_neighbour_with_nan_reaches_nobody(width):
    lengths = starts_of(300, 100, 333)
    query, key, value = (random(760, 2, width) for _ in range(3))
    right, _ = reference.varlen_attention(query.double(), key.double(), value.double(), lengths, lengths)
    for tensor in (query, key, value):
        tensor[300:400] = math.nan
        tensor[733:] = math.inf
    out = compiled_attn.varlen_attention(query, key, value, lengths, lengths, backend="triton_hopper")
    close(out[:300], right[:300])
    close(out[400:733], right[400:733])
    assert (out[733:] == 0).all()
    keep = torch.ones(1, 760, device="cuda", dtype=torch.bool)
    keep[:, 300:400] = keep[:, 733:] = False
    clean = [torch.where(keep[0, :, None, None], tensor, 0) for tensor in (query, key, value)]
    masked = compiled_attn.attention(
        clean[0][None], key[None], value[None], key_padding_mask=keep, backend="triton_hopper"
    )
    doubles = (tensor[None].double() for tensor in clean)
    close(masked, reference.attention(*doubles, key_padding_mask=keep)[0])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_gradients_are_those_of_triton(packed):
    """The same kernels, given another's out and lse."""
    shape, starts = ((500, 4, 64) if packed else (2, 250, 4, 64)), starts_of(250, 0, 250)

    def gradients(name):
        torch.manual_seed(0)
        inputs = [random(*shape).requires_grad_() for _ in range(3)]
        if packed:
            out = compiled_attn.varlen_attention(*inputs, starts, starts, backend=name, is_causal=True)
        else:
            out = compiled_attn.attention(*inputs, backend=name)
        return torch.autograd.grad(out, inputs, random(*shape))

    for one, other in zip(gradients("triton_hopper"), gradients("triton"), strict=True):
        close(one, other.double())


def test_a_graph_replays_with_other_lengths_and_masks():
    query, key, value = (random(1, 700, 4, 128) for _ in range(3))
    starts, keep = starts_of(300, 400), torch.ones(1, 700, device="cuda", dtype=torch.bool)

    def call():
        one = compiled_attn.varlen_attention(
            query[0], key[0], value[0], starts, starts, 700, 700, backend="triton_hopper"
        )
        return one, compiled_attn.attention(query, key, value, key_padding_mask=keep, backend="triton_hopper")

    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        doubles = [tensor.double() for tensor in (query, key, value)]
        for lengths, hole in (((700, 0), (0, 1)), ((1, 650), (100, 333)), ((350, 349), (0, 700))):
            starts.copy_(starts_of(*lengths))
            keep.fill_(True)[:, slice(*hole)] = False
            graph.replay()
            right, _ = reference.varlen_attention(*(tensor[0] for tensor in doubles), starts, starts)
            close(results[0], right)
            close(results[1], reference.attention(*doubles, key_padding_mask=keep)[0])


def test_offsets_past_2_to_the_31():
    """A packed qkv tensor of 2.4e9 elements: the last sequence begins behind 2^31."""
    heads, width, total = 8, 128, 780_000
    qkv = torch.zeros(total, 3, heads, width, device="cuda", dtype=torch.bfloat16)
    qkv[-200:] = random(200, 3, heads, width)
    query, key, value = qkv.unbind(1)
    lengths = torch.tensor([0, 10, total - 200, total], device="cuda", dtype=torch.int32)
    # no keys for what is between: the long sequence of queries sees none
    keys = torch.tensor([0, 10, 10, 210], device="cuda", dtype=torch.int32)
    tail = [tensor[-210:] for tensor in (key, value)]
    out, lse = compiled_attn.varlen_attention_with_lse(query, *tail, lengths, keys, backend="triton_hopper")
    right, right_lse = reference.attention(*(tensor[None, -200:].double() for tensor in (query, key, value)))
    close(out[-200:], right[0])
    torch.testing.assert_close(lse[:, -200:].double(), right_lse[0], rtol=1e-4, atol=1e-4)
    assert (out[10:-200] == 0).all()
    assert (lse[:, 10:-200] == -math.inf).all()


@pytest.mark.parametrize("width", [64, 128])
def test_compiled_calls_run_it(width):
    inputs = [random(1, 200, 4, width).requires_grad_() for _ in range(3)]

    def call(*tensors):
        return compiled_attn.attention(*tensors, backend="triton_hopper")

    compiled = torch.compile(call, fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, call(*inputs), rtol=0, atol=0)
    for one, other in zip(
        torch.autograd.grad(compiled.float().square().sum(), inputs),
        torch.autograd.grad(call(*inputs).float().square().sum(), inputs), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
