"""Exact attention in float64 for the stand-ins of FlashAttention 2, 3 and 4, and what the three demand of a caller.

What the kernels leave as it was allocated is NaN here: rows behind the last sequence. Arithmetic that gives NaN in the
kernels (an empty row's lse with the wrong sign, -inf - -inf) gives NaN here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def demand_layout(*tensors: Tensor) -> None:
    """head_dim a multiple of 8, dense; rows at multiples of 16 bytes: misaligned ones end the CUDA context."""
    for tensor in tensors:
        unit = 16 // tensor.element_size()
        assert tensor.shape[-1] % 8 == 0, "head_dim must be a multiple of 8"
        assert tensor.stride(-1) == 1, "last dimension must be contiguous"
        assert tensor.storage_offset() % unit == 0, "misaligned rows"
        strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        assert all(stride % unit == 0 for size, stride in strides if size > 1), "misaligned rows"
        assert tensor.numel() > 0, "an empty grid"


class Batch:
    """Queries and keys cut into sequences: by cu_seqlens, or a dense batch; queries may be dense beside packed keys.

    ``tile`` is the number of rows that a kernel loads at once, up to the end of the tensor, whatever the sequence: what
    is past its end counts 0 times, which is NaN if it is not finite. 0: past the end it reads 0.
    """

    def __init__(self, q: Tensor, k: Tensor, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, tile: int = 0) -> None:
        self.packed, self.tile = cu_q is not None, tile
        if self.packed:
            assert q.dim() == k.dim() == 3
            for starts, most in ((cu_q, max_q), (cu_k, max_k)):
                assert starts.dtype == torch.int32
                assert starts.is_contiguous()
                assert isinstance(most, int)
                assert most >= int(starts.diff().max()), "a sequence is longer than its bound"
            self.longest_q, self.longest_k = max_q, max_k
            ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
            spans = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
            self.pieces = [(slice(a, b), slice(c, d)) for a, b, c, d in spans]
        elif cu_k is not None:
            assert (q.dim(), k.dim(), max_q) == (4, 3, None)
            assert cu_k.dtype == torch.int32
            assert cu_k.shape == (q.shape[0] + 1,)
            assert max_k >= int(cu_k.diff().max()), "a sequence is longer than its bound"
            self.longest_q, self.longest_k = q.shape[1], max_k
            ends_k = cu_k.tolist()
            self.pieces = [(number, slice(c, d)) for number, (c, d) in enumerate(zip(ends_k, ends_k[1:], strict=False))]
        else:
            assert q.dim() == k.dim() == 4
            assert q.shape[0] == k.shape[0]
            self.longest_q, self.longest_k = q.shape[1], k.shape[1]
            self.pieces = [(number, number) for number in range(q.shape[0])]
        assert q.shape[-2] % k.shape[-2] == 0

    def nothing(self, rows: Any, *tensors: Tensor) -> Tensor:
        """0, or NaN if what the tiles of ``rows`` hold past their end is not finite: (heads, 1, 1)."""
        if not isinstance(rows, slice) or self.tile == 0:
            return torch.zeros(1, 1, 1)
        tiles = math.ceil((rows.stop - rows.start) / self.tile)
        past = slice(rows.stop, max(rows.start + tiles * self.tile, rows.stop))
        parts = [one[past].double().sum((0, 2)) * 0.0 for one in tensors]
        return sum(parts[1:], parts[0])[:, None, None]

    def lse_at(self, lse: Tensor, rows: Any) -> Tensor:
        return lse[:, rows] if self.packed else lse[rows]


def keep(q_length: int, k_length: int, left: Any, right: Any) -> Tensor:
    """Bool (Sq, Sk) of a window aligned at the lower right; None is open."""
    rows = torch.arange(q_length)[:, None] + k_length - q_length
    columns = torch.arange(k_length)[None]
    seen = torch.ones(q_length, k_length, dtype=torch.bool)
    if right is not None:
        seen &= columns <= rows + right
    if left is not None:
        seen &= columns >= rows - left
    return seen


def dropped(rng: Tensor | None, number: int, dropout_p: float, shape: tuple[int, ...]) -> Tensor:
    """Weights of 0 or 1 / (1 - p), by the random state and the number of the sequence."""
    if dropout_p == 0.0:
        return torch.ones(shape, dtype=torch.float64)
    assert rng is not None
    assert rng.dtype == torch.int64
    generator = torch.Generator().manual_seed(int(rng[0]) + int(rng[1]) * 7 + number)
    return (torch.rand(shape, generator=generator) >= dropout_p).double() / (1 - dropout_p)


def _for_queries(of_keys: Tensor, group: int) -> Tensor:
    return of_keys if of_keys.shape[0] == 1 else of_keys.repeat_interleave(group, 0)


def _scores(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    high_q, high_k = q.double().transpose(0, 1), k.double().transpose(0, 1).repeat_interleave(group, 0)
    return (high_q @ high_k.transpose(-1, -2) * scale).masked_fill(~seen, -math.inf)


def forward(
    batch: Batch, q: Tensor, k: Tensor, v: Tensor, scale: float, span: tuple[Any, Any], empty_lse: float,
    rng: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse, (B, H, Sq) or (H, T); NaN in rows of no sequence."""
    out = q.new_full((*q.shape[:-1], v.shape[-1]), math.nan)
    lse_shape = (q.shape[1], q.shape[0]) if batch.packed else (q.shape[0], q.shape[2], q.shape[1])
    lse = q.new_full(lse_shape, math.nan, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for number, (rows, keys) in enumerate(batch.pieces):
        scores = _scores(q[rows], k[keys], scale, keep(q[rows].shape[0], k[keys].shape[0], *span))
        sums = scores.logsumexp(-1)
        weights = (scores - sums.masked_fill(sums == -math.inf, 0.0)[..., None]).exp()
        weights = weights * dropped(rng, number, dropout_p, tuple(weights.shape))
        group = q.shape[-2] // k.shape[-2]
        one = weights @ v[keys].double().transpose(0, 1).repeat_interleave(group, 0)
        one = one + _for_queries(batch.nothing(keys, v), group)
        out[rows] = one.transpose(0, 1).to(q.dtype)
        batch.lse_at(lse, rows).copy_(sums.masked_fill(sums == -math.inf, empty_lse))
    return out, lse


def backward(
    batch: Batch, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    span: tuple[Any, Any], into: tuple[Tensor, Tensor, Tensor], rng: Tensor | None = None, dropout_p: float = 0.0,
) -> None:  # fmt: skip
    """Writes dq, dk and dv of every sequence. An lse of -inf for an empty row gives NaN, of +inf gives 0."""
    group = q.shape[-2] // k.shape[-2]
    for number, (rows, keys) in enumerate(batch.pieces):
        scores = _scores(q[rows], k[keys], scale, keep(q[rows].shape[0], k[keys].shape[0], *span))
        weights = (scores - batch.lse_at(lse, rows).double()[..., None]).exp()
        factors = dropped(rng, number, dropout_p, tuple(weights.shape))
        upstream, result = (one[rows].double().transpose(0, 1) for one in (dout, out))
        high_v = v[keys].double().transpose(0, 1).repeat_interleave(group, 0)
        high_k = k[keys].double().transpose(0, 1).repeat_interleave(group, 0)
        dweights = upstream @ high_v.transpose(-1, -2) * factors
        dscores = weights * (dweights - (upstream * result).sum(-1, keepdim=True)) * scale
        found = (
            dscores @ high_k,
            dscores.transpose(-1, -2) @ q[rows].double().transpose(0, 1),
            (weights * factors).transpose(-1, -2) @ upstream,
        )
        nothing = (
            _for_queries(batch.nothing(keys, k, v), group), batch.nothing(rows, q, dout),
            batch.nothing(rows, dout),
        )  # fmt: skip
        for gradient, one, zero, which in zip(into, found, nothing, (rows, keys, keys), strict=True):
            grouped = (one + zero).unflatten(0, (gradient.shape[-2], -1)).sum(1)
            gradient[which] = grouped.transpose(0, 1).to(gradient.dtype)
