"""Our portable kernels beside PyTorch's own: dense shapes, packed sequences of uneven length, key-padding masks.

One process, one set of inputs for each row, medians of CUDA events; what is compared takes turns, as a GPU's clock
falls while it is busy. Packed sequences are compared with our own dense kernel on the same number of tokens and
products; a mask with a hole with our own kernel on as many keys as the mask leaves. Results are checked against float64
at a sample of rows. The matrix-product ceiling is measured beside them. --json keeps everything.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

import compiled_attn
from compiled_attn import reference, registry

from .. import cli_table
from ..cli_machine import provenance, save
from .kernels import allowed_error, relative, sampled_error
from .timing import ceiling, milliseconds

# name: batch, query length, key length, heads, head_dim (docs/triton.md says whose they are)
SHAPES = {
    "flux": (1, 4608, 4608, 24, 128),
    "qwen": (1, 7400, 7400, 24, 128),
    "wan480": (1, 32760, 32760, 12, 128),
    "wan480_14b": (1, 32760, 32760, 40, 128),
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
PROVIDERS = (*OURS, "_native_flash", "_native_cudnn", "_flash_4", "flex")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m compiled_attn bench ragged``."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers, versions and machine to FILE too")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES), help="default: all")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        default=PROVIDERS,
        help="of the dense table; default: all installed",
    )
    parser.add_argument("--forward", action="store_true", help="no backward")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant (default: 20)")
    parser.add_argument("--rounds", type=int, default=1, help="how often variants take turns (default: 1)")
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="rest before each (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ours", choices=OURS, default=OURS[0], help="whose packed and masked calls (default: triton)")


@dataclass(frozen=True)
class Work:
    """What runs on what, and how it is timed."""

    device: torch.device
    dtype: torch.dtype
    ours: str
    repeats: int
    rounds: int
    pause: float
    backward: bool

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device).requires_grad_()

    def times(self, calls: dict[str, Call]) -> dict[str, tuple[float, float | None]]:
        """Milliseconds of forward and backward of each call, which take turns."""
        with torch.no_grad():
            forward = self._turns({name: call.run for name, call in calls.items()})
        backward = self._turns({name: self._backward(call) for name, call in calls.items()}) if self.backward else {}
        return {name: (forward[name], backward.get(name)) for name in calls}

    def _turns(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        rounds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, run in calls.items():
                time.sleep(self.pause)
                rounds[name].append(milliseconds(run, self.device, self.repeats))
        return {name: statistics.median(times) for name, times in rounds.items()}

    @staticmethod
    def _backward(call: Call) -> Callable[[], object]:
        out = call.run()
        upstream = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, call.inputs, upstream, retain_graph=True)


@dataclass(frozen=True)
class Call:
    """Something to time: ``run()`` on ``inputs``, which require gradients."""

    run: Callable[[], Tensor]
    inputs: list[Tensor]


def main(arguments: argparse.Namespace) -> int:
    """Time everything and print it, exit status 1 if a result is wrong; on a CPU at tiny sizes, to see that it runs."""
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    if missing := registry.unavailable(arguments.ours):
        print(f"{arguments.ours}: {'; '.join(missing)}", file=sys.stderr)
        return 2
    if not on_gpu and arguments.ours != OURS[0]:
        print(f"{arguments.ours} runs on GPUs alone", file=sys.stderr)
        return 2
    work = Work(
        device, torch.bfloat16 if on_gpu else torch.float32, arguments.ours, arguments.repeats, arguments.rounds,
        arguments.pause, not arguments.forward,
    )  # fmt: skip
    shapes = {name: SHAPES[name] for name in arguments.shapes} if on_gpu else {"tiny": (1, 64, 64, 2, 16)}
    sets = {
        f"{name} {sum(lengths) * times // 1024}k": lengths * times
        for name, lengths in (("mixed", MIXED), ("bimodal", BIMODAL))
        for times in (1, 4)
    }
    if not on_gpu:
        sets = {"tiny": (3, 9, 20)}
    dense, ragged, masked = [], [], []
    for name, sizes in tqdm(shapes.items() if "dense" in arguments.tables else (), desc="dense", unit="shape"):
        dense += list(_dense(work, name, sizes, arguments.providers))
    widths = HEADS if on_gpu else {16: 2}
    for width, heads in widths.items():
        for name, lengths in tqdm(
            sets.items() if "ragged" in arguments.tables else (), desc=f"ragged {width}", unit="set"
        ):
            ragged.append(_ragged(work, name, lengths, heads, width))
    for name, sizes in tqdm(shapes.items() if "masked" in arguments.tables else (), desc="masked", unit="shape"):
        masked.append(_masked(work, name, sizes))
    result: dict[str, Any] = {
        "benchmark": "ragged",
        **provenance(),
        "dtype": str(work.dtype).removeprefix("torch."),
        "matmul_tflops": ceiling(work.dtype, device),
        "dense": dense,
        "ragged": ragged,
        "masked": masked,
    }
    save(result, arguments.json)
    _print(result)
    wrong = [row for row in dense + ragged + masked if not row["right"]]
    for row in wrong:
        print(f"WRONG: {row}")
    return 1 if wrong else 0


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
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value > 20 else f"{value:.3g}"


def _rate(flop: float, ms: float | None) -> float | None:
    """TFLOP/s, if there is a time."""
    return None if ms is None else flop / ms / 1e9


def _over(one: float | None, other: float | None, factor: float = 1.0) -> float | None:
    return None if one is None or other is None else factor * one / other


def _dense(work: Work, name: str, sizes: tuple[int, ...], providers: list[str]) -> Iterator[dict[str, Any]]:
    batch, q_length, k_length, heads, width = sizes
    torch.manual_seed(0)
    inputs = [work.random(batch, length, heads, width) for length in (q_length, k_length, k_length)]
    flop = 4 * batch * heads * q_length * k_length * width
    calls: dict[str, Call] = {}
    for provider in providers:
        if provider == "flex":
            if name in FLEX:  # not on a CPU: it has no backward there
                calls[provider] = Call(_flex(inputs), inputs)
        elif not compiled_attn.why_not(provider, *inputs):
            calls[provider] = Call(functools.partial(compiled_attn.attention, *inputs, backend=provider), inputs)
    query, key, value = (tensor.detach() for tensor in inputs)
    allowed = allowed_error(query, key, value, None)
    with torch.no_grad():
        errors = {
            provider: sampled_error(_rows_first(provider, call.run()), query, key, value, None)
            for provider, call in calls.items()
        }
    times = work.times(calls)
    ours = times.get(work.ours, (None, None))
    for provider, (forward, backward) in times.items():
        yield {
            "shape": name,
            "provider": provider,
            "right": errors[provider] <= allowed,
            "error": errors[provider],
            "forward": _rate(flop, forward),
            "backward": _rate(2.5 * flop, backward),
            f"{work.ours}'s forward / its": _over(forward, ours[0]),
            f"{work.ours}'s backward / its": _over(backward, ours[1]),
        }


def _rows_first(provider: str, out: Tensor) -> Tensor:
    return out.transpose(1, 2) if provider == "flex" else out


def _flex(inputs: list[Tensor]) -> Callable[[], Tensor]:
    """FlexAttention without a mask, compiled for the shape at hand."""
    torch._dynamo.reset()  # or it runs eagerly, 60 times slower, past its limit of shapes
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    transposed = [tensor.transpose(1, 2) for tensor in inputs]
    return lambda: compiled(*transposed)  # type: ignore[arg-type, return-value]


def _ragged(work: Work, name: str, lengths: tuple[int, ...], heads: int, width: int) -> dict[str, Any]:
    torch.manual_seed(0)
    total, pairs = sum(lengths), sum(length * length for length in lengths)
    inputs = query, key, value = [work.random(total, heads, width) for _ in range(3)]
    starts = torch.tensor((0, *lengths)).cumsum(0).to(work.device, torch.int32)
    length = round(pairs / total)
    batch = max(1, round(total / length))
    equal = [work.random(batch, length, heads, width) for _ in range(3)]
    longest = max(lengths)
    calls = {
        backend: Call(
            functools.partial(
                compiled_attn.varlen_attention, query, key, value, starts, starts, longest, longest, backend=backend
            ),
            inputs,
        )
        for backend in (work.ours, "_native_flash")
    }
    with torch.no_grad():
        errors = {backend: _packed_error(call.run(), inputs, starts) for backend, call in calls.items()}
    calls["dense"] = Call(functools.partial(compiled_attn.attention, *equal, backend=work.ours), equal)
    times = work.times(calls)
    mine, theirs, own = times[work.ours], times["_native_flash"], times["dense"]
    flop, dense_flop = 4 * heads * width * pairs, 4 * heads * width * batch * length * length
    share = flop / dense_flop
    return {
        "set": name,
        "width": width,
        "right": errors[work.ours] <= 2 * errors["_native_flash"] + 1e-5,
        "error": errors[work.ours],
        "forward": _rate(flop, mine[0]),
        "of own dense": _over(own[0], mine[0], share),
        "of flash": _over(theirs[0], mine[0]),
        "backward": _rate(2.5 * flop, mine[1]),
        "backward of own dense": _over(own[1], mine[1], share),
        "backward of flash": _over(theirs[1], mine[1]),
    }


def _packed_error(out: Tensor, inputs: list[Tensor], starts: Tensor) -> float:
    """Relative error (Frobenius norm) against float64, over the first and the last head."""
    heads = [0, out.shape[1] - 1]
    got = out.detach()[:, heads].double()
    query, key, value = (tensor.detach()[:, heads].double() for tensor in inputs)
    want, _ = reference.varlen_attention(query, key, value, starts, starts)
    return relative(got, want)


def _masked(work: Work, name: str, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Time with a hole of 200 keys, and with every tenth key masked, over the time without a mask on as many keys."""
    batch, q_length, k_length, heads, width = sizes
    torch.manual_seed(0)
    query = work.random(batch, q_length, heads, width)
    row: dict[str, Any] = {"shape": name, "right": True}
    hole = torch.ones(batch, k_length, dtype=torch.bool, device=work.device)
    hole[:, k_length // 2 : k_length // 2 + min(HOLE, k_length // 4)] = False
    tenth = (torch.arange(k_length, device=work.device) % 10 != 3).expand(batch, -1)
    for what, keep in (("hole", hole), ("every tenth", tenth)):
        full = [query, *(work.random(batch, k_length, heads, width) for _ in range(2))]
        left = int(keep[0].sum())
        key, value = (tensor.detach()[:, :left].contiguous().requires_grad_() for tensor in full[1:])
        short = [query, key, value]
        call = functools.partial(compiled_attn.attention, backend=work.ours)
        calls = {
            "masked": Call(functools.partial(call, *full, key_padding_mask=keep), full),
            "plain": Call(functools.partial(call, *short), short),
        }
        with torch.no_grad():
            allowed = allowed_error(query, key, value, None)
            row["right"] &= sampled_error(calls["masked"].run(), full[0], full[1], full[2], keep) <= allowed
        times = work.times(calls)
        for number, label in enumerate((what, f"{what}, backward")):
            row[label] = _over(times["masked"][number], times["plain"][number])
    return row
