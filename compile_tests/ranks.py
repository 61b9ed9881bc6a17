"""Processes that talk over gloo and run functions of the tests: one start for a file, one answer for a test."""

from __future__ import annotations

import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import compiled_attn

_PATIENCE = 240.0  # seconds; a rank that died would let the others wait for good


class Ranks:
    """``size`` processes of one group. ``run(function, *args)`` runs ``function(*args)`` on each of them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.tasks = [context.Queue() for _ in range(size)]
        self.answers = context.Queue()
        arguments = (size, f"file://{folder / 'rendezvous'}", self.answers)
        self.processes = [
            context.Process(target=_serve, args=(rank, tasks, *arguments), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        """Fails with the traceback of the first rank whose ``function`` raised."""
        for tasks in self.tasks:
            tasks.put((function, args))
        failed = []
        for _ in self.processes:
            try:
                failed.append(self.answers.get(timeout=_PATIENCE))
            except queue.Empty:
                raise AssertionError(f"a rank gave no answer in {_PATIENCE:.0f} s") from None
        for text in failed:
            assert text is None, text

    def close(self) -> None:
        for tasks in self.tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()


def _serve(rank: int, tasks: Any, size: int, meeting_point: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=size)
    while (task := tasks.get()) is not None:
        function, args = task
        torch.manual_seed(0)
        torch._dynamo.reset()
        try:
            function(*args)
        except Exception:
            answers.put(f"on rank {rank}:\n{traceback.format_exc()}")
        else:
            answers.put(None)
        compiled_attn.set_default_backend("native")
    dist.destroy_process_group()
