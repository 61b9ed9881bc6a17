"""Threads under different contexts through one compiled function: each gets its own backend, every time.

Compiled with fullgraph=False: concurrent fullgraph calls raise "found no compiled frames" now and then in torch 2.13,
whose frame counter is the process's (fixed by pytorch PR #185138).
"""

from __future__ import annotations

import threading

import pytest
import torch
from graphs import Counter
from probes import PROBES, factor

import compiled_attn
from compiled_attn import attention, attention_backend


def hammer(call, backends, calls) -> list[tuple[str, float]]:
    """``calls`` calls in each thread, one thread for each backend; the wrong ones."""
    wrong: list[tuple[str, float]] = []
    failed: list[BaseException] = []
    x = torch.ones(1, 1, 1, 1)

    def work(name: str) -> None:
        try:
            with torch.inference_mode():
                for _ in range(calls // 20):
                    with attention_backend(name):
                        for _ in range(20):
                            seen = call(x).item()
                            if seen != factor(name):
                                wrong.append((name, seen))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    return wrong


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_static_backends(warm):
    counter = Counter()
    call = compiled_attn.compile(lambda x: attention(x, x, x), backend=counter)
    names = PROBES[1:3]
    if warm:
        with torch.inference_mode():
            compiled_attn.precompile(call, names, torch.ones(1, 1, 1, 1))
    assert hammer(call, names, 5_000) == []
    assert {tuple(one) for one in counter.operators()} == {(name,) for name in names}


def test_switch_in_one_graph():
    call = torch.compile(lambda x: attention(x, x, x, backend="switch"), backend=Counter())
    with torch.inference_mode():
        call(torch.ones(1, 1, 1, 1))
    assert hammer(call, PROBES[1:3], 5_000) == []


@pytest.mark.slow
def test_a_hundred_thousand_compiled_calls():
    call = compiled_attn.compile(lambda x: attention(x, x, x), backend="eager")
    with torch.inference_mode():
        compiled_attn.precompile(call, PROBES[1:3], torch.ones(1, 1, 1, 1))
    assert hammer(call, PROBES[1:3], 50_000) == []


def test_a_new_default_reaches_running_threads():
    call = compiled_attn.compile(lambda x: attention(x, x, x), backend="eager")
    barrier, go, seen = threading.Barrier(3), threading.Event(), []
    x = torch.ones(1, 1, 1, 1)

    def work() -> None:
        before = call(x).item()
        barrier.wait()
        go.wait()
        seen.append((before, call(x).item()))

    call(x)
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait()
    compiled_attn.set_default_backend(PROBES[2])
    go.set()
    for thread in threads:
        thread.join()
    assert seen == [(1.0, 3.0), (1.0, 3.0)]
