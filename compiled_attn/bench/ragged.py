"""Our portable kernels beside PyTorch's own: dense shapes, packed sequences of uneven length, key-padding masks.

One process, one set of inputs for each row, medians of CUDA events. Packed sequences are compared with our own dense
kernel on the same number of tokens and products; a mask with a hole with our own kernel on as many keys as the mask
leaves. The matrix-product ceiling is measured beside them. --json keeps everything.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

import compiled_attn

from .. import cli_table
from ..cli_machine import provenance, save
from .timing import ceiling, milliseconds

# name: batch, query length, key length, heads, head_dim (docs/triton.md says whose they are)
SHAPES = {
    "flux": (1, 4608, 4608, 24, 128),
    "qwen": (1, 7400, 7400, 24, 128),
    "wan480": (1, 32760, 32760, 12, 128),
    "cross": (1, 32760, 512, 40, 128),
    "sd35": (2, 4429, 4429, 38, 64),
    "ltx": (1, 12288, 12288, 32, 64),
    "width72": (1, 8192, 8192, 16, 72),
    "width96": (1, 8192, 8192, 16, 96),
    "width256": (1, 4096, 4096, 18, 256),
}
# 16 lengths between 256 and 8,192, and two kinds of length: 32,768 tokens each
MIXED = (256, 320, 384, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5184, 8192)
BIMODAL = (256, 3840) * 8
HEADS = {128: 24, 64: 32}
HOLE = 200
# FlexAttention compiles for 10 s a shape, so at two of them
FLEX = ("flux", "sd35")
OURS = ("triton", "triton_hopper")
TABLES = ("dense", "ragged", "masked")
PROVIDERS = (*OURS, "_native_flash", "_native_cudnn", "flex")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m compiled_attn bench ragged``."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers, versions and machine to FILE too")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ours", choices=OURS, default=OURS[0], help="whose packed and masked calls (default: triton)")


def main(arguments: argparse.Namespace) -> int:
    """Time everything and print it; on a CPU at tiny sizes, to see that it runs."""
    device, repeats, ours = torch.device(arguments.device), arguments.repeats, arguments.ours
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes = SHAPES if on_gpu else {"tiny": (1, 64, 64, 2, 16)}
    sets = {
        f"{name} {sum(lengths) * times // 1024}k": lengths * times
        for name, lengths in (("mixed", MIXED), ("bimodal", BIMODAL))
        for times in (1, 4)
    }
    if not on_gpu:
        sets = {"tiny": (3, 9, 20)}
    dense, ragged, masked = [], [], []
    for name, sizes in tqdm(shapes.items() if "dense" in arguments.tables else (), desc="dense", unit="shape"):
        dense += list(_dense(name, sizes, dtype, device, repeats))
    widths = HEADS if on_gpu else {16: 2}
    for width, heads in widths.items():
        for name, lengths in tqdm(
            sets.items() if "ragged" in arguments.tables else (), desc=f"ragged {width}", unit="set"
        ):
            ragged.append(_ragged(ours, name, lengths, heads, width, dtype, device, repeats))
    for name, sizes in tqdm(shapes.items() if "masked" in arguments.tables else (), desc="masked", unit="shape"):
        masked.append(_masked(ours, name, sizes, dtype, device, repeats))
    result: dict[str, Any] = {
        "benchmark": "ragged",
        **provenance(),
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": ceiling(dtype, device),
        "dense": dense,
        "ragged": ragged,
        "masked": masked,
    }
    save(result, arguments.json)
    _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    print(f"matrix product {result['matmul_tflops']:.0f} TFLOP/s; TFLOP/s below, backward without forward")
    for table in TABLES:
        rows = result[table]
        if not rows:
            continue
        heads = tuple(rows[0])
        cells = [tuple(_cell(row[head]) for head in heads) for row in rows]
        print(f"\n{table}\n" + cli_table.text(heads, cells))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return (
        f"{value:.0f}" if isinstance(value, float) and value > 20 else f"{value:.3g}" if value != str(value) else value
    )


def _both(run: Callable[[], Tensor], inputs: list[Tensor], device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds of forward and backward; ``inputs`` require gradients."""
    with torch.no_grad():
        forward = milliseconds(run, device, repeats)
    out = run()
    upstream = torch.randn_like(out)
    return forward, milliseconds(lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True), device, repeats)


def _random(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def _dense(
    name: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int
) -> Iterator[dict[str, Any]]:
    batch, q_length, k_length, heads, width = sizes
    torch.manual_seed(0)
    inputs = [
        _random(batch, length, heads, width, dtype=dtype, device=device) for length in (q_length, k_length, k_length)
    ]
    flop = 4 * batch * heads * q_length * k_length * width
    found: dict[str, tuple[float, float]] = {}
    for provider in PROVIDERS:
        if provider == "flex":
            if name in FLEX:  # not on a CPU: it has no backward there
                found[provider] = _flex(inputs, device, repeats)
        elif not compiled_attn.why_not(provider, *inputs):
            found[provider] = _both(
                functools.partial(compiled_attn.attention, *inputs, backend=provider), inputs, device, repeats
            )
    ours = found["triton"]
    for provider, (forward, backward) in found.items():
        yield {
            "shape": name,
            "provider": provider,
            "forward": flop / forward / 1e9,
            "backward": 2.5 * flop / backward / 1e9,
            "triton's forward / its": forward / ours[0],
            "triton's backward / its": backward / ours[1],
        }


def _flex(inputs: list[Tensor], device: torch.device, repeats: int) -> tuple[float, float]:
    """FlexAttention without a mask, compiled for the shape at hand."""
    torch._dynamo.reset()  # or it runs eagerly, 60 times slower, past its limit of shapes
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    transposed = [tensor.transpose(1, 2) for tensor in inputs]
    return _both(lambda: compiled(*transposed), inputs, device, repeats)  # type: ignore[arg-type, return-value]


def _ragged(
    ours: str,
    name: str,
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> dict[str, Any]:
    torch.manual_seed(0)
    total, pairs = sum(lengths), sum(length * length for length in lengths)
    inputs = [_random(total, heads, width, dtype=dtype, device=device) for _ in range(3)]
    starts = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    length = round(pairs / total)
    batch = max(1, round(total / length))
    equal = [_random(batch, length, heads, width, dtype=dtype, device=device) for _ in range(3)]

    def packed(backend: str) -> Callable[[], Tensor]:
        longest = max(lengths)
        q, k, v = inputs
        return lambda: compiled_attn.varlen_attention(q, k, v, starts, starts, longest, longest, backend=backend)

    mine, theirs = (_both(packed(backend), inputs, device, repeats) for backend in (ours, "_native_flash"))
    own = _both(lambda: compiled_attn.attention(*equal, backend=ours), equal, device, repeats)
    flop, dense_flop = 4 * heads * width * pairs, 4 * heads * width * batch * length * length
    return {
        "set": name,
        "width": width,
        "forward": flop / mine[0] / 1e9,
        "of own dense": flop / mine[0] / (dense_flop / own[0]),
        "of flash": theirs[0] / mine[0],
        "backward": 2.5 * flop / mine[1] / 1e9,
        "backward of own dense": flop / mine[1] / (dense_flop / own[1]),
        "backward of flash": theirs[1] / mine[1],
    }


def _masked(
    ours: str, name: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Time with a hole of 200 keys, and with every tenth key masked, over the time without a mask on as many keys."""
    batch, q_length, k_length, heads, width = sizes
    torch.manual_seed(0)
    query = _random(batch, q_length, heads, width, dtype=dtype, device=device)
    row: dict[str, Any] = {"shape": name}
    hole = torch.ones(batch, k_length, dtype=torch.bool, device=device)
    hole[:, k_length // 2 : k_length // 2 + min(HOLE, k_length // 4)] = False
    tenth = (torch.arange(k_length, device=device) % 10 != 3).expand(batch, -1)
    for what, keep in (("hole", hole), ("every tenth", tenth)):
        full = [query, *(_random(batch, k_length, heads, width, dtype=dtype, device=device) for _ in range(2))]
        left = int(keep[0].sum())
        short = [query, *(tensor.detach()[:, :left].contiguous().requires_grad_() for tensor in full[1:])]
        call = functools.partial(compiled_attn.attention, backend=ours)
        masked = _both(functools.partial(call, *full, key_padding_mask=keep), full, device, repeats)
        plain = _both(functools.partial(call, *short), short, device, repeats)
        row[what], row[f"{what}, backward"] = masked[0] / plain[0], masked[1] / plain[1]
    return row
