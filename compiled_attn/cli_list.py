"""``python -m compiled_attn list``: what every backend can do, and whether it can run here."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import shutil
import sys
from typing import Any

import torch

from . import cli_table, registry
from .registry import Backend
from .spec import LOWER_RIGHT, UPPER_LEFT, Limits, asked_capability, capabilities_of, dotted, fits_capability, names

BEGIN = "<!-- backends:begin -->"
END = "<!-- backends:end -->"
_VERIFIED = {"contract": "contract-tested, not run on hardware"}
_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
_NARROW = 12  # characters in a column, where a terminal cannot show the full table
_HEADERS = (
    "backend", "calls", "devices", "dtypes", "head_dim", "masks", "causal, Sq != Sk", "also", "gradient", "verified",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``list``."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument(
        "--verify", nargs="*", metavar="NAME", help="run every backend that can run here (or NAME) against float64"
    )
    form.add_argument("--markdown", action="store_true", help="print the capabilities, the same on every machine")
    parser.add_argument(
        "--write", metavar="FILE", help=f"with --markdown: put the table between {BEGIN} and {END} of FILE"
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the list in the form asked for."""
    if arguments.write is not None:
        if not arguments.markdown:
            print("--write needs --markdown", file=sys.stderr)
            return 2
        return cli_table.put_between(pathlib.Path(arguments.write), BEGIN, END, markdown())
    if arguments.verify is not None:
        from . import cli_verify  # it needs the dispatcher, which nothing else here does

        return cli_verify.main(arguments.verify)
    if arguments.markdown:
        print(markdown())
    elif arguments.json:
        print(json.dumps(records(), indent=2))
    else:
        print(terminal())
    return 0


def device_here(device: str) -> bool:
    """Whether this process can use devices of type ``device``."""
    if device in ("cpu", "meta"):
        return True
    if device in ("cuda", "xpu", "mps"):
        return bool(getattr(torch, device).is_available())
    if device == "npu":
        return importlib.util.find_spec("torch_npu") is not None and bool(torch.get_device_module("npu").is_available())
    # an XLA device is one of torch_xla's making: asking it would start its runtime
    return device == "xla" and importlib.util.find_spec("torch_xla") is not None


def missing_devices(backend: Backend) -> list[str]:
    """Why no device of this machine is one that ``backend`` runs on; empty if there is one."""
    found: list[str] = []
    for limits in (*backend.limits, *backend.varlen_limits):
        here = [device for device in limits.devices if device != "meta" and device_here(device)]
        if not here:
            wanted = names(device for device in limits.devices if device != "meta")
            reason = f"runs on {wanted}; this machine has none"
        elif here == ["cuda"]:
            have = sorted({torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())})
            if any(fits_capability(limits, one) for one in have):
                return []
            reason = f"{asked_capability(limits)}; this machine has {', '.join(map(dotted, have))}"
        else:
            return []
        if reason not in found:
            found.append(reason)
    return found


def absences(name: str) -> list[str]:
    """Every reason why backend ``name`` cannot run on this machine, in this process; empty when it can."""
    backend = registry.backend_info(name)
    # what speaks of the device itself (triton_hopper) has said it
    said = backend.available is not None and backend.available()
    return registry.unavailable(name) + ([] if said else missing_devices(backend))


def fetched(name: str) -> bool:
    """Whether what backend ``name`` needs is on this machine, without a download."""
    return all(one.at_hand() for one in registry.backend_info(name).packages if hasattr(one, "at_hand"))


def records() -> list[dict[str, Any]]:
    """Everything ``list --json`` prints: one record for each backend."""
    return [_record(name) for name in registry.list_backends()]


def _record(name: str) -> dict[str, Any]:
    backend = registry.backend_info(name)
    reasons = absences(name)
    return {
        "name": name,
        "family": backend.family,
        "summary": backend.summary,
        "available": not reasons,
        "reasons": reasons,
        "packages": [
            {field: getattr(package, field) for field in ("module", "distribution", "minimum", "install")}
            for package in backend.packages
        ],
        "verified": _verified(backend),
        "dense": [_plain(limits) for limits in backend.limits],
        "varlen": [_plain(limits) for limits in backend.varlen_limits],
    }


def _plain(limits: Limits) -> dict[str, Any]:
    """Limits as JSON: dtypes by name, rules by their first line."""
    result: dict[str, Any] = {field.name: getattr(limits, field.name) for field in dataclasses.fields(limits)}
    result["dtypes"] = [str(dtype).removeprefix("torch.") for dtype in limits.dtypes]
    result["also"] = [(rule.__doc__ or rule.__name__).strip().split("\n")[0] for rule in limits.also]
    return result


def _verified(backend: Backend) -> str:
    ways = {limits.verified for limits in (*backend.limits, *backend.varlen_limits)}
    return "/".join(sorted(ways, reverse=True))


def terminal() -> str:
    """The table for a terminal: what runs here first, then why the rest does not, then all capabilities."""
    here, elsewhere = [], []
    for name in registry.list_backends():
        backend, reasons = registry.backend_info(name), absences(name)
        if reasons:
            elsewhere.append((name, "\n".join(reasons)))
        else:
            here.append((name, backend.family, backend.summary))
    parts = [f"{len(here)} backends can run here:\n", cli_table.text(("backend", "family", "what"), here)]
    if elsewhere:
        parts += [f"\n{len(elsewhere)} cannot:\n", cli_table.text(("backend", "why not, and the fix"), elsewhere)]
    parts += ["\nWhat each takes (python -m compiled_attn explain asks about one call):\n"]
    table = cli_table.text(_HEADERS, capabilities())
    # 170 columns and more; into a pipe it goes as it is
    if max(map(len, table.split("\n"))) > shutil.get_terminal_size((1000, 24)).columns:
        headers, *rows = cli_table.narrow([_HEADERS, *capabilities()], _NARROW)
        table = cli_table.text(headers, rows)
    return "\n".join([*parts, table])


def markdown() -> str:
    """The README's table: the same on every machine."""
    return cli_table.markdown(_HEADERS, [(f"`{row[0]}`" if row[0] else "", *row[1:]) for row in capabilities()])


def capabilities() -> list[tuple[str, ...]]:
    """Rows for the table of limits: one for each backend, call and group of devices; equal ones are joined."""
    rows: list[tuple[str, ...]] = []
    for name in registry.list_backends():
        backend = registry.backend_info(name)
        cells: dict[tuple[str, ...], list[str]] = {}
        for call, limits in (("dense", backend.limits), ("varlen", backend.varlen_limits)):
            for one in limits:
                cells.setdefault(_cells(one), []).append(call)
        for number, (rest, calls) in enumerate(cells.items()):
            rows.append((name if number == 0 else "", ", ".join(calls), *rest))
    return rows


def _cells(limits: Limits) -> tuple[str, ...]:
    devices = ", ".join(device for device in limits.devices if device != "meta")
    served = capabilities_of(limits)
    if served:
        devices += f" {served}"
    also = [
        word
        for word, has in (
            ("gqa", limits.gqa),
            ("window", limits.window),
            ("dropout", limits.dropout),
            ("lse", limits.lse),
            ("Dv != D", limits.value_head_dim),
        )
        if has
    ]
    return (
        devices,
        ", ".join(_SHORT.get(names((dtype,)), names((dtype,))) for dtype in limits.dtypes),
        _head_dim(limits),
        ", ".join(kind for kind in limits.masks if kind != "none") or "-",
        _causal(limits),
        ", ".join(also) or "-",
        _gradient(limits),
        _VERIFIED.get(limits.verified, limits.verified),
    )


def _head_dim(limits: Limits) -> str:
    if limits.max_head_dim is None:
        text = "any" if limits.min_head_dim <= 1 else f"{limits.min_head_dim}+"
    elif limits.min_head_dim == limits.max_head_dim:
        text = str(limits.max_head_dim)
    else:
        text = f"{limits.min_head_dim}-{limits.max_head_dim}"
    return text if limits.head_dim_multiple <= 1 else f"{text}, multiples of {limits.head_dim_multiple}"


def _causal(limits: Limits) -> str:
    if not limits.causal:
        return "-"
    if set(limits.alignments) == {UPPER_LEFT, LOWER_RIGHT}:
        return "both"
    return ", ".join(limits.alignments) or "Sq == Sk only"


def _gradient(limits: Limits) -> str:
    if not limits.gradient:
        return "-"
    text = "yes, mask too" if limits.mask_gradient else "yes"
    if limits.deterministic == "always":
        return text + "; deterministic"
    return text + ("; deterministic on demand" if limits.deterministic == "global" else "")
