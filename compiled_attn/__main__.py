"""``python -m compiled_attn list / explain / promises / demo / bench / machine``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

import torch

import compiled_attn

# Subcommands: module, what it does. A module has add_arguments(parser) and main(arguments) -> exit status, and is
# imported for its own subcommand only: the demo pulls in models, plots and compilers.
COMMANDS = {
    "list": ("cli_list", "every backend: whether it can run here, what it takes, how that was verified"),
    "explain": ("cli_explain", "which backends can run a call given by shapes, dtype, device and mask, and why not"),
    "machine": ("cli_machine", "versions and hardware, for a report"),
    "promises": ("promises", "what each backend keeps under torch.compile, export and AOTInductor, by trying"),
    "demo": ("demo", "compile real diffusion transformers once, swap every backend, export one"),
}
BENCHMARKS = {
    "kernels": ("bench.kernels", "every backend at the shapes of real models: error, time, ratio to native"),
    "ragged": ("bench.ragged", "our portable kernels: dense, packed and masked, beside PyTorch's own"),
    "libraries": ("bench.libraries", "our operators beside the kernel libraries' own calls, and what a mask costs"),
    "packages": ("bench.packages", "packages of real blocks: size, time to build and load, kernels that run"),
    "overhead": ("bench.overhead", "what our dispatch costs beside plain SDPA and Diffusers' dispatcher"),
}


def version() -> str:
    """Our version and torch's."""
    try:
        own = importlib.metadata.version("compiled_attn")
    except importlib.metadata.PackageNotFoundError:
        own = "(not installed: run from a checkout)"
    return f"compiled_attn {own}, torch {torch.__version__}, from {compiled_attn.__path__[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    given = _joined(list(sys.argv[1:] if argv is None else argv))
    words = [word for word in given if not word.startswith("-")]
    parser = argparse.ArgumentParser(prog="python -m compiled_attn", description=compiled_attn.__doc__)
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        _add(commands, name, module, summary, words[:1] == [name])
    benchmarks = commands.add_parser("bench", help="benchmarks").add_subparsers(
        dest="benchmark", required=True, metavar="benchmark"
    )
    for name, (module, summary) in BENCHMARKS.items():
        _add(benchmarks, name, module, summary, words[:2] == ["bench", name])
    arguments = parser.parse_args(given)
    return arguments.run(arguments)


def _add(commands: argparse._SubParsersAction, name: str, module: str, summary: str, chosen: bool) -> None:
    parser = commands.add_parser(name, help=summary, description=summary)
    if chosen:
        command = importlib.import_module(f"compiled_attn.{module}")
        command.add_arguments(parser)
        parser.set_defaults(run=command.main)


def _joined(argv: list[str]) -> list[str]:
    """``--window -1,0`` as ``--window=-1,0``: argparse takes "-1,0" for an option."""
    result: list[str] = []
    for word in argv:
        if result and result[-1] == "--window" and word.startswith("-"):
            result[-1] += "=" + word
        else:
            result.append(word)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
