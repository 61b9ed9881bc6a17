"""Tile sizes of the Triton kernels for each architecture: a table, so that nothing is timed when a model runs.

AOTInductor would time candidates on integer tensors of zeros, which make packed sequences of length 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Rows of queries and keys that one step works on, depth of the load pipeline, warps of a program."""

    block_q: int
    block_k: int
    stages: int
    warps: int


def parts(head_dim: int) -> tuple[int, int]:
    """Head columns as two powers of two (0: no second), each at least 16: 72 is 64 + 16, 96 is 64 + 32.

    One power of two where two would not be smaller: 112 is 128.

    >>> [parts(width) for width in (12, 64, 80, 112, 160)]
    [(16, 0), (64, 0), (64, 16), (128, 0), (128, 32)]
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    if head_dim <= 16 or whole == head_dim:
        return whole, 0
    first = whole // 2
    second = max(16, 1 << (head_dim - first - 1).bit_length())
    return (whole, 0) if first + second >= whole else (first, second)


# (forward, dq, dkv) for head dims up to the given one, 16-bit dtypes. docs/triton.md has what was measured.
_Row = tuple[int, Config, Config, Config]
_SM_80: tuple[_Row, ...] = (
    (64, Config(128, 64, 3, 4), Config(64, 64, 2, 4), Config(32, 64, 2, 4)),
    (128, Config(128, 32, 3, 8), Config(64, 32, 2, 4), Config(32, 64, 2, 8)),
    (256, Config(64, 32, 2, 8), Config(32, 32, 2, 8), Config(32, 32, 2, 8)),
)
_SM_100: tuple[_Row, ...] = (
    (64, Config(128, 64, 3, 4), Config(128, 64, 2, 8), Config(64, 64, 2, 4)),
    (128, Config(128, 64, 2, 8), Config(64, 32, 2, 4), Config(32, 64, 2, 4)),
    (256, Config(64, 32, 2, 8), Config(32, 32, 2, 8), Config(32, 32, 2, 8)),
)
_SM_90: tuple[_Row, ...] = (
    (64, Config(128, 64, 3, 8), Config(128, 64, 3, 8), Config(64, 64, 3, 4)),
    (80, Config(128, 64, 3, 4), Config(128, 64, 3, 8), Config(64, 128, 3, 8)),
    (96, Config(128, 128, 3, 8), Config(128, 64, 3, 8), Config(64, 128, 3, 8)),
    (128, Config(128, 128, 3, 8), Config(128, 64, 3, 8), Config(64, 128, 3, 8)),
    (256, Config(128, 64, 2, 8), Config(128, 32, 3, 8), Config(64, 32, 2, 8)),
)
_GFX_942: tuple[_Row, ...] = (
    (64, Config(128, 64, 1, 4), Config(64, 64, 1, 4), Config(32, 64, 1, 4)),
    (128, Config(128, 32, 1, 4), Config(64, 32, 1, 4), Config(32, 64, 1, 4)),
    (256, Config(64, 32, 1, 4), Config(32, 32, 1, 4), Config(16, 32, 1, 4)),
)
# with a mask tensor or the left edge of a window, whose tests want registers
_SM_90_MASKED: tuple[_Row, ...] = (
    (64, Config(128, 64, 3, 8), Config(128, 64, 3, 8), Config(64, 64, 2, 4)),
    (128, Config(128, 64, 3, 8), Config(128, 32, 3, 8), Config(32, 128, 2, 8)),
    (256, Config(64, 64, 2, 8), Config(64, 32, 2, 8), Config(32, 64, 2, 8)),
)
TABLE: dict[str, tuple[_Row, ...]] = {"sm_80": _SM_80, "sm_90": _SM_90, "sm_100": _SM_100, "gfx": _GFX_942}
MASKED = {**TABLE, "sm_90": _SM_90_MASKED}
# float32 products without tf32 run on the ordinary units: registers are the limit
_FLOAT32: tuple[_Row, ...] = (
    (64, Config(32, 32, 1, 4), Config(32, 32, 1, 4), Config(32, 32, 1, 4)),
    (128, Config(32, 32, 1, 8), Config(32, 16, 1, 8), Config(16, 32, 1, 8)),
    (256, Config(16, 16, 1, 8), Config(16, 16, 1, 8), Config(16, 16, 1, 8)),
)
KINDS = ("forward", "dq", "dkv")


def choose(kind: str, target: str, head_dim: int, dtype: torch.dtype, masked: bool = False) -> Config:
    """The configuration of kernel ``kind`` (one of :data:`KINDS`) on ``target``, as :func:`target_of` names it.

    ``masked``: with a mask tensor or the left edge of a window.

    >>> choose("forward", "sm_90", 128, torch.bfloat16)
    Config(block_q=128, block_k=128, stages=3, warps=8)
    """
    rows = _FLOAT32 if dtype == torch.float32 else (MASKED if masked else TABLE)[target]
    for row in rows:
        if head_dim <= row[0]:
            return row[1 + KINDS.index(kind)]  # type: ignore[return-value]
    raise ValueError(f"head_dim={head_dim} is over {rows[-1][0]}")


@functools.cache
def target_of(index: int | None) -> str:
    """The key of :data:`TABLE` for a GPU; the one nearest below where it has none, sm_80 where there is no GPU."""
    if torch.version.hip is not None:
        return "gfx"
    if not torch.cuda.is_available():
        return "sm_80"
    major, _ = torch.cuda.get_device_capability(index)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")
