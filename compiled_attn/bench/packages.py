"""Packages of Flux blocks at their real width: one for each backend, built, loaded, run and watched.

For each: seconds to build and to load, bytes, milliseconds a step beside the compiled model's, the error against
float64, whether the numbers equal the eager model's, and which attention kernels the GPU ran, as the profiler names
them. Needs the packages of compiled_attn[demo].
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import compiled_attn
from compiled_attn import export
from compiled_attn.integrations import diffusers as integration

from .. import cli_table
from ..cli_machine import processor_of, provenance, save
from ..demo import measure, models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``python -m compiled_attn bench packages``."""
    parser.add_argument("--json", metavar="FILE", help="write the numbers, versions and machine to FILE too")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all that can run the model's calls")
    parser.add_argument("--program", metavar="FILE", help="examples/cpp, built: runs each package without Python too")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each package (default: 10)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: argparse.Namespace) -> int:
    """Build and run every package; exit status 1 if one is wrong."""
    gpu = arguments.device != "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    prepared = measure.prepare(models.build("flux", arguments.device, dtype, real=gpu), arguments.backends)
    for name, reasons in prepared.skipped.items():
        print(f"{name}: {reasons}", file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (bar := tqdm(prepared.backends, desc="packages", unit="package")):
            bar.set_postfix_str(name)
            rows.append(_package(prepared, name, pathlib.Path(folder) / f"{name}.pt2", arguments))
    _own_kernels(rows)
    result = {
        "benchmark": "packages", **provenance(), "model": prepared.subject.size,
        "bound": prepared.bound, "rows": rows,
    }  # fmt: skip
    save(result, arguments.json)
    _print(result)
    wrong = [row["backend"] for row in rows if not row["right"]]
    if wrong:
        print(f"WRONG: {', '.join(wrong)}")
    return 1 if wrong or not rows else 0


def _print(result: dict[str, Any]) -> None:
    print(f"{processor_of(result)}, {result['model']}; error allowed {result['bound']:.2e}")
    cells = [
        (
            row["backend"], f"{row['build_s']:.0f}", f"{row['bytes'] / 1e6:.0f}", f"{row['load_s']:.2f}",
            f"{row['step_ms']:.2f}", f"{row['compiled_step_ms']:.2f}", f"{row['error']:.1e}",
            f"{row['from_eager']:.1e}", "yes" if row["python_free"] else "no",
            {None: "", True: "equal", False: "WRONG"}[row["program_equal"]],
        )
        for row in result["rows"]
    ]  # fmt: skip
    heads = ("backend", "build s", "MB", "load s", "step ms", "compiled ms", "error", "from eager", "without Python",
             "C++ program")  # fmt: skip
    print(cli_table.text(heads, cells))
    for row in result["rows"]:
        for kernel in row["own_kernels"]:
            print(f"{row['backend']}: {kernel[:130]}")


def _package(one: measure.Prepared, name: str, path: pathlib.Path, arguments: argparse.Namespace) -> dict[str, Any]:
    subject = one.subject
    torch.compiler.reset()
    with torch.no_grad(), integration.installed(), compiled_attn.attention_backend(name):
        eager = subject()
        compiled = torch.compile(subject.model, fullgraph=True)
        subject(compiled)
        compiled_step = measure.median_step(lambda: subject(compiled), arguments.steps)
        _, build = measure.timed(lambda: export.package(subject.model, (), path, kwargs=subject.inputs, backend=name))
    loaded, load = measure.timed(lambda: export.load(path))
    out = subject(loaded)
    step = measure.median_step(lambda: subject(loaded), arguments.steps)
    manifest = export.manifest(path)
    program = None
    if arguments.program and manifest["python_free"]:
        program = _program(arguments.program, path, subject, manifest, out)
    error = measure.relative_error(out, one.reference)
    return {
        "backend": name,
        "operators": manifest["operators"],
        "python_free": manifest["python_free"],
        "build_s": build,
        "bytes": path.stat().st_size,
        "load_s": load,
        "step_ms": step * 1e3,
        "compiled_step_ms": compiled_step * 1e3,
        "error": error,
        "from_eager": measure.relative_error(out, eager),
        "right": error <= one.bound and program is not False,
        "program_equal": program,
        "kernels": _kernels(subject, loaded),
    }


def _kernels(subject: models.Subject, loaded: Any) -> dict[str, int]:
    """What one step ran on the GPU, or on the CPU: name, times."""
    gpu = next(subject.model.parameters()).is_cuda
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as watch:
        subject(loaded)
        if gpu:
            torch.cuda.synchronize()
    return {event.key: event.count for event in watch.key_averages()}


def _own_kernels(rows: list[dict[str, Any]]) -> None:
    """Of each package's kernels, those that no other package ran: they are its attention."""
    ran = [row.pop("kernels") for row in rows]
    for number, row in enumerate(rows):
        others = {name for other, kernels in enumerate(ran) if other != number for name in kernels}
        row["own_kernels"] = {name: count for name, count in ran[number].items() if name not in others}


def _program(program: str, path: pathlib.Path, subject: models.Subject, manifest: Any, out: Tensor) -> bool:
    """Whether the C++ program's output equals that of the package loaded here."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder) / "inputs.pt", pathlib.Path(folder) / "outputs.pt"
        values = [subject.inputs[one["name"]] for one in manifest["inputs"]]
        torch.save([value for value in values if isinstance(value, Tensor)], given)
        done = subprocess.run([program, str(path), str(given), str(made)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(f"{program}: {done.stderr.strip()}", file=sys.stderr)
            return False
        return bool(torch.equal(torch.load(made)[0].to(out.device), out))
