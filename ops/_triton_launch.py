"""Host side of the Triton kernels: shapes and strides to arguments and grids. Imports triton; only GPU calls need it.

Nothing here reads a tensor's values or asks the device anything: a grid comes from shapes, so that the same lines serve
eager calls, CUDA graphs and tracing with symbolic sizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from compiled_attn import masks
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL

from ._quick_launch import on
from ._triton_backward import attention_dkv, attention_dq
from ._triton_configs import choose, parts, target_of
from ._triton_forward import attention_forward
from ._triton_tiles import compact, key_order

# a window past this is open; positions stay far from 2^31
_FAR = 1 << 30
# row strides up to this keep the offsets inside a tile (256 rows at most) in 32 bits
_MOST_STRIDE = 1 << 23
_ORDER_BLOCK = 2048
_COMPACT_BLOCK = 64


class _Plan:
    """Everything the three kernels share about one call."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None, starts: Any,
        causal: int, scale: float | None, window: Any,
    ) -> None:  # fmt: skip
        self.varlen = starts is not None
        self.heads, self.key_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
        self.batch = starts[0].shape[0] - 1 if self.varlen else q.shape[0]
        self.q_length, self.k_length = q.shape[-3], k.shape[-3]
        scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
        if scale <= 0.0:  # the maximum of a row is found before it is scaled
            q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
        self.scale = scale
        self.unit = 8 if head_dim % 8 == 0 else 1
        self.q, self.k, self.v = (self.readable(tensor) for tensor in (q, k, v))
        self.starts = starts if self.varlen else (q, q)
        if mask is not None and key_padding is not None:
            mask, key_padding = masks.combined(mask, key_padding, None), None
        self.mask, self.mask_kind = self.readable_mask(mask)
        self.gather = key_padding is not None
        self.order, self.rank, self.real = q, q, (self.k, self.v)
        if key_padding is not None:
            self.order, self.rank = self.ordered(key_padding)
            self.real = self.compacted()
        left, right = (-1, -1) if window is None else window
        if causal & CAUSAL:
            right = 0
        self.left, self.right = min(left, _FAR), min(right, _FAR)
        first, second = parts(head_dim)
        self.constants = {
            "GROUP": self.heads // max(self.key_heads, 1), "D": head_dim, "A": first, "B": second, "UNIT": self.unit,
            "MASK": self.mask_kind, "LEFT": left >= 0, "RIGHT": right >= 0,
            "LOWER_RIGHT": bool(causal & ALIGN_LOWER_RIGHT), "GATHER": self.gather, "VARLEN": self.varlen,
        }  # fmt: skip

    def readable(self, tensor: Tensor) -> Tensor:
        """``tensor``, copied unless its columns lie together and its rows start at multiples of ``unit`` elements."""
        *outer, columns = tensor.stride()
        if columns != 1 or any(stride % self.unit for stride in outer) or outer[-2] > _MOST_STRIDE:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Strides of batch, rows and heads, in units."""
        *batch, rows, heads, _ = tensor.stride()
        return (batch[0] if batch else 0) // self.unit, rows // self.unit, heads // self.unit

    def readable_mask(self, mask: Tensor | None) -> tuple[Tensor, int]:
        if mask is None:
            return self.q, 0
        if mask.stride(2) > _MOST_STRIDE or mask.stride(3) > _MOST_STRIDE:
            mask = mask.contiguous()
        return mask, 1 if mask.dtype == torch.bool else 2

    def mask_strides(self) -> tuple[int, ...]:
        """Batch, head, query, key; 0 where the mask is broadcast."""
        if self.mask_kind == 0:
            return 0, 0, 0, 0
        pairs = zip(self.mask.shape, self.mask.stride(), strict=True)
        return tuple(0 if size == 1 else stride for size, stride in pairs)

    def ordered(self, key_padding: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.empty((self.batch, self.k_length), dtype=torch.int32, device=self.q.device)
        rank = torch.empty((self.batch, self.k_length + 1), dtype=torch.int32, device=self.q.device)
        self.launch(
            key_order,
            (self.batch,),
            key_padding,
            order,
            rank,
            *key_padding.stride(),
            self.k_length,
            BLOCK=_ORDER_BLOCK,
            num_warps=8,
        )
        return order, rank

    def compacted(self) -> tuple[Tensor, Tensor]:
        """Keys and values in their order, those that the mask leaves first: more memory, for time."""
        head_dim = self.q.shape[-1]
        k, v = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (self.k, self.v))
        tiles = (self.k_length + _COMPACT_BLOCK - 1) // _COMPACT_BLOCK
        self.launch(
            compact, (tiles * self.key_heads * self.batch,), self.k, self.v, k, v, self.order, self.rank,
            *self.strides(self.k), *self.strides(self.v), self.key_heads, self.k_length, tiles,
            D=head_dim, WIDTH=1 << (head_dim - 1).bit_length(), UNIT=self.unit, BLOCK=_COMPACT_BLOCK, num_warps=4,
        )  # fmt: skip
        return k, v

    def tiles(self, length: int, block: int) -> tuple[int, int]:
        """Tiles of one head, and of them all."""
        if self.varlen:
            return length // block + self.batch + 1, 1
        return (length + block - 1) // block, self.batch

    def run(
        self, kind: str, kernel: Any, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...], **more: Any
    ) -> None:
        masked = self.mask_kind != 0 or self.left >= 0
        config = choose(kind, target_of(self.q.device.index), self.q.shape[-1], self.q.dtype, masked)
        if kind == "dkv":
            (tiles, batch), heads = self.tiles(self.k_length, config.block_k), self.key_heads
        else:
            (tiles, batch), heads = self.tiles(self.q_length, config.block_q), self.heads
        strides = [stride for tensor in strided for stride in self.strides(tensor)]
        self.launch(
            kernel, (tiles * batch * heads,), *tensors, *strides, *self.mask_strides(), self.batch, heads,
            self.q_length, self.k_length, tiles, self.left, self.right, self.scale, **self.constants, **more,
            BLOCK_Q=config.block_q, BLOCK_K=config.block_k, STAGES=config.stages,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def launch(self, kernel: Any, grid: tuple[Any, ...], *arguments: Any, **constants: Any) -> None:
        if isinstance(self.q, FunctionalTensor):  # traced: the kernel becomes a node that Inductor takes in
            torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
            return
        with on(self.q.device):
            kernel[grid](*arguments, **constants)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None, starts: Any, causal: int,
    scale: float | None, window: Any, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out (B, Sq, H, D) and lse (B, H, Sq), or None; packed when ``starts`` is (cu_seqlens_q, cu_seqlens_k)."""
    plan = _Plan(q, k, v, mask, key_padding, starts, causal, scale, window)
    out = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], plan.heads, plan.q_length), dtype=torch.float32) if return_lse else None
    tensors = (plan.q, *plan.real, out, out if lse is None else lse, plan.mask, plan.order, plan.rank)
    plan.run("forward", attention_forward, (*tensors, *plan.starts), (plan.q, *plan.real), LSE=return_lse)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None, starts: Any,
    out: Tensor, lse: Tensor, causal: int, scale: float | None, window: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, contiguous. Needs memory for them and four float32 for each row of each head."""
    plan = _Plan(q, k, v, mask, key_padding, starts, causal, scale, window)
    grad = plan.readable(grad_out)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    rows = lse.new_empty((*lse.shape, 4))
    places = (plan.mask, plan.order, plan.rank, *plan.starts)
    plan.run("dq", attention_dq, (plan.q, *plan.real, out, grad, lse, rows, dq, *places), (plan.q, *plan.real, grad))
    inputs = (plan.q, plan.k, plan.v)
    plan.run("dkv", attention_dkv, (*inputs, grad, rows, dk, dv, *places), (*inputs, grad))
    if scale is not None and scale <= 0.0:
        dq = -dq if scale < 0.0 else dq * 0.0
        if scale == 0.0:
            dk = dk * 0.0
    return dq, dk, dv
