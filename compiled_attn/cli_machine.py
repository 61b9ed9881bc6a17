"""``python -m compiled_attn machine``: what a result was measured on and with; belongs into every report."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
from typing import Any

import torch

from . import registry

_ALWAYS = ("torch", "triton", "diffusers", "transformers", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``machine``."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print the facts, one in a line."""
    facts = machine()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, fact in facts.items():
        if name == "versions":
            fact = ", ".join(f"{package} {version}" for package, version in fact.items())
        print(f"{name + ':':10}{fact}")
    return 0


def machine() -> dict[str, Any]:
    """Date, platform, processor, GPU and the versions of what is installed."""
    distributions = {
        package.distribution: None
        for name in registry.list_backends()
        for package in registry.backend_info(name).packages
    }
    versions = {"python": platform.python_version()}
    for distribution in (*_ALWAYS, *distributions):
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue  # what is not there has no version
    versions["torch"] = str(torch.__version__)  # with the build (+cu130), which a wheel's metadata may lack
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu": f"{_processor()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": versions,
    }


def provenance() -> dict[str, Any]:
    """What every kept result begins with: the command of this process, and :func:`machine`."""
    return {"command": shlex.join(["python", "-m", "compiled_attn", *sys.argv[1:]]), **machine()}


def processor_of(facts: dict[str, Any]) -> str:
    """What ran the work, for a table's heading: the GPU of :func:`machine`'s facts, or without one the CPU."""
    return facts["cpu"] if facts["gpu"] == "none" else facts["gpu"]  # type: ignore[no-any-return]


def save(result: dict[str, Any], file: str | None) -> None:
    """Write ``result`` to ``file`` as JSON, if one was asked for."""
    if file:
        pathlib.Path(file).write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
