"""``python -m compiled_attn promises``: what each backend keeps under torch.compile, export and AOTInductor, by trying.

Each backend gets a process of its own; each cell is one small model, compiled or exported for real, run, and compared
with float64. A cell works, is refused with a reason, or has failed: then the exit status is 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import cli_table, reference, registry, watch
from .cli_list import absences, fetched
from .cli_machine import provenance, save
from .compilation import compile
from .export import load, package
from .operators import NAMESPACE
from .state import SWITCH, attention_backend, set_attention_backend

BEGIN = "<!-- promises:begin -->"
END = "<!-- promises:end -->"
HEADS, WIDTH, LENGTHS = 4, 64, (96, 131)
# What our own refusals say. The class is not enough: PyTorch raises NotImplementedError where a kernel is missing.
_REFUSALS = ("cannot run this call:", "cannot run this program:", ", cannot:", "but these operators run Python:")
WORKS, REFUSED, FAILED = "works", "refused", "failed"


class Refusal(Exception):
    """What cannot be asked of this backend, or here."""


class Block(nn.Module):
    """Attention of x with itself, and one pointwise operation before and after it for compilers to fuse."""

    def forward(self, x: Tensor) -> Tensor:
        from .dispatch import attention  # what a user's module would call

        q, k, v = (x * factor for factor in (1.0, 0.5, 2.0))
        return attention(q, k, v) + x


class Subject:
    """One backend on one device: inputs, what is right, and a compiler that counts its graphs."""

    def __init__(self, backend: str, device: str) -> None:
        info = registry.backend_info(backend)
        self.limits = next(limits for limits in info.limits if device in limits.devices)
        self.backend, self.device, self.traced = backend, device, info.traced is not None
        assert info.dense is not None
        self.kernels = info.dense
        self.operator = f"{NAMESPACE}::{info.operator_names()[0]}"
        self.inductor = watch.Inductor()

    def model(self, backend: str | None = None) -> nn.Module:
        model = Block().eval()
        set_attention_backend(model, backend or self.backend)
        return model

    def input(self, length: int = LENGTHS[0], seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, length, HEADS, WIDTH, generator=generator)
        return x.to(self.limits.dtypes[0]).to(self.device)

    def compiled(self, model: nn.Module, **options: Any) -> Any:
        torch._dynamo.reset()
        self.inductor = watch.Inductor()
        return compile(model, fullgraph=True, backend=self.inductor, **options)

    def check_graphs(self, number: int, operator: str | None = None) -> None:
        graphs = self.inductor.graphs
        assert len(graphs) == number, f"{len(graphs)} graphs, expected {number}"
        if not self.traced:
            _check_operator(graphs[-1], operator or self.operator)

    def check_lowered(self, direction: str, eager: set[str]) -> None:
        """Of one graph, ``direction``, that Inductor lowered: it has this backend's attention, and no other.

        That is our operator; of a composite one what ``eager`` code runs; of one that is taken in its Triton kernels;
        of a traced one its higher-order operator.
        """
        found = getattr(self.inductor, direction)
        assert len(found) == 1, f"{len(found)} {direction} graphs, expected 1"
        operators = found[0]
        ours = self.operator if direction == "forward" else f"{self.operator}_backward"
        if self.kernels.composite:
            right = operators == eager
        elif self.kernels.inlined:
            # on a CPU it is plain PyTorch
            right = all("triton_kernel" in name for name in operators) and bool(operators) == (self.device == "cuda")
        else:
            right = operators == {ours} or (self.traced and any(not name.count("::") for name in operators))
        wanted = sorted(eager) if self.kernels.composite else "Triton kernels" if self.kernels.inlined else ours
        assert right, f"{direction} has the operators {sorted(operators)}, expected {wanted}"

    def check(self, out: Tensor, x: Tensor) -> None:
        """Error of ``out`` at most twice plain PyTorch's, plus rounding; or what ``Limits.rounding`` allows."""
        _require_right("output", out, _right(x), _plain(x), self.limits.rounding)


def _right(x: Tensor) -> Tensor:
    q, k, v = ((x * factor).double() for factor in (1.0, 0.5, 2.0))
    return reference.attention(q, k, v)[0] + x.double()


def _plain(x: Tensor) -> Tensor:
    return reference.plain(*(x * factor for factor in (1.0, 0.5, 2.0)))[0] + x


def _require_right(what: str, actual: Tensor, right: Tensor, plain: Tensor, rounding: float = 0.0) -> None:
    wrong = reference.judge(actual, plain, right, rounding).wrong
    assert not wrong, f"{what} is {wrong}"


def _check_operator(graph: torch.fx.GraphModule, name: str) -> None:
    targets = {str(node.target).rpartition(".")[0].replace(".", "::", 1) for node in graph.graph.nodes}
    assert name in targets, f"{name} is not in the graph"


# ----------------------------------------------------------------------------------------------------------- the cells


def _forward(subject: Subject) -> None:
    x = subject.input()
    call = subject.compiled(subject.model())
    with torch.no_grad():
        subject.check(call(x), x)
    subject.check_graphs(1)


def _training(subject: Subject) -> None:
    x = subject.input().requires_grad_()
    flow = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x.dtype).to(x.device)
    model = subject.model()
    forward, backward = watch.Eager(), watch.Eager()
    if subject.kernels.composite:
        with forward:
            out = model(x)
        with backward:
            torch.autograd.grad(out, x, flow)
    (gradient,) = torch.autograd.grad(subject.compiled(model)(x), x, flow)
    subject.check_graphs(1)
    subject.check_lowered("forward", forward.operators)
    subject.check_lowered("backward", backward.operators)
    double = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad(_right(double), double, flow.double())
    (plain,) = torch.autograd.grad(_plain(x), x, flow)
    _require_right("gradient", gradient, right, plain)


def _dynamic(subject: Subject) -> None:
    call = subject.compiled(subject.model(), dynamic=True)
    with torch.no_grad():
        for length in (*LENGTHS, 200):
            x = subject.input(length)
            subject.check(call(x), x)
    # on a GPU Inductor guards on which side of 128 FlexAttention's queries are, LENGTHS[0] and the others
    subject.check_graphs(2 if subject.traced and subject.device == "cuda" else 1)


def _reduce_overhead(subject: Subject) -> None:
    if subject.device != "cuda":
        raise Refusal("CUDA graphs need a CUDA device")
    torch._dynamo.reset()
    inductor = torch._dynamo.utils.counters["inductor"]
    skipped = inductor["cudagraph_skips"]
    call = compile(subject.model(), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):  # warm-up, recording, replays on other data
            x = subject.input(seed=seed)
            torch.compiler.cudagraph_mark_step_begin()
            subject.check(call(x).clone(), x)
    skipped = inductor["cudagraph_skips"] - skipped
    assert skipped == 0, f"Inductor captured no CUDA graph, {skipped} times"


def _switch(subject: Subject) -> None:
    x = subject.input()
    call = subject.compiled(subject.model(SWITCH))
    with torch.no_grad(), watch.backends_that_run("native", subject.backend) as ran:
        for name in ("native", subject.backend, "native", subject.backend):
            ran.clear()
            with attention_backend(name):
                subject.check(call(x), x)
            # one that delegates is noted before what it delegates to
            assert ran[:1] == [name], f"{' and '.join(ran) or 'neither'} ran where {name} was active"
    if not subject.traced:
        subject.check_graphs(1, f"{NAMESPACE}::{SWITCH}")


def _export(strict: bool) -> Callable[[Subject], None]:
    def cell(subject: Subject) -> None:
        x = subject.input()
        length = torch.export.Dim("length", min=2, max=4096)
        # a pinned forward takes (*args): strict export names the dimensions by the model's own signature
        model = Block().eval()
        with torch.no_grad(), attention_backend(subject.backend):
            program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}}, strict=strict)
            if not subject.traced:
                _check_operator(program.graph_module, subject.operator)
            longer = subject.input(LENGTHS[1])
            subject.check(program.module()(longer), longer)

    return cell


def _packaged(subject: Subject, path: pathlib.Path, **options: Any) -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    with torch.no_grad():
        package(
            Block().eval(), (subject.input(),), path, backend=subject.backend, dynamic_shapes={"x": {1: length}},
            **options,
        )  # fmt: skip


def _aoti(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.pt2"
        _packaged(subject, path)
        run = load(path)
        with torch.no_grad():
            for length in LENGTHS:
                x = subject.input(length)
                subject.check(run(x), x)


_FOREIGN = """
import sys, torch
folder = sys.argv[1]
run = torch._inductor.aoti_load_package(folder + "/model.pt2")
out = run(torch.load(folder + "/x.pt"))
assert "compiled_attn" not in sys.modules
torch.save(out.cpu(), folder + "/out.pt")
"""


def _aoti_alone(subject: Subject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _packaged(subject, pathlib.Path(folder) / "model.pt2", python_free=True)
        x = subject.input(LENGTHS[1])
        torch.save(x, f"{folder}/x.pt")
        done = subprocess.run(
            [sys.executable, "-c", _FOREIGN, folder], capture_output=True, text=True, timeout=300, cwd=folder,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-500:]
        subject.check(torch.load(f"{folder}/out.pt").to(x.device), x)


CELLS: dict[str, Callable[[Subject], None]] = {
    "forward": _forward,
    "training": _training,
    "dynamic shapes": _dynamic,
    "reduce-overhead": _reduce_overhead,
    "switch": _switch,
    "export": _export(False),
    "export, strict": _export(True),
    "AOTI": _aoti,
    "AOTI without Python": _aoti_alone,
}


# ---------------------------------------------------------------------------------------------------------- the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``promises``."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that can run here")
    parser.add_argument("--jobs", type=int, default=min(8, max(1, (os.cpu_count() or 2) // 2)), metavar="N",
                        help="backends tried at a time (default: %(default)s)")  # fmt: skip
    parser.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="for one backend")
    parser.add_argument("--json", metavar="FILE", help="write results, versions and machine to FILE")
    parser.add_argument("--markdown", nargs="+", metavar="FILE", help="try nothing: print the table of earlier FILEs")
    parser.add_argument("--write", metavar="FILE", help=f"with --markdown: put it between {BEGIN} and {END} of FILE")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)


def main(arguments: argparse.Namespace) -> int:
    """Try everything, or print what was tried; exit status 1 if a cell failed."""
    if arguments.worker:
        for found in try_all(arguments.worker, arguments.device):
            print("\n" + json.dumps(found), flush=True)  # whatever a library printed last without an end of line
        return 0
    if arguments.markdown:
        table = markdown([json.loads(pathlib.Path(name).read_text()) for name in arguments.markdown])
        if arguments.write is None:
            print(table)
            return 0
        return cli_table.put_between(pathlib.Path(arguments.write), BEGIN, END, table)
    names = arguments.backends or [name for name in registry.list_backends() if name != SWITCH]
    rows: dict[str, dict[str, dict[str, str]]] = {}
    about = {**provenance(), "device": arguments.device}
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        waiting = {pool.submit(_in_a_process, name, arguments): name for name in names}
        bar = tqdm(concurrent.futures.as_completed(waiting), total=len(names), desc="promises", unit="backend")
        for done in bar:
            rows[waiting[done]] = done.result()
            # kept as they come: a run that is stopped has tried something
            save({**about, "rows": {name: rows[name] for name in names if name in rows}}, arguments.json)
    headers = ("backend", *CELLS)
    print(cli_table.text(headers, [(name, *(row[cell]["result"] for cell in CELLS)) for name, row in rows.items()]))
    wrong = [(name, cell, row[cell]["reason"]) for name, row in rows.items() for cell in CELLS
             if row[cell]["result"] == FAILED]  # fmt: skip
    for name, cell, reason in wrong:
        print(f"FAILED: {name}, {cell}: {reason}")
    return 1 if wrong else 0


def _in_a_process(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    if not arguments.backends:
        missing = absences(name) or ([] if fetched(name) else ["not fetched yet; name it to fetch and try it"])
        if missing:
            return {cell: {"result": "not run", "reason": "; ".join(missing)} for cell in CELLS}
    command = [sys.executable, "-m", "compiled_attn", "promises", "--worker", name, "--device", arguments.device]
    try:
        done = subprocess.run(command, capture_output=True, timeout=arguments.timeout, check=False)
        said = done.stdout
        reason = (
            f"exit status {done.returncode}: {done.stderr.decode(errors='replace')[-500:]}" if done.returncode else ""
        )
    except subprocess.TimeoutExpired as stopped:
        said, reason = stopped.stdout or b"", f"not done after {arguments.timeout} s"
    return _collected(said.decode(errors="replace"), reason)


def _collected(said: str, reason: str) -> dict[str, dict[str, str]]:
    """The cells that a worker told of. ``reason`` is why it ended early, or "": the cell that it was at has failed, the
    last one if it had told of all, and those behind were not run.
    """
    found: dict[str, dict[str, str]] = {}
    for line in said.splitlines():
        with contextlib.suppress(ValueError):  # half a line
            told = json.loads(line) if line.startswith("{") else {}
            found.update((cell, told[cell]) for cell in CELLS if cell in told)
    untold = [cell for cell in CELLS if cell not in found]
    if reason or untold:
        reason = reason or "its process ended without a word"
        at = untold[0] if untold else list(CELLS)[-1]
        found[at] = {"result": FAILED, "reason": reason}
        behind = {"result": "not run", "reason": f"the process ended before: {reason}"}
        found.update((cell, behind) for cell in untold[1:])
    return {cell: found[cell] for cell in CELLS}


def try_all(name: str, device: str) -> Iterator[dict[str, dict[str, str]]]:
    """The cells of backend ``name``, tried in this process, each as it is done."""
    limits = registry.backend_info(name).limits
    if not any(device in one.devices for one in limits):
        reason = f"runs on {'/'.join(sorted({place for one in limits for place in one.devices}))}"
        yield {cell: {"result": "not run", "reason": reason} for cell in CELLS}
        return
    registry.usable(name)
    subject = Subject(name, device)
    for title, cell in CELLS.items():
        try:
            cell(subject)
            yield {title: {"result": WORKS, "reason": ""}}
        except Exception as error:
            yield {title: _told(error)}


def _told(error: BaseException) -> dict[str, str]:
    """A refusal, wherever it is in what a compiler wrapped round it, or a failure."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, Refusal):
            return {"result": REFUSED, "reason": text}
        for mark in _REFUSALS:
            if mark in text:
                return {"result": REFUSED, "reason": text[text.index(mark) :][:500]}
        seen = seen.__cause__ or seen.__context__
    return {"result": FAILED, "reason": f"{type(error).__name__}: {error}"[:500]}


def _first_reason(text: str) -> str:
    """The first reason of a report, or all of a plain message; Dynamo quotes both, with their line ends as text."""
    lines = [line.strip() for line in text.replace("\\n", "\n").split("\n") if line.strip()]
    reason = lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]
    return "its operator runs Python" if reason.startswith(f"{NAMESPACE}::") else reason


def markdown(results: list[dict[str, Any]]) -> str:
    """One table of all results: "works", or the number of the reason below it."""
    notes: list[str] = []
    rows = []
    for result in results:
        for name, cells in result["rows"].items():
            if all(cells[cell]["result"] == "not run" for cell in CELLS):
                continue
            rows.append((f"`{name}`", result["device"], *(_cell(cells[cell], notes) for cell in CELLS)))
    table = cli_table.markdown(("backend", "on", *CELLS), rows)
    said = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    made = "\n".join(f"- {_where(result)}: `{result['command']}`" for result in results)
    return f"{table}\n\n{said}\n\n{made}"


def _cell(cell: dict[str, str], notes: list[str]) -> str:
    if cell["result"] == WORKS:
        return WORKS
    reason = _first_reason(cell["reason"])
    if reason not in notes:
        notes.append(reason)
    return f"{cell['result']} ({notes.index(reason) + 1})"


def _where(result: dict[str, Any]) -> str:
    what = result["gpu"] if result["device"] == "cuda" else "CPU"
    return f"{what}, torch {result['versions']['torch']}"
