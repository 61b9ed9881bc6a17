"""What our dispatch costs beside plain scaled_dot_product_attention and Diffusers' dispatcher.

Everything runs on the CPU with one thread, on tensors so small that nearly all of the time is the way to the kernel.
That way is Python and C++ on the CPU for a GPU's calls too.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import compiled_attn
from compiled_attn.operators import Kernels
from compiled_attn.registry import BACKENDS, Backend, register_backend
from compiled_attn.spec import Limits

from .report import Row, publish
from .timing import Times, measure

SHAPE = (1, 8, 2, 16)  # (B, S, H, D)
LAYERS = 60
OPS = 41
OPAQUE = "overhead_opaque"
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m compiled_attn bench overhead``."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers, versions and machine to FILE too")
    parser.add_argument("--rounds", type=int, default=61, help="rounds of each measurement (default: 61)")
    parser.add_argument("--calls", type=int, default=300, help="calls in each round (default: 300)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a goal is missed")


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What a model without a dispatcher writes: (B, S, H, D) in and out."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through this library."""
    return compiled_attn.attention(query, key, value)


def _diffusers() -> Callable[..., Any] | None:
    if importlib.util.find_spec("diffusers") is None:
        return None
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return dispatch_attention_fn


def main(arguments: argparse.Namespace) -> int:
    """Measure, print a table with the goals, write JSON if asked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows, notes = _all(arguments.rounds, arguments.calls)
        publish("overhead", rows, notes, arguments.json, rounds=arguments.rounds, calls=arguments.calls, shape=SHAPE)
    finally:
        torch.set_num_threads(threads)
    return 1 if arguments.strict and any(row.met is False for row in rows) else 0


def _all(rounds: int, calls: int) -> tuple[list[Row], list[str]]:
    theirs = _diffusers()
    notes = [] if theirs is not None else ["diffusers is not installed: not compared; pip install diffusers"]
    rows: list[Row] = []
    with tqdm(total=(len(MODES) + 4) * (rounds + 1), desc="overhead", unit="round") as bar:
        for name in MODES:
            rows += eager(name, theirs, rounds, calls, bar.update)
        rows += in_graph(theirs, rounds, max(calls // 5, 1), bar.update)
        rows += guards(rounds, max(calls // 2, 1), bar.update)
        rows += compiled_call(rounds, max(calls // 2, 1), bar.update)
        rows += state(rounds, calls, bar.update)
    return rows, notes


def eager(
    mode: str, theirs: Callable[..., Any] | None, rounds: int, calls: int, progress: Callable[[], object]
) -> list[Row]:
    """One eager call: ours, plain, Diffusers'."""
    x = torch.randn(SHAPE, requires_grad=mode == "grad")
    variants: dict[str, Callable[[], object]] = {
        "plain SDPA": lambda: plain(x, x, x),
        "compiled_attn.attention": lambda: ours(x, x, x),
        "compiled_attn.dispatch_attention_fn": lambda: compiled_attn.dispatch_attention_fn(x, x, x),
    }
    if theirs is not None:
        variants["diffusers dispatch_attention_fn"] = lambda: theirs(x, x, x)
    times = measure(variants, rounds, calls, MODES[mode], progress)
    rows = []
    for name in variants:
        over = times.over(name, "plain SDPA")
        row = Row(f"eager, {mode}", name, times.median(name), over)
        if name == "compiled_attn.attention" and mode == "inference_mode":
            row = row.with_goal("at most 4 us over plain SDPA", over <= 4.0)
        if name == "compiled_attn.dispatch_attention_fn" and theirs is not None:
            # the same signature on both sides
            slower = times.over(name, "diffusers dispatch_attention_fn")
            row = row.with_goal(f"no slower than diffusers ({slower:+.2f} us)", slower <= 0.0)
        rows.append(row)
    return rows


def _chain(attention: Callable[..., Any], length: int) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for _ in range(length):
            x = attention(x, x, x)
        return x

    return _own_code(run)


def _own_code(function: Any) -> Any:
    """A copy with a code object of its own: Dynamo keeps graphs by code object, and would search those of all
    variants on each call (and stop at the eighth)."""
    return types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _named(name: str) -> Callable[..., Any]:
    return lambda q, k, v: compiled_attn.attention(q, k, v, backend=name)


def _register_opaque() -> None:
    """An opaque backend over the kernel that plain SDPA runs here, to see what being an operator costs."""
    if OPAQUE in BACKENDS:
        return

    def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, None]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return out.transpose(1, 2), lse, None

    limits = Limits(("cpu",), (torch.float32,), causal=False, gqa=False, lse=False, gradient=False)
    register_backend(Backend(OPAQUE, "for the overhead benchmark", limits=(limits,), dense=Kernels(forward)))


def in_graph(theirs: Callable[..., Any] | None, rounds: int, calls: int, progress: Callable[[], object]) -> list[Row]:
    """One operator inside a graph of Inductor: what 40 more of them in a row add, each."""
    _register_opaque()
    x = torch.randn(SHAPE)
    attentions: dict[str, Callable[..., Any]] = {
        "aten": plain,
        "native": _named("native"),
        "an opaque operator, same kernel": _named(OPAQUE),
        "switch": _named("switch"),
    }
    if theirs is not None:
        attentions["diffusers"] = theirs
    variants: dict[str, Callable[[], object]] = {}
    with torch.no_grad():
        for name, attention in attentions.items():
            for length in (1, OPS):
                run = torch.compile(_chain(attention, length), fullgraph=True, dynamic=False)
                torch.testing.assert_close(run(x), _chain(plain, length)(x))
                variants[f"{name} {length}"] = lambda run=run: run(x)  # type: ignore[misc]
    times = measure(variants, rounds, calls, torch.no_grad, progress)
    slopes = {name: times.slope(f"{name} {OPS}", f"{name} 1", OPS - 1) for name in attentions}
    rows = []
    for name, slope in slopes.items():
        over = statistics.median(mine - aten for mine, aten in zip(slope, slopes["aten"], strict=True))
        row = Row("one op in a compiled graph", name, statistics.median(slope), over)
        if name == "native":
            row = row.with_goal("at most 3 us over aten", over <= 3.0)
        rows.append(row)
    return rows


class _Layer(nn.Module):
    def __init__(self, attention: Callable[..., Any]) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)


class _Layers(nn.Module):
    def __init__(self, attention: Callable[..., Any], number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(attention) for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _no_op(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A compiler whose code does nothing: what is left of a call is guards and wrapping."""
    result = [torch.zeros(SHAPE)]
    return lambda *args: result


def _compiled_layers(attention: Callable[..., Any], number: int, pin: str | None = None) -> Callable[[Tensor], Any]:
    own = type("Layers", (_Layers,), {"forward": _own_code(_Layers.forward)})
    model = own(attention, number)
    if pin is not None:
        compiled_attn.set_attention_backend(model, pin)
    return torch.compile(model, fullgraph=True, backend=_no_op, dynamic=False)


def guards(rounds: int, calls: int, progress: Callable[[], object], layers: int = LAYERS) -> list[Row]:
    """A compiled model of many layers whose graph does nothing: its guards, with our dispatch and without."""
    x = torch.randn(SHAPE)
    models = {
        "plain SDPA": _compiled_layers(plain, layers),
        "compiled_attn.attention": _compiled_layers(ours, layers),
        "backend= named": _compiled_layers(_named("native"), layers),
        "pinned": _compiled_layers(ours, layers, "native"),
    }
    what = f"guards of {layers} layers, no-op graph"
    times = _run_models(models, x, rounds, calls, progress)
    rows = []
    for name in models:
        over = times.over(name, "plain SDPA")
        row = Row(what, name, times.median(name), over)
        if name == "compiled_attn.attention":
            row = row.with_goal("under 10 us over plain SDPA", over < 10.0)
        rows.append(row)
    return rows


def _run_models(models: Any, x: Tensor, rounds: int, calls: int, progress: Callable[[], object]) -> Times:
    with torch.no_grad():
        for model in models.values():
            model(x)
    variants = {name: (lambda model=model: model(x)) for name, model in models.items()}
    return measure(variants, rounds, calls, torch.no_grad, progress)


def compiled_call(rounds: int, calls: int, progress: Callable[[], object]) -> list[Row]:
    """The same with one layer: what reading the state costs by itself, and after graphs of other backends exist."""
    x = torch.randn(SHAPE)
    many = _compiled_layers(ours, 1)
    with torch.no_grad():
        for name in ("_native_math", "_native_flash", "switch"):
            with compiled_attn.attention_backend(name):
                many(x)
    models = {
        "plain SDPA": _compiled_layers(plain, 1),
        "compiled_attn.attention": _compiled_layers(ours, 1),
        "compiled_attn.attention, 4 backends compiled": many,
    }
    times = _run_models(models, x, rounds, calls, progress)
    what = "guards of one layer, no-op graph"
    return [Row(what, name, times.median(name), times.over(name, "plain SDPA")) for name in models]


def _enter_and_leave() -> None:
    with compiled_attn.attention_backend("native"):
        pass


def state(rounds: int, calls: int, progress: Callable[[], object]) -> list[Row]:
    """Choosing a backend: context, default, pin; and `switch`, which chooses when it runs."""
    x = torch.randn(SHAPE)
    free, pinned = _Layer(ours), _Layer(ours)
    compiled_attn.set_attention_backend(pinned, "native")
    via_switch = _named("switch")
    default = compiled_attn.active_backend()
    variants: dict[str, Callable[[], object]] = {
        "context, enter and exit": _enter_and_leave,
        "set_default_backend": lambda: compiled_attn.set_default_backend(default),
        "module": lambda: free(x),
        "module, pinned": lambda: pinned(x),
        "attention, native": lambda: ours(x, x, x),
        "attention, switch": lambda: via_switch(x, x, x),
    }
    times = measure(variants, rounds, calls, torch.inference_mode, progress)
    bases = {"module, pinned": "module", "attention, switch": "attention, native"}
    return [
        Row("choosing, eager", name, times.median(name), times.over(name, bases[name]) if name in bases else None)
        for name in variants
    ]
