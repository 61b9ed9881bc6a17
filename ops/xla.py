"""TPUs through PyTorch/XLA: `_native_xla`, the Pallas flash attention of torch_xla.

``flash_attention`` returns no lse and is differentiable through an autograd.Function; the two operators under it,
called here, return the sum and the maximum of each row and take them back. Causal is aligned at the upper left, the
scale defaults to 1. Bound to the signatures and source of torch_xla 2.9.0; not run on hardware.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels
from compiled_attn.packages import Package, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import CAUSAL, UPPER_LEFT, Call, Limits

from ._native_dense import (
    Backward,
    Forward,
    _sum_heads,
    _zero_gradients,
    is_empty,
    math_forward,
    repeat_heads,
    resolved_scale,
)
from ._native_varlen import math_varlen_forward

_LANES = 128
# The blocks are 512 wide, or the whole length; backward ones 256, 512 and 1024. They must divide the lengths, and the
# library's own padding of keys masks nothing.
_BLOCK_Q, _BLOCK_K = 1024, 512
_REAL, _MASKED = 0, 1  # segment ids of keys; queries are all _REAL


class Library(NamedTuple):
    forward: Any
    backward: Any


def _bind(module: Any) -> Library:
    shared = ("q", "k", "v", "causal", "q_segment_ids", "kv_segment_ids", "sm_scale", "ab", "partition_spec", "mesh")
    saved = ("grad_output", "o", "l", "m", "q_full_shape", "kv_full_shape", "ab_full_shape")
    # imports JAX without letting it take the TPU
    guarded = require(module, "requires_jax")
    return Library(
        guarded(require(module, "fa_custom_forward", *shared, "ctx_grad")),
        guarded(require(module, "fa_custom_backward", *saved, *shared, "ctx_grad")),
    )


PACKAGE = Package(
    "torch_xla.experimental.custom_kernel", "torch_xla", install="pip install torch_xla[tpu], on a machine with a TPU",
    bind=_bind,
)  # fmt: skip


def _whole(length: int, block: int) -> int:
    """The length that ``length`` is filled up to: a power of two up to 512, then whole blocks."""
    if length <= 512:
        return max(_LANES, 1 << (length - 1).bit_length())
    return -(-length // block) * block


def _laid_out(tensor: Tensor, length: int) -> Tensor:
    """(B, S, H, D) as (B, H, length, D), filled up with zeros."""
    return F.pad(tensor.transpose(1, 2), (0, 0, 0, length - tensor.shape[1])).contiguous()


def _ids(ids: Tensor | None, like: Tensor, length: int, fill: int) -> Tensor:
    """Segment ids int32 (B, length): ``ids`` (B, S), or all real."""
    if ids is None:
        ids = torch.full(like.shape[:2], _REAL, dtype=torch.int32, device=like.device)
    return F.pad(ids.to(torch.int32), (0, length - ids.shape[1]), value=fill)


class _Call(NamedTuple):
    """What forward and backward share: tensors as the kernel takes them, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_ids: Tensor | None
    k_ids: Tensor | None
    causal: bool
    scale: float

    def options(self) -> dict[str, Any]:
        return {
            "q": self.q, "k": self.k, "v": self.v, "causal": self.causal, "q_segment_ids": self.q_ids,
            "kv_segment_ids": self.k_ids, "sm_scale": self.scale, "ab": None, "partition_spec": "None", "mesh": "None",
        }  # fmt: skip


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, q_ids: Tensor | None, k_ids: Tensor | None, causal: int, scale: float | None
) -> _Call:
    k, v = repeat_heads(q, k, v)
    q_length, k_length = _whole(q.shape[1], _BLOCK_Q), _whole(k.shape[1], _BLOCK_K)
    ids: tuple[Tensor | None, Tensor | None] = (None, None)
    if k_ids is not None or k_length > k.shape[1]:
        ids = _ids(q_ids, q, q_length, _REAL), _ids(k_ids, k, k_length, _MASKED if q_ids is None else -1)
    tensors = _laid_out(q, q_length), _laid_out(k, k_length), _laid_out(v, k_length)
    return _Call(*tensors, *ids, bool(causal & CAUSAL), resolved_scale(q, scale))


def _attend(call: _Call, empty: Tensor | None, length: int, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out (B, Sq, H, D) and lse (B, H, Sq). ``empty`` (B, 1, Sq|1): the kernel gives the mean of all values there."""
    # the last argument says which of the ten inputs want a gradient: without one it returns no sums
    wanted = [return_lse] * 3 + [False] * 7
    out, _, _, _, total, highest, _ = PACKAGE.load().forward(**call.options(), ctx_grad=wanted)
    out = out[:, :, :length].transpose(1, 2)
    lse = (highest + total.log())[:, :, :length] if return_lse else None
    if empty is None:
        return out, lse
    out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
    return out, None if lse is None else lse.masked_fill(empty, -math.inf)


def _differentiate(
    call: _Call, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; with exp(s - lse) = exp(s - maximum) / sum, lse is the maximum and the sum is 1."""
    length = call.q.shape[2]
    lse = F.pad(lse.masked_fill(lse == -math.inf, 0.0), (0, length - lse.shape[2])).contiguous()
    shapes = {"q_full_shape": list(call.q.shape), "kv_full_shape": list(call.k.shape), "ab_full_shape": None}
    gradients = PACKAGE.load().backward(
        grad_output=_laid_out(grad_out, length), o=_laid_out(out, length), l=torch.ones_like(lse), m=lse,
        **call.options(), **shapes, ctx_grad=[True] * 3 + [False] * 7,
    )  # fmt: skip
    lengths = (q.shape[1], k.shape[1], k.shape[1])
    dq, dk, dv = (
        gradient[:, :, :rows].transpose(1, 2) for gradient, rows in zip(gradients[:3], lengths, strict=True)
    )  # fmt: skip
    return dq, _sum_heads(dk, k.shape[2]), _sum_heads(dv, v.shape[2])


# ----------------------------------------------------------------------------------------------------------- dense


def _empty_rows(key_padding: Tensor, causal: int, length: int) -> Tensor:
    """Bool (B, 1, Sq|1): rows with nothing to attend to."""
    mask = key_padding[:, None, None, :]
    return (masks.empty_causal_rows(mask, length) if causal & CAUSAL else masks.empty_rows(mask)).squeeze(-1)


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, return_lse: bool,
) -> Forward:  # fmt: skip
    if is_empty(q, k):
        return math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, return_lse=return_lse)
    k_ids = None if key_padding is None else torch.where(key_padding, _REAL, _MASKED)
    empty = None if key_padding is None else _empty_rows(key_padding, causal, q.shape[1])
    out, lse = _attend(_prepared(q, k, v, None, k_ids, causal, scale), empty, q.shape[1], return_lse)
    return out, lse, None


def dense_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, mask, mask_gradient)
    k_ids = None if key_padding is None else torch.where(key_padding, _REAL, _MASKED)
    call = _prepared(q, k, v, None, k_ids, causal, scale)
    return *_differentiate(call, grad_out, q, k, v, out, lse), None


# ---------------------------------------------------------------------------------------------------------- packed


def _segments(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of queries and of keys (1, T)."""
    q_ids, k_ids = masks.segments(cu_seqlens_q, q.shape[0]), masks.segments(cu_seqlens_k, k.shape[0])
    return q_ids[None], k_ids.masked_fill(k_ids == cu_seqlens_k.shape[0] - 1, -1)[None]


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool, return_lse: bool,
) -> Forward:  # fmt: skip
    """The packed rows as one sequence, cut by segment ids: no host sync, but every block is visited."""
    if is_empty(q, k):
        return math_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, scale, return_lse=return_lse
        )
    q_ids, k_ids = _segments(q, k, cu_seqlens_q, cu_seqlens_k)
    empty = masks.lonely(q, cu_seqlens_q, cu_seqlens_k)[None, None]
    call = _prepared(q[None], k[None], v[None], q_ids, k_ids, causal, scale)
    out, lse = _attend(call, empty, q.shape[0], return_lse)
    return out[0], None if lse is None else lse[0], None


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, None, False)
    q_ids, k_ids = _segments(q, k, cu_seqlens_q, cu_seqlens_k)
    call = _prepared(q[None], k[None], v[None], q_ids, k_ids, causal, scale)
    dq, dk, dv = _differentiate(call, grad_out[None], q[None], k[None], v[None], out[None], lse[None])
    return dq[0], dk[0], dv[0], None


def _rules(call: Call) -> str | None:
    head_dim = call.query[-1]
    if head_dim > _LANES and head_dim % _LANES:
        return f"takes a head_dim up to {_LANES}, or a multiple of it, not {head_dim}"
    if call.causal and call.varlen and not call.same_lengths:
        return "is causal over packed rows only where one tensor is both cu_seqlens_q and cu_seqlens_k"
    if call.causal and not call.varlen and call.query[-3] != call.key[-3]:
        return f"is causal for Sq == Sk only, not {call.query[-3]} and {call.key[-3]}"
    return None


_LIMITS = Limits(
    ("xla",), (torch.bfloat16, torch.float32), masks=("none", "key_padding"), alignments=(UPPER_LEFT,),
    verified="contract", also=(_rules,),
)  # fmt: skip

register_backend(
    Backend(
        "_native_xla",
        "the Pallas flash attention of torch_xla, for TPUs",
        family="PyTorch",
        packages=(PACKAGE,),
        limits=(_LIMITS,),
        dense=Kernels(dense_forward, dense_backward),
        varlen_limits=(
            Limits(("xla",), (torch.bfloat16, torch.float32), verified="contract", also=(_rules,)),
        ),
        varlen=Kernels(varlen_forward, varlen_backward),
    )
)  # fmt: skip
