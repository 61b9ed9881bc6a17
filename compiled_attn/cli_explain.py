"""``python -m compiled_attn explain``: which backends can run a call that is given in words.

No tensor is made and no device is touched, so a laptop can ask about an H100.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import torch

from . import cli_table, registry
from .cli_list import absences, device_here
from .spec import ALIGNMENTS, MASK_KINDS, UPPER_LEFT, Call, mistakes, report

_WHERE = ("cpu", "cuda", "xpu", "mps", "npu", "xla", "meta")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``explain``."""
    parser.add_argument(
        "--query", type=_shape, required=True, metavar="B,S,H,D", help="shape; T,H,D asks about varlen_attention"
    )
    parser.add_argument("--key", type=_shape, metavar="B,S,H,D", help="shape of key (default: that of query)")
    parser.add_argument("--value", type=_shape, metavar="B,S,H,D", help="shape of value (default: that of key)")
    parser.add_argument("--dtype", type=_dtype, default=torch.bfloat16, help="default: bfloat16")
    parser.add_argument("--device", choices=_WHERE, help="default: cuda if this machine has it, else cpu")
    parser.add_argument(
        "--capability", type=_capability, metavar="9.0", help="of the CUDA device (default: that of this machine's)"
    )
    parser.add_argument("--mask", choices=MASK_KINDS, default="none", help="kind of mask (default: none)")
    parser.add_argument("--mask-gradient", action="store_true", help="the float mask requires a gradient")
    parser.add_argument("--causal", action="store_true", help="is_causal=True")
    parser.add_argument("--alignment", choices=ALIGNMENTS, default=UPPER_LEFT, help="causal_alignment")
    parser.add_argument("--gqa", action="store_true", help="enable_gqa=True")
    parser.add_argument("--window", type=_window, metavar="L,R", help="window_size, -1 = unlimited")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="dropout_p")
    parser.add_argument("--lse", action="store_true", help="attention_with_lse")
    parser.add_argument("--gradient", action="store_true", help="query, key or value requires a gradient")
    parser.add_argument("--deterministic", action="store_true", help="deterministic=True")
    parser.add_argument(
        "--deterministic-algorithms", action="store_true", help="under torch.use_deterministic_algorithms(True)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print the table; 2 if the call makes no sense for any backend."""
    call = call_of(arguments)
    wrong = mistakes(call)
    if wrong:
        print(report("attention call makes no sense:", wrong), file=sys.stderr)
        return 2
    verdicts = [_verdict(name, call) for name in registry.list_backends()]
    fastest = _fastest(call, verdicts)
    if arguments.json:
        print(json.dumps({"call": _plain(call), "backends": verdicts, "fastest": fastest}, indent=2))
    else:
        rows = [(one["name"], one["verdict"], "\n".join(one["reasons"] + one["absences"])) for one in verdicts]
        print(cli_table.text(("backend", "can it", "why not"), rows))
        print('\n"not here": the backend serves this call, but not in this process, for the reasons given')
        if fastest is not None:
            print(f"measured fastest for such a call, of those that need no kernel library: {fastest}")
    return 0


def call_of(arguments: argparse.Namespace) -> Call:
    """The :class:`~compiled_attn.spec.Call` that the arguments describe."""
    query = arguments.query
    key = query if arguments.key is None else arguments.key
    device = arguments.device
    if device is None:
        device = "cuda" if device_here("cuda") else "cpu"
    capability = arguments.capability
    if capability is None and device == "cuda" and device_here("cuda"):
        capability = torch.cuda.get_device_capability()
    return Call(
        query=query,
        key=key,
        value=key if arguments.value is None else arguments.value,
        dtypes=(arguments.dtype,) * 3,
        devices=(device,) * 3,
        capability=capability,
        mask=arguments.mask,
        mask_gradient=arguments.mask_gradient,
        causal=arguments.causal,
        alignment=arguments.alignment,
        gqa=arguments.gqa,
        window=None if arguments.window == (-1, -1) else arguments.window,
        dropout_p=arguments.dropout,
        deterministic=arguments.deterministic or arguments.deterministic_algorithms,
        globally_deterministic=arguments.deterministic_algorithms,
        lse=arguments.lse,
        gradient=arguments.gradient or arguments.mask_gradient,
        varlen=len(query) == 3,
    )


def _verdict(name: str, call: Call) -> dict[str, Any]:
    """What backend ``name`` says: ``reasons`` speak of the call, ``absences`` of this machine."""
    reasons, missing = registry.refusal(registry.find(name), call), absences(name)
    if not missing and call.devices[0] != "meta" and not device_here(call.devices[0]):
        missing = [f"this machine has no {call.devices[0]} device"]
    verdict = "no" if reasons else "not here" if missing else "yes"
    return {"name": name, "verdict": verdict, "reasons": reasons, "absences": missing}


def _fastest(call: Call, verdicts: list[dict[str, Any]]) -> str | None:
    """The backend that says so of itself, among those that can run the call, here or elsewhere."""
    for one in verdicts:
        backend = registry.backend_info(one["name"])
        if not one["reasons"] and backend.fastest is not None and backend.packed == call.varlen and _proven(backend):
            if backend.fastest(call):
                return backend.name
    return None


def _proven(backend: registry.Backend) -> bool:
    """Whether its kernels, as they are, ran on the hardware."""
    return all(limits.verified == "hardware" for limits in (*backend.limits, *backend.varlen_limits))


def _plain(call: Call) -> dict[str, Any]:
    result = dataclasses.asdict(call)
    result["dtypes"] = [str(dtype).removeprefix("torch.") for dtype in call.dtypes]
    return result


def _integers(text: str, separator: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(separator))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None


def _shape(text: str) -> tuple[int, ...]:
    what = "a shape like 1,4608,24,128"
    sizes = _integers(text, ",", what)
    if min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}: sizes are not negative")
    return sizes


def _window(text: str) -> tuple[int, int]:
    sizes = _integers(text, ",", "a window like 128,0")
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not (left, right) like 128,0")
    return sizes[0], sizes[1]


def _capability(text: str) -> tuple[int, int]:
    numbers = _integers(text, ".", "a compute capability like 9.0")
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability like 9.0")
    return numbers[0], numbers[1]


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype of torch, like bfloat16")
    return dtype
