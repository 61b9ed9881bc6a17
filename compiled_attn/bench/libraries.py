"""What our operators add to the kernel libraries' own calls, and what a key-padding mask costs on each.

Three measurements, each within one process and against the library's public function on the same inputs: microseconds
of an eager call on small tensors, the time of a compiled step of 4,608 tokens, and a mask with a hole beside an
unmasked call on as many keys as the mask leaves.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import compiled_attn
from compiled_attn import registry

from .. import cli_table
from ..cli_machine import processor_of, provenance, save
from .timing import measure, milliseconds

# backend: module, its public function, whether that takes (B, H, S, D); all others take (B, S, H, D)
DIRECT: dict[str, tuple[str, str, bool]] = {
    "native": ("torch.nn.functional", "scaled_dot_product_attention", True),
    "flash": ("flash_attn", "flash_attn_func", False),
    "_flash_3": ("flash_attn_interface", "flash_attn_func", False),
    "_flash_4": ("flash_attn.cute", "flash_attn_func", False),
    "sage": ("sageattention", "sageattn", True),
    "xformers": ("xformers.ops", "memory_efficient_attention", False),
    "aiter": ("aiter", "flash_attn_func", False),
}
EAGER_GOAL_US = 10.0
STEP_GOAL = 0.01
MASK_GOAL = 1.10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m compiled_attn bench libraries``."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers, versions and machine to FILE too")
    parser.add_argument("--backends", nargs="+", metavar="NAME", choices=tuple(DIRECT), help="default: all installed")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant (default: 20)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: argparse.Namespace) -> int:
    """Measure every library that is installed; on a CPU at tiny sizes, to see that it runs."""
    device, repeats = torch.device(arguments.device), arguments.repeats
    names = []
    for name in arguments.backends or DIRECT:
        x = torch.empty(1, 8, 1, 64, dtype=_dtype(device), device=device)
        reasons = registry.unavailable(name) or compiled_attn.why_not(name, x, x, x)
        if reasons:
            print(f"{name}: {'; '.join(reasons)}")
        else:
            names.append(name)
    rows: list[dict[str, Any]] = []
    result = {"benchmark": "libraries", **provenance(), "rows": rows}
    for name in (bar := tqdm(names, desc="libraries", unit="backend")):
        bar.set_postfix_str(name)
        step, direct = _step(name, device, repeats)
        rows.append(
            {"backend": name, "eager_us": _eager(name, device), "step_ms": step, "library_step_ms": direct}
            | _masked(name, device, repeats)
        )
        save(result, arguments.json)  # kept as they come: a run that is stopped has measured something
    _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    print(processor_of(result))
    cells = []
    for row in result["rows"]:
        more = row["step_ms"] / row["library_step_ms"] - 1
        masked = row["masked_ms"] and row["masked_ms"] / row["fewer_keys_ms"]
        missed = [
            label
            for label, met in (
                ("eager", row["eager_us"] < EAGER_GOAL_US),
                ("step", more < STEP_GOAL),
                ("mask", masked is None or masked < MASK_GOAL),
            )
            if not met
        ]
        cells.append(
            (
                row["backend"], f"{row['eager_us']:+.1f}", f"{row['step_ms']:.3f}", f"{more:+.1%}",
                row["mask_refused"] or f"{masked:.2f}", "missed: " + ", ".join(missed) if missed else "met",
            )
        )  # fmt: skip
    heads = ("backend", "eager us over its own call", "step ms", "over its own call", "mask / fewer keys", "goals")
    print(cli_table.text(heads, cells))


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _direct(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The library's own call, from and to (B, S, H, D)."""
    module, function, heads_first = DIRECT[name]
    kernel = getattr(importlib.import_module(module), function)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if heads_first:
            return kernel(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)
        out = kernel(query, key, value)
        return out[0] if isinstance(out, tuple) else out  # FlashAttention-4 returns lse too

    return call


def _ours(name: str) -> Callable[..., Tensor]:
    return functools.partial(compiled_attn.attention, backend=name)


def _eager(name: str, device: torch.device) -> float:
    """Microseconds of our eager call over the library's. Calls so small that the device waits for the host."""
    x = torch.randn(1, 128, 2, 64, dtype=_dtype(device), device=device)
    variants = {"direct": functools.partial(_direct(name), x, x, x), "ours": functools.partial(_ours(name), x, x, x)}
    return measure(variants, rounds=31, calls=50, mode=torch.inference_mode).over("ours", "direct")


class _Block(nn.Module):
    """A transformer block of Flux's width."""

    def __init__(self, attention: Callable[..., Tensor], heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.attention, self.heads = attention, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(F.layer_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attention(query, key, value).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:])), approximate="tanh"))


def _step(name: str, device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds of four compiled blocks with our operator, and with the library's call in its place.

    The two take turns, as a GPU's clock falls while it is busy. A library's call may break the graph; ours may not.
    """
    heads, head_dim, tokens = (24, 128, 4608) if device.type == "cuda" else (2, 16, 32)
    x = torch.randn(1, tokens, heads * head_dim, dtype=_dtype(device), device=device)
    steps = []
    for attention, fullgraph in ((_ours(name), True), (_direct(name), False)):
        torch.compiler.reset()
        torch.manual_seed(0)
        blocks = nn.Sequential(*(_Block(attention, heads, head_dim) for _ in range(4))).to(device, _dtype(device))
        steps.append(torch.compile(blocks.requires_grad_(False), fullgraph=fullgraph))
        steps[-1](x)
    times = [[milliseconds(functools.partial(step, x), device, repeats) for step in steps] for _ in range(5)]
    ours, direct = (statistics.median(column) for column in zip(*times, strict=True))
    return ours, direct


def _masked(name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Two sequences, each with a hole of its own among the keys, beside a call on the keys that are left."""
    heads, head_dim, tokens, hole = (24, 128, 4608, 200) if device.type == "cuda" else (2, 16, 32, 5)
    query, key, value = torch.randn(3, 2, tokens, heads, head_dim, dtype=_dtype(device), device=device)
    keep = torch.ones(2, tokens, dtype=torch.bool, device=device)
    keep[0, tokens // 8 : tokens // 8 + hole] = False
    keep[1, tokens // 2 : tokens // 2 + hole] = False
    if reasons := compiled_attn.why_not(name, query, key, value, key_padding_mask=keep):
        return {"masked_ms": None, "fewer_keys_ms": None, "mask_refused": "; ".join(reasons)}
    call, fewer = _ours(name), tokens - hole
    with torch.no_grad():
        masked = milliseconds(lambda: call(query, key, value, key_padding_mask=keep), device, repeats)
        unmasked = milliseconds(lambda: call(query, key[:, :fewer], value[:, :fewer]), device, repeats)
    return {"masked_ms": masked, "fewer_keys_ms": unmasked, "mask_refused": ""}
