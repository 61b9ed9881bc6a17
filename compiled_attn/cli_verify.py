"""``python -m compiled_attn list --verify``: every backend that can run here, run once and compared with float64."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import cli_table, reference, registry
from .cli_list import absences, device_here, fetched
from .dispatch import attention, attention_with_lse, varlen_attention, varlen_attention_with_lse
from .questions import why_not
from .spec import Limits, names

# Neither multiples of a block nor of each other; in the packed call, an empty sequence.
Q_LENGTH, K_LENGTH, HEADS = 100, 130, 4
STARTS_Q, STARTS_K = (0, 37, 37, 100), (0, 5, 64, 130)
_HEADERS = ("backend", "call", "device", "dtype", "out", "plain", "lse", "plain", "gradients", "plain", "")
_ACCELERATORS = ("cuda", "xpu", "mps", "npu", "xla", "cpu")


@dataclass(frozen=True)
class Outcome:
    """One backend's run of one call. ``errors`` and ``plain`` are the largest differences from float64.

    ``wrong`` says what is, "" if nothing; ``note`` why there was no run.
    """

    backend: str
    varlen: bool
    device: str = ""
    dtype: str = ""
    errors: tuple[float | None, ...] = (None, None, None)  # out, lse, gradients
    plain: tuple[float | None, ...] = (None, None, None)
    wrong: str = ""
    note: str = ""


def main(wanted: list[str]) -> int:
    """Print a table of errors; 1 if a backend is wrong, 2 for a name that is none. Without names: all that run here."""
    for name in wanted:
        if name not in registry.BACKENDS:
            print(registry.unknown(name), file=sys.stderr)
            return 2
    outcomes = list(outcomes_of(wanted))
    rows = [_row(outcome) for outcome in outcomes]
    print("Largest differences from float64, and those of plain PyTorch in the same dtype:\n")
    print(cli_table.text(_HEADERS, rows))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    ran = sum(1 for outcome in outcomes if not outcome.note)
    print(f"\n{ran} runs, {len(wrong)} wrong")
    return 1 if wrong else 0


def outcomes_of(wanted: list[str]) -> Iterator[Outcome]:
    """Run the backends called ``wanted``, or all that can run here without a download."""
    for name in wanted or registry.list_backends():
        backend = registry.backend_info(name)
        missing = absences(name)
        if missing:
            if wanted:
                yield Outcome(name, False, wrong="; ".join(missing), note="cannot run here")
            continue
        if not wanted and not fetched(name):
            yield Outcome(name, False, note=f"not fetched yet; list --verify {name} fetches and runs it")
            continue
        for varlen, limits in ((False, backend.limits), (True, backend.varlen_limits)):
            if _entries(limits):
                yield run(name, varlen)


def run(name: str, varlen: bool) -> Outcome:
    """Run backend ``name`` once, with the first dtype of its limits for the best device here."""
    backend = registry.backend_info(name)
    limits, device = _entries(backend.varlen_limits if varlen else backend.limits)[0]
    dtype = limits.dtypes[0]
    outcome = Outcome(name, varlen, device, names((dtype,)))
    try:
        registry.usable(name)
        return _compared(outcome, limits, *_tensors(limits, device, dtype, varlen))
    except Exception as error:  # whatever a kernel raises is what the table shall say
        return replace(outcome, wrong=f"{type(error).__name__}: {error}")


def _entries(limits: tuple[Limits, ...]) -> list[tuple[Limits, str]]:
    """Those that a device of this machine is in, and the device; the best device first."""
    return [
        (one, device) for device in _ACCELERATORS for one in limits if device in one.devices and device_here(device)
    ]


def _tensors(limits: Limits, device: str, dtype: torch.dtype, varlen: bool) -> tuple[list[Tensor], dict[str, Any]]:
    multiple = limits.head_dim_multiple
    width = max(-(-limits.min_head_dim // multiple), 64 // multiple, 1) * multiple
    if limits.max_head_dim is not None:
        width = min(width, limits.max_head_dim)
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, HEADS, width) if varlen else (2, length, HEADS, width) for length in (Q_LENGTH, K_LENGTH)]
    tensors = [torch.randn(shapes[at], generator=generator).to(dtype).to(device) for at in (0, 1, 1)]
    starts = {"cu_seqlens_q": STARTS_Q, "cu_seqlens_k": STARTS_K} if varlen else {}
    return tensors, {at: torch.tensor(of, dtype=torch.int32, device=device) for at, of in starts.items()}


def _compared(outcome: Outcome, limits: Limits, tensors: list[Tensor], starts: dict[str, Tensor]) -> Outcome:
    asked = [tensor.detach().requires_grad_(limits.gradient) for tensor in tensors]
    refused = why_not(outcome.backend, *asked)
    if refused:
        return replace(outcome, note="refuses this call: " + "; ".join(refused))
    call: Any = varlen_attention if outcome.varlen else attention
    with_lse = not why_not(outcome.backend, *asked, return_lse=True)
    if with_lse:
        call = varlen_attention_with_lse if outcome.varlen else attention_with_lse

    def kernel(query: Tensor, key: Tensor, value: Tensor, **starts: Tensor) -> tuple[Tensor, Tensor | None]:
        result = call(query, key, value, **starts, backend=outcome.backend)
        return result if with_lse else (result, None)

    exact = reference.varlen_attention if outcome.varlen else reference.attention
    high = [tensor.cpu().double() for tensor in tensors]  # not every device has float64
    results = [
        _measured(kernel, tensors, starts, limits.gradient),
        _measured(_plain_packed if outcome.varlen else reference.plain, tensors, starts, limits.gradient),
        _measured(exact, high, {name: of.cpu() for name, of in starts.items()}, limits.gradient),
    ]
    wrong = []
    errors: list[float | None] = []
    plain: list[float | None] = []
    for what, actual, yardstick, right in zip(("out", "lse", "gradients"), *results, strict=True):
        if actual is None or yardstick is None or right is None:
            errors.append(None)
            plain.append(None)
            continue
        found = [reference.judge(*three, limits.rounding) for three in zip(actual, yardstick, right, strict=True)]
        errors.append(max(verdict.error for verdict in found))
        plain.append(max(verdict.plain for verdict in found))
        if any(verdict.wrong for verdict in found):
            wrong.append(f"{what} wrong")
    return replace(outcome, errors=tuple(errors), plain=tuple(plain), wrong=", ".join(wrong))


def _measured(call: Any, tensors: list[Tensor], starts: dict[str, Tensor], gradient: bool) -> list[Any]:
    """[(out,), (lse,) or None, (dq, dk, dv) or None] of ``call``; the gradient that flows in is the same for all."""
    inputs = [tensor.detach().requires_grad_(gradient) for tensor in tensors]
    with torch.set_grad_enabled(gradient):
        out, lse = call(*inputs, **starts)
    gradients = None
    if gradient:
        flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        gradients = torch.autograd.grad(out, inputs, flow.to(out.device, out.dtype))
    return [(out.detach(),), None if lse is None else (lse.detach(),), gradients]


def _plain_packed(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    starts = list(zip(STARTS_Q, STARTS_Q[1:], STARTS_K, STARTS_K[1:], strict=False))
    results = [reference.plain(query[a:b], key[c:d], value[c:d]) for a, b, c, d in starts]
    return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results], -1)


def _row(outcome: Outcome) -> tuple[str, ...]:
    call = "" if outcome.note else "varlen" if outcome.varlen else "dense"
    cells = [
        "-" if value is None else f"{value:.1e}"
        for pair in zip(outcome.errors, outcome.plain, strict=True)
        for value in pair
    ]
    if outcome.note or not any(value is not None for value in outcome.errors):
        cells = [""] * len(cells)
    said = "; ".join(part for part in (outcome.note, outcome.wrong) if part)
    return (outcome.backend, call, outcome.device, outcome.dtype, *cells, said or "right")
