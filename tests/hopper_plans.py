"""Runs the kernels that plan for the Hopper kernel in Triton's interpreter; prints, as JSON, what was wrong with each.

A program of its own, started with TRITON_INTERPRET=1 by ``test_triton_hopper.py``.
"""

from __future__ import annotations

import json
import sys

import torch

from compiled_attn.ops._hopper_plan import RECORD, gather_keys, key_blocks, tile_plan

LENGTHS = {
    "one": ([0, 300], [0, 700], 0),
    "uneven": ([0, 300, 317, 817, 946], [0, 70, 103, 103, 743], 0),
    "empty_inside": ([0, 0, 129, 129, 130], [0, 4, 4, 9, 20], 0),
    "rows_behind": ([0, 64, 193], [0, 64, 193], 130),
    "no_keys": ([0, 5, 9], [0, 0, 7], 0),
    "nothing": ([0, 0, 0], [0, 0, 0], 0),
    "many": ([3 * index for index in range(40)], [7 * (index % 5) + 40 * index for index in range(40)], 1),
}
KEEPS = {
    "all": lambda: torch.ones(2, 300, dtype=torch.bool),
    "none": lambda: torch.zeros(2, 300, dtype=torch.bool),
    "hole": lambda: _holes(2, 900, [(0, 300, 411), (1, 0, 5), (1, 850, 900)]),
    "random": lambda: torch.rand(3, 333) > 0.4,
    "tenth": lambda: (torch.arange(700) % 10 != 3).expand(2, -1),
    "both": lambda: torch.stack([torch.ones(500, dtype=torch.bool), torch.rand(500) > 0.5]),
    "strided": lambda: (torch.rand(200, 2) > 0.1).t(),
    "one_key": lambda: torch.arange(130)[None] == 129,
}
CASES = [f"plan {name} {rows}" for name in LENGTHS for rows in (128, 192)]
CASES += [f"keys {name} {block}" for name in KEEPS for block in (64, 128)]
BLOCK = 128  # keys that key_blocks looks at in one step


def _holes(batch: int, length: int, holes: list[tuple[int, int, int]]) -> torch.Tensor:
    keep = torch.ones(batch, length, dtype=torch.bool)
    for index, begin, end in holes:
        keep[index, begin:end] = False
    return keep


def plan(name: str, rows: int) -> str:
    """Every tile once, those with the most keys first, and tiles without rows behind them."""
    starts_q, starts_k, rest = LENGTHS[name]
    batch, total_q, total_k = len(starts_q) - 1, starts_q[-1] + rest, starts_k[-1] + rest
    records = total_q // rows + batch + 1
    found = torch.full((records, RECORD), -7, dtype=torch.int32)
    tensors = (torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))
    tile_plan[(batch + 1,)](*tensors, found, batch, total_q, total_k, records, BLOCK_Q=rows, BLOCK=16)
    sequences = [
        (starts_k[index + 1] - starts_k[index], starts_q[index], starts_q[index + 1] - starts_q[index], starts_k[index])
        for index in range(batch)
    ]
    sequences.append((0, starts_q[-1], rest, starts_k[-1]))
    expected: list[list[int]] = []
    for keys, q_begin, q_rows, k_begin in sorted(sequences, key=lambda one: -one[0]):
        first, tiles = len(expected), -(-q_rows // rows)
        expected += [[first, tiles, q_begin, q_rows, k_begin, keys]] * tiles
    if len(expected) > records:
        return f"{records} records are not enough for {len(expected)} tiles"
    expected += [[index, 1, 0, 0, 0, 0] for index in range(len(expected), records)]
    return "" if found[:, :6].tolist() == expected else f"{found[:, :6].tolist()} is not {expected}"


def keys(name: str, block: int) -> str:
    """Every real key once: in a whole block that stays in place, or among the packed ones."""
    torch.manual_seed(0)
    keep = KEEPS[name]()
    batch, length = keep.shape
    room = max(length // block, 1)
    order = torch.full((batch, length), -7, dtype=torch.int32)
    count = torch.full((batch, 2), -7, dtype=torch.int32)
    whole = torch.full((batch, room), -7, dtype=torch.int32)
    key_blocks[(batch,)](keep, order, count, whole, *keep.stride(), length, room, BLOCK_K=block, BLOCK=BLOCK)
    key, value = torch.randn(batch, length, 2, 8), torch.randn(batch, length, 2, 8)
    copies = [torch.full_like(key, -7.0) for _ in range(2)]
    strides = [stride // 8 for one in (key, value) for stride in one.stride()[:2]]
    gather_keys[(-(-length // 8), batch, 2)](
        key, value, *copies, order, count, *strides, length,
        WIDTH=16, UNIT=8, ROWS=8, COLUMNS=8,
    )  # fmt: skip
    for index in range(batch):
        real = keep[index].nonzero().flatten()
        full, rest = count[index].tolist()
        inside = [number for number in range(length // block) if keep[index, number * block :][:block].all()]
        if whole[index].tolist() != inside + [-7] * (room - len(inside)) or full != len(inside):
            return f"whole blocks {whole[index].tolist()}, there are {inside}"
        outside = [place for place in real.tolist() if place // block not in inside]
        if order[index].tolist() != outside + [-7] * (length - len(outside)) or rest != len(outside):
            return f"{order[index].tolist()} to pack, there are {outside}"
        for copy, tensor in zip(copies, (key, value), strict=True):
            if not torch.equal(copy[index, :rest], tensor[index, outside]) or not (copy[index, rest:] == -7.0).all():
                return f"sequence {index}: other keys were packed"
    return ""


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        what, name, size = case.split()
        found[case] = (plan if what == "plan" else keys)(name, int(size))
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
