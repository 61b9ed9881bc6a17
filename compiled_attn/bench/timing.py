"""Time: microseconds of a Python call on a machine that is not quiet, milliseconds of a kernel.

:func:`measure` is for calls: variants take turns in short rounds, in an order drawn anew for each round, and are
compared within the same round: what disturbs the machine for longer than a round disturbs them all alike. Medians
over rounds are reported.
:func:`milliseconds` is for kernels, by CUDA events where there are any.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Microseconds per call of some variants: one number for each round, round by round."""

    rounds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds[name])

    def over(self, name: str, base: str) -> float:
        """Median over the rounds of how much longer ``name`` took than ``base`` did in the same round."""
        pairs = zip(self.rounds[name], self.rounds[base], strict=True)
        return statistics.median(mine - theirs for mine, theirs in pairs)

    def slope(self, many: str, one: str, steps: int) -> list[float]:
        """Microseconds per step between a call with ``steps`` more steps and one without, round by round."""
        pairs = zip(self.rounds[many], self.rounds[one], strict=True)
        return [(longer - shorter) / steps for longer, shorter in pairs]


def measure(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int,
    mode: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    progress: Callable[[], object] = lambda: None,
) -> Times:
    """Time every variant ``calls`` times in each of ``rounds`` rounds, after one round that is thrown away.

    ``mode`` makes the context that everything runs in, ``torch.no_grad`` say; ``progress`` is called after a round.
    """
    names = list(variants)
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in names}
    with mode():
        for number in range(rounds + 1):
            for name in order.sample(names, len(names)):
                run = variants[name]
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                elapsed = time.perf_counter() - start
                if number > 0:
                    times[name].append(elapsed / calls * 1e6)
            progress()
    return Times(times)


# cycles for each call, 1 ms or so: more than a host needs to make one
_HEAD_START = 2_000_000


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median of ``repeats`` calls after three to warm up; on a CUDA device the GPU's time, by events.

    The GPU sleeps before, so that it need not wait for the host between two events: calls of 0.4 ms were measured 1.4
    times as long on a machine whose host took 0.7 ms to make them.
    """
    for _ in range(3):
        run()
    if device.type == "cuda":
        torch.cuda._sleep(_HEAD_START * repeats)
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in pairs:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """TFLOP/s of a large square matrix product: what no attention kernel can exceed."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / milliseconds(lambda: a @ b, device, 10) / 1e9
