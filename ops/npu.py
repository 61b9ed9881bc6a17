"""Ascend NPUs: `_native_npu`, npu_fusion_attention of torch_npu.

The second version of the operator, as the first one multiplies its additive mask by the scale. Both call a masked
position True and default to a scale of 1. Bound to the schemas and documentation of torch-npu 2.14.0; not run on
hardware.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels, lse_dtype
from compiled_attn.packages import Package, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, Call, Limits

from ._native_dense import Backward, _zero_gradients, is_empty, math_forward, resolved_scale

_OPEN = 2147483647  # a window without an end
_COMPRESSED = 2048  # causal and band modes take one triangle of this size for any length
_LANES = 8  # softmax_max and softmax_sum repeat each number so often
_MUL_THEN_ADD = 0  # pse_type: scale * QK^T + pse; the default, 1, is scale * (QK^T + pse)
_SKIP_EMPTY_ROWS = 2  # inner_precise
_FULL, _UPPER_LEFT, _LOWER_RIGHT, _BAND = 1, 2, 3, 4  # sparse_mode

Forward = tuple[Tensor, Tensor | None, Tensor | None]


class Library(NamedTuple):
    forward: Any
    backward: Any


def _bind(module: Any) -> Library:
    shared = (
        "pse", "atten_mask", "keep_prob", "pre_tokens", "next_tokens", "inner_precise", "actual_seq_qlen",
        "actual_seq_kvlen", "sparse_mode", "pse_type", "softmax_layout",
    )  # fmt: skip
    saved = ("softmax_max", "softmax_sum", "attention_in", "scale_value", "seed", "offset", "numels")
    return Library(
        require(module, "npu_fusion_attention_v2", "head_num", "input_layout", "scale", *shared),
        require(module, "npu_fusion_attention_grad_v2", "dy", "head_num", "input_layout", *saved, *shared),
    )


PACKAGE = Package(
    "torch_npu", "torch-npu", install="pip install torch-npu, of the same version as torch, on a machine with CANN",
    bind=_bind,
)  # fmt: skip


def _triangle(device: torch.device) -> Tensor:
    """Bool (2048, 2048), True above the diagonal: the compressed mask."""
    return torch.ones(_COMPRESSED, _COMPRESSED, dtype=torch.bool, device=device).triu_(1)


def _filled(mask: Tensor, q: Tensor, k: Tensor, heads: bool) -> Tensor:
    """A 4-D mask in one of the shapes taken: (B|1, 1, Sq, Sk), or with all heads."""
    heads = heads or mask.shape[1] > 1
    batch = q.shape[0] if mask.shape[0] > 1 or heads else 1
    return mask.expand(batch, q.shape[2] if heads else 1, q.shape[1], k.shape[1]).contiguous()


def _positions(q: Tensor, k: Tensor, causal: int, window: Any) -> dict[str, Any] | None:
    """Arguments for positions alone, in one of the compressed modes; None where none fits."""
    lower = bool(causal & ALIGN_LOWER_RIGHT) or q.shape[1] == k.shape[1]
    if window is None and not lower:
        return {"atten_mask": _triangle(q.device), "sparse_mode": _UPPER_LEFT}
    if not lower or q.shape[1] > k.shape[1]:
        return None  # these modes want Sq <= Sk
    if window is None:
        return {"atten_mask": _triangle(q.device), "sparse_mode": _LOWER_RIGHT}
    left, right = window[0], 0 if causal & CAUSAL else window[1]
    return {
        "atten_mask": _triangle(q.device), "sparse_mode": _BAND, "pre_tokens": _OPEN if left < 0 else left,
        "next_tokens": _OPEN if right < 0 else right,
    }  # fmt: skip


def _masking(
    q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any
) -> tuple[dict[str, Any], Tensor | None]:
    """Arguments for masks and positions, and the rows they leave empty: bool (B|1, H|1, Sq|1, 1)."""
    positional = bool(causal & CAUSAL) or window is not None
    if mask is None and key_padding is None:
        alone = _positions(q, k, causal, window) if positional else {}
        if alone is not None:
            return alone, None
    full = masks.combined(mask, key_padding, masks.positions(q.shape[1], k.shape[1], causal, window, q.device))
    assert full is not None
    masked = ~full if full.dtype == torch.bool else full == -math.inf
    found = {
        "atten_mask": _filled(masked, q, k, False), "sparse_mode": _FULL, "inner_precise": _SKIP_EMPTY_ROWS,
    }  # fmt: skip
    if full.dtype != torch.bool:
        found["pse"] = _filled(full.masked_fill(masked, 0.0).to(q.dtype), q, k, True)
        found["pse_type"] = _MUL_THEN_ADD
    return found, masks.empty_rows(full)


def _state(q: Tensor, dropout_p: float) -> Tensor:
    """int64 (3,): seed, offset and length of the dropout mask; empty without dropout."""
    return q.new_empty(3 if dropout_p > 0.0 else 0, dtype=torch.int64)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, return_lse: bool,
) -> Forward:  # fmt: skip
    if is_empty(q, k):
        out, lse, _ = math_forward(q, k, v, mask, key_padding, 0.0, causal, scale, gqa, window, return_lse=return_lse)
        return out, lse, _state(q, dropout_p).zero_()
    options, empty = _masking(q, k, mask, key_padding, causal, window)
    out, highest, total, _, *seeds = PACKAGE.load().forward(
        _dense(q), _dense(k), _dense(v), q.shape[2], "BSND", scale=resolved_scale(q, scale), keep_prob=1.0 - dropout_p,
        **options,
    )  # fmt: skip
    state = torch.tensor(seeds, dtype=torch.int64, device=q.device) if dropout_p > 0.0 else None
    if empty is not None:
        out = out.masked_fill(empty.transpose(1, 2), 0.0)
    if not return_lse:
        return out, None, state
    lse = (highest + total.log())[..., 0]
    return out, lse if empty is None else lse.masked_fill(empty.squeeze(-1), -math.inf), state


def dense_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> Backward:  # fmt: skip
    if is_empty(q, k):
        return _zero_gradients(q, k, v, mask, mask_gradient)
    options, empty = _masking(q, k, mask, key_padding, causal, window)
    if empty is not None:
        # without an upstream gradient, the weights that such a row is given move nothing
        grad_out = grad_out.masked_fill(empty.transpose(1, 2), 0.0)
        lse = lse.masked_fill(lse == -math.inf, 0.0)
    if dropout_p > 0.0:
        options.update(zip(("seed", "offset", "numels"), state.tolist(), strict=True))
    highest, total = _softmax(lse)
    dq, dk, dv, *_ = PACKAGE.load().backward(
        _dense(q), _dense(k), _dense(v), _dense(grad_out), q.shape[2], "BSND", softmax_max=highest, softmax_sum=total,
        attention_in=_dense(out), scale_value=resolved_scale(q, scale), keep_prob=1.0 - dropout_p, **options,
    )  # fmt: skip
    return dq if empty is None else dq.masked_fill(empty.transpose(1, 2), 0.0), dk, dv, None


def _softmax(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of a softmax with this lse, in the kernel's layout: exp(s - lse) is exp(s - max) / sum."""
    highest = lse.unsqueeze(-1).expand(*lse.shape, _LANES).contiguous()
    return highest, torch.ones_like(highest)


# --------------------------------------------------------------------------------------------------------- packed


class _Sequences(NamedTuple):
    """The sequences that have queries and keys; ``rows_q`` and ``rows_k`` are all their rows, None if that is all."""

    spans: list[tuple[int, int, int, int]]
    rows_q: Tensor | None
    rows_k: Tensor | None

    def ends(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"actual_seq_qlen": [], "actual_seq_kvlen": []}
        total_q = total_k = 0
        for q0, q1, k0, k1 in self.spans:
            total_q, total_k = total_q + q1 - q0, total_k + k1 - k0
            found["actual_seq_qlen"].append(total_q)
            found["actual_seq_kvlen"].append(total_k)
        return found


def _sequences(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> _Sequences:
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()  # the operator wants them on the host
    spans = [
        each for each in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False)
        if each[1] > each[0] and each[3] > each[2]
    ]  # fmt: skip
    rows = []
    for tensor, first in ((q, 0), (k, 2)):
        kept = [row for span in spans for row in range(span[first], span[first + 1])]
        rows.append(None if len(kept) == tensor.shape[0] else torch.tensor(kept, dtype=torch.int64, device=q.device))
    return _Sequences(spans, *rows)


def _of(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return (tensor if rows is None else tensor.index_select(0, rows)).contiguous()


def _into(like: Tensor, rows: Tensor | None, values: Tensor) -> Tensor:
    return values if rows is None else torch.zeros_like(like).index_copy_(0, rows, values)


def _packed_options(q: Tensor, sequences: _Sequences, causal: int, window: Any) -> dict[str, Any] | None:
    """Arguments of one call for all sequences; None where each needs its own."""
    if window is not None:
        return None
    options: dict[str, Any] = {**sequences.ends(), "softmax_layout": "TND"}
    if causal & CAUSAL and not causal & ALIGN_LOWER_RIGHT:
        return {**options, "atten_mask": _triangle(q.device), "sparse_mode": _UPPER_LEFT}
    if causal & CAUSAL:
        if any(q1 - q0 > k1 - k0 for q0, q1, k0, k1 in sequences.spans):
            return None  # this mode wants Sq <= Sk
        return {**options, "atten_mask": _triangle(q.device), "sparse_mode": _LOWER_RIGHT}
    return options


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool, return_lse: bool,
) -> Forward:  # fmt: skip
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=lse_dtype(q.dtype))
    options = _packed_options(q, sequences, causal, window)
    if options is None:
        for q0, q1, k0, k1 in sequences.spans:
            one, one_lse, _ = dense_forward(
                q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], None, None, 0.0, causal, scale, gqa, window,
                deterministic, True,
            )  # fmt: skip
            assert one_lse is not None
            out[q0:q1], lse[:, q0:q1] = one[0], one_lse[0]
    elif sequences.spans:
        rows = sequences.rows_q
        found, highest, total, *_ = PACKAGE.load().forward(
            _of(q, rows), _of(k, sequences.rows_k), _of(v, sequences.rows_k), q.shape[1], "TND",
            scale=resolved_scale(q, scale), **options,
        )  # fmt: skip
        sums = (highest + total.log())[..., 0].T
        out = _into(out, rows, found)
        lse = sums if rows is None else lse.index_copy_(1, rows, sums)
    return out, lse if return_lse else None, None


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> Backward:  # fmt: skip
    sequences = _sequences(q, k, cu_seqlens_q, cu_seqlens_k)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    options = _packed_options(q, sequences, causal, window)
    if options is None:
        for q0, q1, k0, k1 in sequences.spans:
            one_q, one_k, one_v, _ = dense_backward(
                grad_out[None, q0:q1], q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], None, None, out[None, q0:q1],
                lse[None, :, q0:q1], state, 0.0, causal, scale, gqa, window, deterministic, False,
            )  # fmt: skip
            dq[q0:q1], dk[k0:k1], dv[k0:k1] = one_q[0], one_k[0], one_v[0]
    elif sequences.spans:
        rows_q, rows_k = sequences.rows_q, sequences.rows_k
        highest, total = _softmax(_of(lse.T, rows_q))
        found = PACKAGE.load().backward(
            _of(q, rows_q), _of(k, rows_k), _of(v, rows_k), _of(grad_out, rows_q), q.shape[1], "TND",
            softmax_max=highest, softmax_sum=total, attention_in=_of(out, rows_q),
            scale_value=resolved_scale(q, scale), **options,
        )  # fmt: skip
        dq, dk, dv = _into(dq, rows_q, found[0]), _into(dk, rows_k, found[1]), _into(dv, rows_k, found[2])
    return dq, dk, dv, None


def _rules(call: Call) -> str | None:
    if call.query[-2] > 256:
        return f"takes 256 heads at most, not {call.query[-2]}"
    return None


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHARED: dict[str, Any] = {"max_head_dim": 768, "window": True, "verified": "contract", "also": (_rules,)}

register_backend(
    Backend(
        "_native_npu",
        "npu_fusion_attention of torch_npu, for Ascend NPUs",
        family="PyTorch",
        packages=(PACKAGE,),
        limits=(
            Limits(("npu",), _DTYPES, masks=("none", "key_padding", "bool", "float"), dropout=True, **_SHARED),
        ),
        dense=Kernels(dense_forward, dense_backward, random=True, fake_state=_state),
        varlen_limits=(Limits(("npu",), _DTYPES, **_SHARED),),
        varlen=Kernels(varlen_forward, varlen_backward),
    )
)  # fmt: skip
