"""The main job: compile real diffusion transformers once, swap every backend, measure, export the one chosen.

``python -m compiled_attn demo`` or ``make demo``. Needs the extra ``demo`` (Diffusers and matplotlib).
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from compiled_attn import registry
from compiled_attn.integrations import diffusers as integration

from . import measure, models, report

_MODES = ("static", "switch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument(
        "--output", default="out/demo", metavar="DIR", help="where the results go (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=list(models.DEFAULT), metavar="NAME",
                        help=f"among {', '.join(models.NAMES)} (default: {', '.join(models.DEFAULT)})")  # fmt: skip
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: every backend that can run the calls")
    parser.add_argument("--quick", action="store_true", help="compile with aot_eager and build no package: seconds")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps per backend (default: 5)")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="times round the backends (default: 2)")
    parser.add_argument("--export", metavar="NAME",
                        help="backend to package (default: the fastest that ships without Python)")  # fmt: skip
    parser.add_argument("--diffusers-swap", action=argparse.BooleanOptionalAction,
                        help="measure Diffusers' own swap as well (default: on a GPU)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; 0, or 1 if anything was not as promised (2: it could not start)."""
    try:
        _check(arguments)
    except (ImportError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    if not _on_gpu(arguments):
        torch.set_num_threads(1)  # tiny models: a second thread that has to wait for its core costs 100 x what it saves
    try:
        with torch.no_grad():
            results = run(arguments)
    finally:
        torch.set_num_threads(threads)
    output = Path(arguments.output)
    _save(results, output)
    report.picture(results, output / "results.png")
    print(json.dumps(results, indent=1) if arguments.json else report.table(results))
    print(f"saved in {output}: results.json, results.png", file=sys.stderr)
    return 1 if results["failures"] else 0


def _save(results: dict[str, Any], output: Path) -> None:
    """Also after each stage: on a GPU the whole takes minutes, and an interrupted run keeps what it measured."""
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _check(arguments: argparse.Namespace) -> None:
    for name in [*(arguments.backends or []), *([arguments.export] if arguments.export else [])]:
        registry.find(name)
    if arguments.steps < 1 or arguments.rounds < 2:
        raise ValueError("--steps must be at least 1, --rounds at least 2 (the second shows what coming back costs)")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here")
    report.require_matplotlib()
    with integration.installed():
        pass


def _on_gpu(arguments: argparse.Namespace) -> bool:
    return arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything the demo measures, as a JSON-ready dictionary; ``failures`` is empty if all is as promised."""
    gpu = _on_gpu(arguments)
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    compiler = "aot_eager" if arguments.quick else "inductor"
    Path(arguments.output).mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "compiled_attn", *sys.argv[1:]]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": report.device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "compiler": compiler,
        "versions": report.versions(),
        "models": [],
        "diffusers_swap": [],
        "failures": [],
    }
    with tqdm(total=len(arguments.models), desc="prepare", unit="swap", disable=None) as bar:
        prepared = []
        for name in sorted(set(arguments.models), key=models.NAMES.index):
            bar.set_postfix_str(f"{name} in float64")
            prepared.append(measure.prepare(models.build(name, device, dtype, real=gpu), arguments.backends))
            bar.update()
        bar.reset(total=sum(len(_MODES) * arguments.rounds * len(one.backends) for one in prepared))
        bar.set_description("swap")
        for one in prepared:
            results["models"].append(_model(one, arguments, compiler, bar))
            results["failures"] += results["models"][-1].pop("failures")
            _save(results, Path(arguments.output))
        bar.set_description("package")
        results["package"] = _package(prepared[0], results, arguments)
        _save(results, Path(arguments.output))
        if gpu if arguments.diffusers_swap is None else arguments.diffusers_swap:
            bar.set_description("Diffusers' own swap")
            for one in prepared:
                rows = measure.diffusers_swap(one, one.backends, compiler, arguments.steps)
                results["diffusers_swap"].append({"model": one.subject.name, "rows": rows})
    return results


def _model(one: measure.Prepared, arguments: argparse.Namespace, compiler: str, bar: Any) -> dict[str, Any]:
    def progress(text: str) -> None:
        bar.set_postfix_str(text)
        bar.update()
        if bar.disable:  # no terminal: a line for each step, for whoever reads the log
            print(text, file=sys.stderr, flush=True)

    rows, found = [], []
    if not one.backends:
        found.append(f"{one.subject.name}: no backend can run its calls")
    for mode in _MODES:
        mine = measure.sweep(one, mode, compiler, arguments.steps, arguments.rounds, progress)
        found += measure.failures(one, mine)
        rows += report.rows_as_dicts(mine)
    return {
        "name": one.subject.name,
        "size": one.subject.size,
        "calls": [str(call) for call in one.calls],
        "yardstick": one.yardstick,
        "bound": one.bound,
        "visible": one.visible,
        "skipped": one.skipped,
        "rows": rows,
        "failures": list(dict.fromkeys(found)),
    }


def _package(one: measure.Prepared, results: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Export the first model (Flux, unless it was left out) with the chosen backend, load it, run it, compare."""
    if arguments.quick:
        return {"skipped": "none is built with --quick"}
    name = one.subject.name
    done = [row for row in results["models"][0]["rows"] if row["mode"] == "static" and row["failure"] is None]
    composite = [row for row in done if (dense := registry.backend_info(row["backend"]).dense) and dense.composite]
    candidates = sorted(composite or done, key=lambda row: row["step"])
    chosen = arguments.export or (candidates[0]["backend"] if candidates else None)
    package: dict[str, Any] = {"model": name, "backend": chosen}
    if chosen is None:
        results["failures"].append(f"{name} package: no backend ran, nothing to export")
        return package
    from compiled_attn import export

    path = Path(arguments.output) / f"{name}-{chosen}.pt2"
    subject = one.subject
    try:
        with integration.installed():
            _, package["seconds"] = measure.timed(
                lambda: export.package(subject.model, (), path, kwargs=subject.inputs, backend=chosen)
            )
        loaded = export.load(path)
        out, package["first"] = measure.timed(lambda: subject(loaded))
        package["step"] = measure.median_step(lambda: subject(loaded), arguments.steps)
    except Exception as error:  # goes into the report and the exit code
        results["failures"].append(f"{name} package with {chosen}: {type(error).__name__}: {error}")
        return package
    package.update(path=str(path), bytes=path.stat().st_size, manifest=export.manifest(path))
    package["error"] = measure.relative_error(out, one.reference)
    if not package["error"] <= one.bound:
        results["failures"].append(
            f"{name} package with {chosen}: error {package['error']:.3g} is over {one.bound:.3g}"
        )
    return package
