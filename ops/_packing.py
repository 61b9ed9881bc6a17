"""Keys packed by a key-padding mask, for libraries that take cu_seqlens: two kernels on an NVIDIA GPU where Triton is
installed, plain PyTorch elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_attn import masks

from ._triton_functions import has_triton

_PLACE_BLOCK, _ROW_BLOCK = 4096, 64


class Packing:
    """Where the real keys of a batch go: ``key_padding`` (B, Sk) bool. ``cu_seqlens`` is int32 (B + 1,).

    ``source`` is masks.packing's. No host sync. :meth:`pack` takes memory for K and V once more; its rows behind the
    last real key hold that one again.
    """

    def __init__(self, key_padding: Tensor) -> None:
        self.batch, self.length = key_padding.shape
        self._kernels = _kernels(key_padding.device) if key_padding.numel() else None
        if self._kernels is None:
            self.source, self._target, self.cu_seqlens = masks.packing(key_padding)
            return
        total, device = self.batch * self.length, key_padding.device
        self.source, self._target, self.cu_seqlens = (
            torch.empty(size, dtype=torch.int32, device=device) for size in (total, total, self.batch + 1)
        )
        quick, kernels = self._kernels
        with quick.on(device):
            quick.launch(
                kernels.place_keys, (-(-total // _PLACE_BLOCK), 1, 1),
                (key_padding, self.source, self._target, self.cu_seqlens, *key_padding.stride(), *key_padding.shape),
                {"BLOCK": _PLACE_BLOCK}, 16, device.index,
            )  # fmt: skip

    def pack(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V (B, Sk, H, D), any strides, as (B * Sk, H, D)."""
        if self._kernels is None:
            return k.flatten(0, 1).index_select(0, self.source), v.flatten(0, 1).index_select(0, self.source)
        heads, total = k.shape[2], self.batch * self.length
        (k, v), strides, unit = in_units(k, v)
        packed = [tensor.new_empty((total, heads, tensor.shape[3])) for tensor in (k, v)]
        widths = [tensor.shape[3] for tensor in (k, v)]
        quick, kernels = self._kernels
        with quick.on(k.device):
            quick.launch(
                kernels.pack_rows, (-(-total // _ROW_BLOCK) * heads, 1, 1),
                (k, v, *packed, self.source, *strides, heads, self.length, total),
                {
                    "D_K": widths[0], "D_V": widths[1], "WIDTH_K": _power(widths[0]), "WIDTH_V": _power(widths[1]),
                    "UNIT": unit, "BLOCK": _ROW_BLOCK,
                },
                4, k.device.index,
            )  # fmt: skip
        return packed[0], packed[1]

    def unpacked(self, rows: Tensor) -> Tensor:
        """The gradient of K or V (B, Sk, H, D) from the packed one, whose rows behind the last sequence are 0."""
        return rows.index_select(0, self._target).unflatten(0, (self.batch, self.length))


class PackedBatch:
    """A dense batch as packed sequences: queries as they are, keys by the mask, if there is one."""

    def __init__(self, q: Tensor, k: Tensor, key_padding: Tensor | None) -> None:
        self.batch, self.k_length = k.shape[:2]
        self.packing = None if key_padding is None else Packing(key_padding)
        if self.packing is None:
            self.cu_seqlens_k = masks.dense_cu_seqlens(self.batch, self.k_length, k.device)
        else:
            self.cu_seqlens_k = self.packing.cu_seqlens
        self._query = q

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """cu_seqlens_q, cu_seqlens_k, and bounds of the lengths of query and key."""
        q_length = self._query.shape[1]
        cu_seqlens_q = masks.dense_cu_seqlens(self.batch, q_length, self._query.device)
        return cu_seqlens_q, self.cu_seqlens_k, q_length, self.k_length

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V (B, Sk, H, D) packed."""
        return (k.flatten(0, 1), v.flatten(0, 1)) if self.packing is None else self.packing.pack(k, v)

    def unpacked(self, rows: Tensor) -> Tensor:
        """The gradient of K or V (B, Sk, H, D) from the packed one; rows of masked keys are 0 in both."""
        if self.packing is None:
            return rows.unflatten(0, (self.batch, self.k_length))
        return self.packing.unpacked(rows)


def in_units(*tensors: Tensor) -> tuple[list[Tensor], list[int], int]:
    """Tensors whose last dimension is dense, their other strides in units, and the unit: 8 elements, or 1 where a row
    need not start at a multiple of 8.
    """
    dense = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    strides = [stride for tensor in dense for stride in tensor.stride()[:-1]]
    unit = 1 if any(number % 8 for number in (*strides, *(tensor.shape[-1] for tensor in dense))) else 8
    return dense, [stride // unit for stride in strides], unit


def _power(width: int) -> int:
    return 1 << (width - 1).bit_length()


def _kernels(device: torch.device) -> tuple[Any, Any] | None:
    """The launcher and the kernels, where an NVIDIA GPU runs them; triton is imported by the first such call."""
    if device.type != "cuda" or torch.version.hip is not None or not has_triton():
        return None
    from . import _packing_kernels, _quick_launch

    return _quick_launch, _packing_kernels
