"""The demo's results as a table, as JSON and as a picture."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import platform
import textwrap
from pathlib import Path
from typing import Any

import torch

from .measure import Row

_HEADER = ("mode", "backend", "graphs", "first s", "return s", "step ms", "swap ms", "error", "x plain")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("compiled_attn", "diffusers", "triton", "flash-attn", "sageattention", "xformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def device_name(device: str) -> str:
    """What the demo ran on, as a person would call it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    return f"{processor} CPU, {torch.get_num_threads()} thread(s)"


def table(results: dict[str, Any]) -> str:
    """The results as text: a table for each model, the package, Diffusers' own swap, and the verdict."""
    lines = [f"{results['device']}, {results['dtype']}, torch {results['versions']['torch']}"]
    for model in results["models"]:
        lines += ["", f"{model['name']}: {model['size']}"]
        allowed = [f"{model['bound']:.2e}"]
        wider = {row["backend"]: row["bound"] for row in model["rows"] if row["bound"] > model["bound"]}
        allowed += [f"{bound:.2e} for {name}, which rounds to 8 bits" for name, bound in wider.items()]
        lines.append(f"plain PyTorch is off by {model['yardstick']:.2e} from float64; allowed: {', '.join(allowed)}")
        lines += _aligned([_HEADER, *(_cells(row, model["yardstick"]) for row in model["rows"])])
        for name, reasons in model["skipped"].items():
            lines.append(f"  skipped {name}: {'; '.join(reasons)}")
    lines += ["", *_package(results["package"])]
    for one in results["diffusers_swap"]:
        lines += ["", f"{one['model']}, swapped with Diffusers' own dispatcher:"]
        lines += _aligned(
            [
                ("backend", "graphs", "first s", "return s", "step ms", "error"),
                *(_diffusers_cells(row) for row in one["rows"]),
            ]
        )
    lines += ["", *_swaps(results)]
    if results["failures"]:
        lines += ["FAILED:", *(f"  {_first_lines(failure)}" for failure in results["failures"])]
    else:
        lines.append("all numbers right, no graph broke, nothing recompiled that should not")
    return "\n".join(lines)


def _first_lines(text: str) -> str:
    """Compilers' errors go over hundreds of lines; the rest is in the JSON."""
    lines = text.splitlines()
    return "\n    ".join([*lines[:6], "... (whole in results.json)"] if len(lines) > 7 else lines)


def _cells(row: dict[str, Any], yardstick: float) -> tuple[str, ...]:
    if row["failure"] is not None:
        return (row["mode"], row["backend"], *["-"] * 6, row["failure"].splitlines()[0])
    return (
        row["mode"], row["backend"], "+".join(map(str, row["graphs"])), f"{row['first']:.2f}",
        f"{row['returned']:.4f}", f"{1e3 * row['step']:.2f}", f"{1e3 * row['swap']:+.2f}", f"{row['error']:.2e}",
        f"{row['error'] / yardstick:.2f}" if yardstick > 0 else "-",
    )  # fmt: skip


def _diffusers_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "refused" in row:
        return (row["backend"], *["-"] * 4, row["refused"])
    return (
        row["backend"], f"{row['graphs_first']}+{row['graphs_returned']}", f"{row['first']:.2f}",
        f"{row['returned']:.4f}", f"{1e3 * row['step']:.2f}", f"{row['error']:.2e}",
    )  # fmt: skip


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] + [0]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _package(package: dict[str, Any]) -> list[str]:
    if "skipped" in package:
        return [f"package: {package['skipped']}"]
    lines = [f"package: {package['model']} with {package['backend']}"]
    if "error" in package:
        lines[0] += (
            f", built in {package['seconds']:.1f} s, {package['bytes'] / 1e6:.2f} MB; loaded and run: error "
            f"{package['error']:.2e}, step {1e3 * package['step']:.2f} ms"
        )
    return lines


def _swaps(results: dict[str, Any]) -> list[str]:
    costs = [
        row["swap"] for model in results["models"] for row in model["rows"]
        if row["mode"] == "switch" and row["failure"] is None
    ]  # fmt: skip
    return (
        [f"largest cost of a swap under switch, once warm: {1e3 * max(costs):.2f} ms (goal on a GPU: under 10)"]
        if costs
        else []
    )


def rows_as_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows for JSON: NaN (not measured) becomes None."""
    return [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(row).items()}
        for row in rows
    ]


def require_matplotlib() -> None:
    """Raises ImportError with the fix, before an hour of measuring rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the demo draws a picture with matplotlib: pip install 'compiled_attn[demo]'")


def picture(results: dict[str, Any], path: Path) -> None:
    """Step time and swap cost for each model and backend, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    figure, axes = plt.subplots(2, len(models), figsize=(1.5 + 4.2 * len(models), 7.5), squeeze=False)
    theirs = {one["model"]: one["rows"] for one in results["diffusers_swap"]}
    for column, model in enumerate(models):
        rows = [row for row in model["rows"] if row["failure"] is None]
        names = list(dict.fromkeys(row["backend"] for row in rows))
        steps, swaps = axes[0][column], axes[1][column]
        for offset, (mode, color) in enumerate((("static", "#4878a8"), ("switch", "#e0883a"))):
            mine = {row["backend"]: row for row in rows if row["mode"] == mode}
            places = [place + 0.27 * (offset - 1) for place, name in enumerate(names) if name in mine]
            chosen = [mine[name] for name in names if name in mine]
            steps.bar(places, [1e3 * row["step"] for row in chosen], 0.26, color=color, label=mode)
            _bars(swaps, places, [row["swap"] for row in chosen], color, f"{mode}, on return")
            if mode == "static":
                first = [name for name in names if name in mine]
                swaps.plot(places, [1e3 * mine[name]["first"] for name in first], "_", color=color, ms=14, mew=2,
                           label="static, first time (compiles)")  # fmt: skip
        other = {row["backend"]: row for row in theirs.get(model["name"], []) if "refused" not in row}
        if other:
            places = [place + 0.27 for place, name in enumerate(names) if name in other]
            chosen = [other[name] for name in names if name in other]
            steps.bar(places, [1e3 * row["step"] for row in chosen], 0.26, color="#999999", label="Diffusers")
            _bars(swaps, places, [row["returned"] - row["step"] for row in chosen], "#999999", "Diffusers, on return")
            swaps.plot(places, [1e3 * row["first"] for row in chosen], "_", color="#999999", ms=14, mew=2,
                       label="Diffusers, first time (compiles)")  # fmt: skip
        steps.set_title("\n".join([model["name"], *textwrap.wrap(model["size"], 42)]), fontsize=9)
        steps.set_ylabel("step, ms")
        swaps.set_ylabel("added by a swap, ms (log)")
        swaps.set_yscale("log")
        swaps.axhline(10.0, color="black", lw=0.8, ls=":")
        for axis in (steps, swaps):
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['device']}, {results['dtype']}, torch {results['versions']['torch']}", fontsize=10)
    handles = {
        label: handle for axis in axes[:, 0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    columns = min(len(handles), 1 + 2 * len(models))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=columns, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.03 * math.ceil(len(handles) / columns) + 0.01, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Any, places: list[float], seconds: list[float], color: str, label: str) -> None:
    # what a swap adds can be nothing, within noise: drawn as the floor of the log axis
    axis.bar(places, [max(1e3 * value, 0.01) for value in seconds], 0.26, color=color, label=label)
