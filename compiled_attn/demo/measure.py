"""What the demo measures: graphs, seconds, errors. Nothing is printed here."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import compiled_attn
from compiled_attn import registry
from compiled_attn.integrations import diffusers as integration
from compiled_attn.spec import Call
from compiled_attn.state import SWITCH

from .models import Subject

REFERENCE = "_native_math"
Progress = Callable[[str], None]
T = TypeVar("T")


@dataclass
class Row:
    """One backend in one model and one mode ("static" or "switch"). Seconds, unless the name says otherwise."""

    model: str
    mode: str
    backend: str
    graphs: list[int] = field(default_factory=list)  # new graphs, round by round
    operators: dict[str, int] = field(default_factory=dict)  # attention operators in the graph compiled for it
    first: float = math.nan  # first output, compilation included
    returned: float = math.nan  # first output when it comes round again
    step: float = math.nan  # median; of the fastest round
    swap: float = math.nan  # returned - the median of the steps right after: what swapping to it cost
    error: float = math.nan  # relative to the float64 model, the larger of all rounds
    bound: float = math.nan  # what the error may be
    failure: str | None = None


@dataclass
class Prepared:
    """A subject with everything known before the first compilation."""

    subject: Subject
    calls: list[Call]
    backends: list[str]
    skipped: dict[str, list[str]]
    reference: Tensor
    yardstick: float  # error of Diffusers' own path, plain scaled_dot_product_attention, in the same dtype
    bound: float  # 2 x yardstick + rounding
    visible: dict[str, float]  # what errors of known size would do to the output: the bound must lie below
    blur: dict[float, float]  # Limits.rounding to what errors of that size in every call do to the output


class Counter:
    """A compiler backend that counts the graphs it is given and the attention operators in the last one."""

    def __init__(self, name: str) -> None:
        self.compile = torch._dynamo.lookup_backend(name)
        self.graphs = 0
        self.operators: dict[str, int] = {}

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        self.graphs += 1
        self.operators = operators(graph)
        return self.compile(graph, inputs, **options)


def operators(graph: torch.fx.GraphModule) -> dict[str, int]:
    """Attention operators of a graph and how often each is called."""
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        if getattr(node.target, "namespace", None) == "compiled_attn":
            name = node.target._schema.name.removeprefix("compiled_attn::")
            found[name] = found.get(name, 0) + 1
        elif node.op == "call_function" and "flex_attention" in str(node.target):
            found["flex_attention"] = found.get("flex_attention", 0) + 1
    return found


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - reference| / |reference|, Euclidean norms in float64; NaN counts as infinite."""
    error = float((out.double() - reference).norm() / reference.norm())
    return math.inf if math.isnan(error) else error


@torch.no_grad()  # or a step at Flux's width in float64 keeps 130 GB for a backward that never comes
def prepare(subject: Subject, wanted: list[str] | None) -> Prepared:
    """Record the calls of one eager forward, find the backends that can serve them, compute what is right."""
    with integration.recorded() as calls:
        plain = subject()
    backends, skipped = [], {}
    for name in registry.list_backends():
        if name == SWITCH or (wanted is not None and name not in wanted):
            continue
        found = why_not(name, calls)
        if found:
            skipped[name] = found
        else:
            backends.append(name)
    double = subject.double()
    with integration.installed(), compiled_attn.attention_backend(REFERENCE):
        reference = double()
        visible = {"scale doubled": relative_error(_with_call(double, _doubled_scale), reference)}
        if any(call.mask != "none" for call in calls):
            visible["mask dropped"] = relative_error(_with_call(double, _without_mask), reference)
        blur = {
            rounding: relative_error(_with_call(double, _blurred(rounding)), reference)
            for rounding in {_rounding(name) for name in backends} - {0.0}
        }
    yardstick = relative_error(plain, reference)
    bound = 2 * yardstick + torch.finfo(plain.dtype).eps
    return Prepared(subject, calls, backends, skipped, reference, yardstick, bound, visible, blur)


def why_not(name: str, calls: list[Call]) -> list[str]:
    """Every reason why backend ``name`` cannot serve these calls once they are compiled."""
    entry = registry.find(name)
    found = dict.fromkeys(registry.unavailable(name))
    for call in calls:
        found.update(dict.fromkeys(registry.refusal(entry, integration.as_compiled(call))))
    return list(found)


def _with_call(subject: Subject, wrap: Callable[..., Any]) -> Tensor:
    with integration.wrapped(wrap):
        return subject()


def _doubled_scale(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(query: Tensor, *args: Any, scale: float | None = None, **options: Any) -> Any:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return attention(query, *args, scale=2.0 * scale, **options)

    return wrong


def _without_mask(attention: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Any:
        return attention(query, key, value, **options)

    return wrong


def _blurred(rounding: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(attention: Callable[..., Any]) -> Callable[..., Any]:
        def noisy(*args: Any, **options: Any) -> Any:
            out = attention(*args, **options)
            return out + rounding * out.square().mean().sqrt() * torch.randn_like(out)

        return noisy

    return wrap


def _rounding(backend: str) -> float:
    return max((limits.rounding for limits in registry.backend_info(backend).limits), default=0.0)


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """The result and the seconds until it was there, device included."""
    _synchronize()
    start = time.perf_counter()
    out = function()
    _synchronize()
    return out, time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def median_step(function: Callable[[], Tensor], steps: int) -> float:
    """Median seconds of ``steps`` calls, after one that is not counted."""
    function()
    return statistics.median(timed(function)[1] for _ in range(steps))


@contextlib.contextmanager
def _bound_to_switch(subject: Subject) -> Iterator[None]:
    compiled_attn.set_attention_backend(subject.model, SWITCH)
    try:
        yield
    finally:
        compiled_attn.reset_attention_backend(subject.model)


def sweep(prepared: Prepared, mode: str, compiler: str, steps: int, rounds: int, progress: Progress) -> list[Row]:
    """Compile the model once and go through its backends ``rounds`` times; what fails is noted in its row."""
    subject = prepared.subject
    rows = {name: Row(subject.name, mode, name, bound=_bound(prepared, name)) for name in prepared.backends}
    if mode == SWITCH:
        for name in prepared.backends:
            if not registry.backend_info(name).switchable:
                del rows[name]
                prepared.skipped.setdefault(f"{name} under switch", ["cannot be chosen at run time"])
    counter = Counter(compiler)
    model = compiled_attn.compile(subject.model, fullgraph=True, backend=counter)
    with integration.installed(), _bound_to_switch(subject) if mode == SWITCH else contextlib.nullcontext():
        for turn in range(rounds):
            for name, row in rows.items():
                progress(f"{subject.name} {mode} {name}")
                if row.failure is None:
                    try:
                        _one(prepared, row, model, counter, steps, turn)
                    except Exception as error:  # goes into the table and the exit code
                        row.failure = f"{type(error).__name__}: {error}"
    return list(rows.values())


def _one(prepared: Prepared, row: Row, model: Any, counter: Counter, steps: int, turn: int) -> None:
    subject, graphs = prepared.subject, counter.graphs
    gc.collect()  # compilers leave much garbage; its collection is not the cost of a swap
    with compiled_attn.attention_backend(row.backend):
        out, seconds = timed(lambda: subject(model))
        step = median_step(lambda: subject(model), steps)
    error = relative_error(out, prepared.reference)
    if turn == 0:
        row.first, row.step, row.error, row.operators = seconds, step, error, counter.operators
    else:
        # against the steps of the same moment: other work on the machine would otherwise count as cost of the swap
        row.returned, row.swap = seconds, seconds - step
        row.step, row.error = min(row.step, step), max(row.error, error)
    row.graphs.append(counter.graphs - graphs)


def failures(prepared: Prepared, rows: list[Row]) -> list[str]:
    """Everything that is not as promised, in words."""
    found = []
    name = prepared.subject.name
    for bound in sorted({row.bound for row in rows} | {prepared.bound}):
        for what, size in prepared.visible.items():
            if not size > bound:
                found.append(f"{name}: an error as large as '{what}' ({size:.2g}) would pass the bound {bound:.2g}")
    for position, row in enumerate(rows):
        where = f"{row.model} {row.mode} {row.backend}"
        if row.failure is not None:
            found.append(f"{where}: {row.failure}")
            continue
        if not row.error <= row.bound:
            found.append(
                f"{where}: error {row.error:.3g} is over {row.bound:.3g} = 2 x {prepared.yardstick:.3g} + rounding"
            )
        first = 1 if row.mode == "static" or position == 0 else 0
        expected = [first] + [0] * (len(row.graphs) - 1)
        if row.graphs != expected:
            found.append(f"{where}: new graphs {row.graphs} in the rounds, expected {expected}")
        strangers = [name for name in row.operators if not _expected(name, row)]
        if strangers or not row.operators:
            found.append(f"{where}: the graph calls {row.operators or 'no attention operator'}")
    return found


def _bound(prepared: Prepared, backend: str) -> float:
    """What ``backend`` may be off by: kernels that round to 8 bits add what such noise was seen to do.

    The two errors know nothing of each other: their squares add.
    """
    rounding = _rounding(backend)
    return math.hypot(prepared.bound, prepared.blur[rounding]) if rounding else prepared.bound


def _expected(operator: str, row: Row) -> bool:
    """Whether a row's graph may hold ``operator``: its backend's own, its helpers, or what it traces instead."""
    if row.mode == SWITCH:
        return operator == SWITCH
    if registry.backend_info(row.backend).traced is not None and operator == "flex_attention":
        return True
    return operator == row.backend or operator.startswith(f"{row.backend}_")


def diffusers_swap(prepared: Prepared, names: list[str], compiler: str, steps: int) -> list[dict[str, Any]]:
    """The same swaps with Diffusers' own dispatcher and setter, on a compiled copy of the model."""
    from diffusers.models import attention_dispatch
    from diffusers.utils import logging

    known = {member.value for member in attention_dispatch.AttentionBackendName}
    active = attention_dispatch._AttentionBackendRegistry._active_backend
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    torch._dynamo.reset()  # our graphs would count against torch's recompile limit of 8 for the same code
    inner = copy.deepcopy(prepared.subject.model)
    counter = Counter(compiler)
    model = torch.compile(inner, fullgraph=True, backend=counter)
    rows: dict[str, dict[str, Any]] = {name: {"backend": name} for name in names if name in known}
    try:
        for turn in ("first", "returned"):
            for name, row in rows.items():
                if "refused" in row:
                    continue
                graphs = counter.graphs
                try:
                    inner.set_attention_backend(name)  # type: ignore[operator]
                    out, row[turn] = timed(lambda: prepared.subject(model))
                except Exception as error:  # theirs to refuse; it stands in the table
                    row["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                row[f"graphs_{turn}"] = counter.graphs - graphs
                row["step"] = median_step(lambda: prepared.subject(model), steps)
                row["error"] = relative_error(out, prepared.reference)
    finally:
        attention_dispatch._AttentionBackendRegistry.set_active_backend(active)
        logging.set_verbosity(verbosity)
    return list(rows.values())
