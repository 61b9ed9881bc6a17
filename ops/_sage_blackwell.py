"""SageAttention 3: FP4 products on compute capability 12.x. Inference only."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn.operators import Kernels
from compiled_attn.packages import require
from compiled_attn.spec import CAUSAL

from ._quick_launch import on
from ._sage_kernels import Forward, nothing

WIDTHS = (64, 128)
# All four operands have one bit of mantissa: 12 % of root mean square each at worst, 25 % together.
FP4 = 0.3


def bind(module: Any) -> Any:
    """``sageattn3_blackwell``, which ignores its attn_mask."""
    return require(module, "sageattn3_blackwell", "q", "k", "v", "is_causal")


def kernels(package: Any) -> Kernels:
    """Dense kernels; ``package.load()`` is what :func:`bind` returns."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None, dropout_p: float = 0.0,
        causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None,
        deterministic: bool = False, return_lse: bool = False,
    ) -> Forward:  # fmt: skip
        attend = package.load()
        if q.numel() == 0 or k.numel() == 0:
            return nothing(q, False)
        width = q.shape[-1]
        padding = next(wide for wide in WIDTHS if wide >= width) - width
        # It scales by 1 / sqrt(D after padding), and takes nothing else.
        factor = (width**-0.5 if scale is None else scale) * math.sqrt(width + padding)
        if not math.isclose(factor, 1.0):
            q = q * factor
        # a copy of each: it takes K's mean away in place
        q, k, v = (
            F.pad(x, (0, padding)).transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (q, k, v)
        )
        with on(q.device):
            out = attend(q, k, v, is_causal=bool(causal & CAUSAL))
        return out.transpose(1, 2)[..., :width], None, None

    return Kernels(forward)


# the extension checks for 12.0 and 12.1
CAPABILITIES: tuple[tuple[int, int | None], ...] = ((12, None),)
