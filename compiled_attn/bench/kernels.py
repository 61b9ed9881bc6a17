"""Every backend that can run here, at the shapes of real diffusion transformers: error, time, ratio to `native`.

One process, one set of inputs for each shape, median of CUDA events after a warm-up. Prints a short table last; --json
keeps everything. Also measured: the matrix-product ceiling, what a key-padding mask and the rule for empty rows cost,
and what our operator adds to a library's own call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import compiled_attn
from compiled_attn import reference

from .. import cli_table
from ..cli_machine import processor_of, provenance, save
from .timing import ceiling, milliseconds


@dataclass(frozen=True)
class Shape:
    """One attention call of a model: batch, query and key length, heads, head_dim."""

    name: str
    batch: int
    q_length: int
    k_length: int
    heads: int
    head_dim: int

    def flop(self) -> int:
        """Of the forward: two products, 2 for each multiply-add. The backward has 2.5 times as many."""
        return 4 * self.batch * self.heads * self.q_length * self.k_length * self.head_dim


SHAPES = (
    Shape("flux", 1, 4608, 4608, 24, 128),
    Shape("qwen", 1, 7168, 7168, 24, 128),
    Shape("wan480", 1, 32760, 32760, 12, 128),
    Shape("cross", 1, 32760, 512, 40, 128),
    Shape("sd35", 2, 4429, 4429, 38, 64),
    Shape("ltx", 1, 7392, 7392, 32, 64),
    Shape("sana", 2, 1024, 300, 20, 112),
)
SMALL = (Shape("tiny", 1, 64, 64, 2, 16), Shape("tiny cross", 2, 33, 17, 4, 24))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m compiled_attn bench kernels``."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers, versions and machine to FILE too")
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"some of {', '.join(s.name for s in SHAPES)}")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that can run the call")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: argparse.Namespace) -> int:
    """Check and time everything; exit status 1 if a number is wrong."""
    device = torch.device(arguments.device)
    shapes: tuple[Shape, ...] = SHAPES if device.type == "cuda" else SMALL
    if arguments.shapes:
        shapes = tuple(shape for shape in shapes if shape.name in arguments.shapes)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    for shape in (bar := tqdm(shapes, desc="kernels", unit="shape")):
        bar.set_postfix_str(shape.name)
        for masked in (False, True):
            rows += list(_shape(shape, masked, dtype, device, arguments.backends, arguments.repeats))
    result: dict[str, Any] = {
        "benchmark": "kernels",
        **provenance(),
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": ceiling(dtype, device),
        "boundary_us": _boundary(dtype, device),
        "rows": rows,
    }
    save(result, arguments.json)
    _print(result)
    wrong = [row for row in rows if not row["right"]]
    for row in wrong:
        print(f"WRONG: {row['shape']} {row['mask']} {row['backend']}: {row['error']:.2e} > {row['allowed']:.2e}")
    return 1 if wrong else 0


def _print(result: dict[str, Any]) -> None:
    print(f"{processor_of(result)}, {result['dtype']}; matrix product {result['matmul_tflops']:.0f} TFLOP/s")
    print("our operator over the kernel's own call, eager: " + f"{result['boundary_us']:.1f} us")
    cells = [
        (
            row["shape"], row["mask"], row["backend"], f"{row['error']:.1e}", f"{row['forward_ms']:.3f}",
            f"{row['forward_tflops']:.0f}", f"{row['forward_ratio']:.2f}",
            "" if row["training_ms"] is None else f"{row['training_ms']:.3f}",
        )
        for row in result["rows"]
    ]  # fmt: skip
    heads = ("shape", "mask", "backend", "error", "fwd ms", "TFLOP/s", "native's time / its", "fwd + bwd ms")
    print(cli_table.text(heads, cells))


def _shape(
    shape: Shape, masked: bool, dtype: torch.dtype, device: torch.device, chosen: list[str] | None, repeats: int
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(shape.batch, length, shape.heads, shape.head_dim, dtype=dtype, device=device)
        for length in (shape.q_length, shape.k_length, shape.k_length)
    )
    keep = None
    if masked:
        keep = torch.ones(shape.batch, shape.k_length, dtype=torch.bool, device=device)
        keep[:, shape.k_length // 8 : shape.k_length // 4] = False  # a hole, as between Qwen-Image's text and image
    names = [
        name
        for name in compiled_attn.list_backends()
        if name != "switch"
        and (chosen is None or name in chosen)
        and not compiled_attn.why_not(name, q, k, v, key_padding_mask=keep)
        # the math kernel holds every score: 51 GB in float32 for wan480
        and not (name == "_native_math" and shape.q_length * shape.k_length * shape.heads > 2**31)
    ]
    allowed = allowed_error(q, k, v, keep)
    native = None
    for name in names:

        def forward(name: str = name) -> Tensor:
            return compiled_attn.attention(q, k, v, key_padding_mask=keep, backend=name)

        error = sampled_error(forward(), q, k, v, keep)
        with torch.no_grad():
            ms = milliseconds(forward, device, repeats)
        if name == "native":
            native = ms
        yield {
            "shape": shape.name,
            "sizes": [shape.batch, shape.q_length, shape.k_length, shape.heads, shape.head_dim],
            "mask": "key_padding" if masked else "none",
            "backend": name,
            "error": error,
            "allowed": allowed,
            "right": error <= allowed,
            "forward_ms": ms,
            "forward_tflops": shape.flop() / ms / 1e9,
            "forward_ratio": (native or ms) / ms,
            "training_ms": _training(name, q, k, v, keep, device, repeats),
        }


def _training(
    name: str, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, device: torch.device, repeats: int
) -> float | None:
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    if compiled_attn.why_not(name, q, k, v, key_padding_mask=keep):
        return None
    upstream = torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype, device=device)

    def step() -> object:
        out = compiled_attn.attention(q, k, v, key_padding_mask=keep, backend=name)
        return torch.autograd.grad(out, (q, k, v), upstream)

    return milliseconds(step, device, max(repeats // 2, 1))


def plain(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
    """scaled_dot_product_attention of (B, S, H, D) with a key-padding mask."""
    mask = None if keep is None else keep[:, None, None, :]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def sampled_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> float:
    """Relative error (Frobenius norm) against float64, over two heads and 512 queries spread over all."""
    rows = torch.linspace(0, q.shape[1] - 1, min(512, q.shape[1]), device=q.device).long()
    heads = torch.tensor([0, q.shape[2] - 1], device=q.device)
    want, _ = reference.attention(q[:, rows][:, :, heads], k[:, :, heads], v[:, :, heads], key_padding_mask=keep)
    got = out.detach()[:, rows][:, :, heads].double()
    return relative(got, want)


def allowed_error(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> float:
    """What a kernel may be off by: twice what plain PyTorch is, and rounding."""
    return 2 * sampled_error(plain(q, k, v, keep), q, k, v, keep) + 1e-5


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Frobenius norms."""
    return float((got - want).norm() / want.norm())


def _boundary(dtype: torch.dtype, device: torch.device) -> float:
    """Eager microseconds of `native` over plain SDPA with the same transposes, on tensors of no size."""
    q = torch.randn(1, 8, 2, 16, dtype=dtype, device=device)
    differences = []
    with torch.inference_mode():
        for _ in range(15):
            times = []
            for run in (lambda: plain(q, q, q, None), lambda: compiled_attn.attention(q, q, q, backend="native")):
                began = time.perf_counter()
                for _ in range(200):
                    run()
                times.append((time.perf_counter() - began) / 200 * 1e6)
            differences.append(times[1] - times[0])
    return statistics.median(differences)
