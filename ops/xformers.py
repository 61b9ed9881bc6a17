"""xFormers: its FlashAttention-2 operator where that serves the call, else its CUTLASS operator.

xFormers' own dispatch depends on the GPU and on what else is installed, so the operator is pinned here: a call is
served by the flash operator (FlashAttention-2 of the flash-attn package, or PyTorch's build of it), except for what
:func:`_needs_cutlass` names.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, LOWER_RIGHT, Call, Limits

from . import _flash_common
from ._flash_common import fake_dropout_state
from ._native_dense import (
    Backward,
    _expanded,
    _sum_heads,
    _zero_gradients,
    aligned,
    empty_to,
    fit,
    is_empty,
    repeat_heads,
    resolved_scale,
)
from ._xformers_library import PACKAGE
from .flash2 import wide_dropout

Forward = tuple[Tensor, Tensor | None, Tensor | None]

MAX_FLASH_HEAD_DIM = 256
_LSE_UNIT = 32  # the CUTLASS operator stores lse in rows of a multiple of this


class _Flash:
    """Loads the flash operator alone, for the kernels that all releases of FlashAttention share."""

    def load(self) -> Any:
        return PACKAGE.load().flash


_flash, _, _flash_varlen = _flash_common.kernels(_Flash(), dropout=True)


# ----------------------------------------------------------------------------------------------- which of the two


def _needs_cutlass(call: Call) -> str | None:
    """What about ``call`` the flash operator cannot do; None when it serves it."""
    positional = call.causal or call.window is not None
    if call.dtypes[0] == torch.float32:
        return "float32"
    if call.query[-1] != call.value[-1]:
        return "a head_dim of value of its own"
    if call.query[-1] > MAX_FLASH_HEAD_DIM:
        return f"head_dim={call.query[-1]} over {MAX_FLASH_HEAD_DIM}"
    if call.mask in ("bool", "float"):
        return f"a {call.mask} mask"
    if call.mask == "key_padding" and positional:
        return "a key-padding mask with positions"
    same = call.same_lengths if call.varlen else call.query[-3] == call.key[-3]
    if positional and call.alignment != LOWER_RIGHT and not same:
        return "upper-left alignment"
    return None


def _flash_serves(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, causal: int, window: Any, same_lengths: bool
) -> bool:
    """:func:`_needs_cutlass` for tensors."""
    if q.dtype == torch.float32 or q.shape[-1] != v.shape[-1] or q.shape[-1] > MAX_FLASH_HEAD_DIM:
        return False
    positional = causal & CAUSAL or window is not None
    if mask is not None or (key_padding is not None and positional):
        return False
    return not positional or bool(causal & ALIGN_LOWER_RIGHT) or same_lengths


def _rules(call: Call) -> str | None:
    why = _needs_cutlass(call)
    if why is None:
        return None
    if call.capability is not None and call.capability[0] > 9:  # Dynamo of torch 2.11 cannot compare tuples by >
        return f"{why} needs its CUTLASS operator, which stops at compute capability (9, 0), not {call.capability}"
    if call.dropout_p > 0.0:
        return f"{why} needs its CUTLASS operator, which keeps the state of dropout on the host: no dropout with it"
    if call.varlen and call.window is not None:
        return f"{why} needs its CUTLASS operator, which has no window for packed sequences"
    if call.varlen and call.causal and call.alignment == LOWER_RIGHT and not call.same_lengths:
        return f"{why} needs its CUTLASS operator, which is causal from the upper left for packed sequences"
    return None


# ------------------------------------------------------------------------------------------------ CUTLASS operator


def _cutlass_bias(
    q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any
) -> tuple[Any, Tensor | None]:
    """What goes in as attn_bias, and the rows it leaves empty: bool (B|1, H|1, Sq|1), or None if there are none."""
    square = q.shape[1] == k.shape[1]
    alone = mask is None and key_padding is None and window is None
    if alone and causal & CAUSAL and (square or not causal & ALIGN_LOWER_RIGHT):
        return PACKAGE.load().causal(), None
    full = masks.combined(mask, key_padding, masks.positions(q.shape[1], k.shape[1], causal, window, q.device))
    if full is None:
        return None, None
    return _expanded(masks.additive(full, q.dtype), q, k), masks.empty_rows(full).squeeze(-1)


def _cutlass(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float | None, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    library = PACKAGE.load()
    width = v.shape[-1]
    k, v = repeat_heads(q, k, v)
    inputs = library.inputs(aligned(q), aligned(k), aligned(v), bias, 0.0, resolved_scale(q, scale))
    out, context = library.cutlass_forward.apply(inputs, needs_gradient=return_lse)
    return fit(out, width), context.lse if return_lse else None


def _cutlass_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, out: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    library = PACKAGE.load()
    heads, widths = k.shape[2], (q.shape[-1], k.shape[-1], v.shape[-1])
    k, v = repeat_heads(q, k, v)
    inputs = library.inputs(aligned(q), aligned(k), aligned(v), bias, 0.0, resolved_scale(q, scale))
    found = library.cutlass_backward.apply(library.context(lse, aligned(out)), inputs, aligned(grad_out))
    dq, dk, dv = (fit(one, width) for one, width in zip((found.dq, found.dk, found.dv), widths, strict=True))
    return dq, _sum_heads(dk, heads), _sum_heads(dv, heads), found.db


# ---------------------------------------------------------------------------------------------------------- dense


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> Forward:  # fmt: skip
    square = q.shape[1] == k.shape[1]
    if is_empty(q, k) or _flash_serves(q, k, v, mask, key_padding, causal, window, square):
        return _flash.forward(
            q, k, v, None, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse
        )
    bias, empty = _cutlass_bias(q, k, mask, key_padding, causal, window)
    out, lse = _cutlass(q, k, v, bias, scale, return_lse)
    if lse is not None:
        lse = lse[..., : q.shape[1]]
        if empty is not None:
            lse = lse.masked_fill(empty, -math.inf)
    return out, lse, None


def dense_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, mask, mask_gradient)
    if _flash_serves(q, k, v, mask, key_padding, causal, window, q.shape[1] == k.shape[1]):
        assert _flash.backward is not None
        return _flash.backward(
            grad_out, q, k, v, None, key_padding, out, lse, state, dropout_p, causal, scale, gqa, window,
            deterministic, False,
        )  # fmt: skip
    bias, _ = _cutlass_bias(q, k, mask, key_padding, causal, window)
    if mask_gradient:
        # the operator gives the gradient of a bias that is not broadcast, and looks at this flag
        whole = _expanded(bias.contiguous(), q, k)
        assert whole is not None
        bias = whole.detach().requires_grad_()
    padded = torch.nn.functional.pad(empty_to(lse, -math.inf, 0.0), (0, -lse.shape[-1] % _LSE_UNIT))
    dq, dk, dv, dbias = _cutlass_gradients(grad_out, q, k, v, bias, out, padded, scale)
    if not mask_gradient:
        return dq, dk, dv, None
    assert dbias is not None
    return dq, dk, dv, dbias.sum_to_size(mask.shape).to(mask.dtype)


# --------------------------------------------------------------------------------------------------------- varlen


class _Packing(NamedTuple):
    """Where the packed rows are: which have no partner on the other side, and how lse is stored."""

    bias: Any
    lonely_q: Tensor  # bool (Tq,): behind the last sequence, or in one without keys
    lonely_k: Tensor
    sequence: Tensor  # int64 (Tq,), and the row's place in it
    place: Tensor
    starts: Tensor  # int64 (B + 1,), of the queries
    most: int

    def cleared_q(self, rows: Tensor) -> Tensor:
        return rows.masked_fill(self.lonely_q[:, None, None], 0.0)

    def cleared_k(self, rows: Tensor) -> Tensor:
        return rows.masked_fill(self.lonely_k[:, None, None], 0.0)

    def packed(self, lse: Tensor) -> Tensor:
        """(B, H, >= most) of the operator as (H, Tq)."""
        return lse[self.sequence, :, self.place].T.masked_fill(self.lonely_q, -math.inf)

    def padded(self, lse: Tensor) -> Tensor:
        """The other way round, +inf where there is no row."""
        width = -(-self.most // _LSE_UNIT) * _LSE_UNIT
        rows = self.starts[:-1, None] + torch.arange(width, device=lse.device)
        found = lse[:, rows.clamp(max=lse.shape[1] - 1)].transpose(0, 1)
        outside = (rows >= self.starts[1:, None])[:, None]
        return empty_to(found, -math.inf, 0.0).masked_fill(outside, math.inf).contiguous()


def _packing(q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor, most: tuple[int, int], causal: int) -> _Packing:
    library = PACKAGE.load()
    starts_q, starts_k = starts_q.contiguous(), starts_k.contiguous()  # the operator refuses others
    most = max(most[0], 1), max(most[1], 1)
    # the operators look at the starts and the maximum alone: the lists of lengths, on the host, stay empty
    lengths = [library.lengths(start, longest, 0, []) for start, longest in ((starts_q, most[0]), (starts_k, most[1]))]
    bias = (library.block_diagonal_causal if causal & CAUSAL else library.block_diagonal)(*lengths)
    lonely_q, lonely_k = masks.lonely(q, starts_q, starts_k), masks.lonely(k, starts_k, starts_q)
    sequence = masks.segments(starts_q, q.shape[0]).clamp(max=starts_q.shape[0] - 2)
    wide = starts_q.to(torch.int64)
    place = (torch.arange(q.shape[0], device=q.device) - wide[sequence]).clamp(max=most[0] - 1)
    return _Packing(bias, lonely_q, lonely_k, sequence, place, wide, most[0])


def _one_tensor(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> bool:
    # (columns of one table may begin at one place and go on to others)
    return cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr() and cu_seqlens_q.stride() == cu_seqlens_k.stride()


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None,
    deterministic: bool = False, return_lse: bool = False,
) -> Forward:  # fmt: skip
    starts, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    if is_empty(q, k) or _flash_serves(q, k, v, None, None, causal, window, _one_tensor(*starts)):
        return _flash_varlen.forward(
            q, k, v, *starts, *most, dropout_p, causal, scale, gqa, window, deterministic, return_lse
        )
    packing = _packing(q, k, *starts, most, causal)
    out, stored = _cutlass(q[None], k[None], v[None], packing.bias, scale, return_lse)
    return packing.cleared_q(out[0]), None if stored is None else packing.packed(stored), None


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, None, False)
    starts, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    if _flash_serves(q, k, v, None, None, causal, window, _one_tensor(*starts)):
        assert _flash_varlen.backward is not None
        return _flash_varlen.backward(
            grad_out, q, k, v, *starts, *most, out, lse, state, dropout_p, causal, scale, gqa, window, deterministic,
            False,
        )  # fmt: skip
    packing = _packing(q, k, *starts, most, causal)
    dq, dk, dv, _ = _cutlass_gradients(
        grad_out[None], q[None], k[None], v[None], packing.bias, out[None], packing.padded(lse), scale
    )
    return packing.cleared_q(dq[0]), packing.cleared_k(dk[0]), packing.cleared_k(dv[0]), None


def _on_rocm() -> list[str]:
    if torch.version.hip is None:
        return []
    return ["its operators for ROCm are other ones; use 'aiter' or 'native'"]


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

register_backend(
    Backend(
        "xformers",
        "memory_efficient_attention of xFormers: its flash operator, else its CUTLASS operator",
        family="xFormers",
        packages=(PACKAGE,),
        available=_on_rocm,
        limits=(
            Limits(
                ("cuda",), _DTYPES, min_capability=(8, 0), value_head_dim=True,
                masks=("none", "key_padding", "bool", "float"), mask_gradient=True, window=True, dropout=True,
                deterministic="never", also=(_rules, wide_dropout),
            ),
        ),
        dense=Kernels(dense_forward, dense_backward, random=True, fake_state=fake_dropout_state),
        varlen_limits=(
            Limits(
                ("cuda",), _DTYPES, min_capability=(8, 0), value_head_dim=True, window=True, dropout=True,
                deterministic="never", also=(_rules, wide_dropout),
            ),
        ),
        varlen=Kernels(varlen_forward, varlen_backward, random=True, fake_state=fake_dropout_state),
    )
)  # fmt: skip
