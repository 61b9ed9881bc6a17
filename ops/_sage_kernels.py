"""How SageAttention's kernels are called: layouts, widths, smoothing of K, masks, packing.

The factories take anything with ``load()``, so that `sageattention` and builds from the Hub share them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels
from compiled_attn.spec import CAUSAL, report

from ._native_dense import aligned, fit
from ._packing import PackedBatch
from ._quick_launch import capability_of, on
from ._sage_library import BLOCK_K, BLOCK_Q, WIDTHS, Blocks, Dense, Packed

Forward = tuple[Tensor, Tensor | None, Tensor | None]
LOG2_E = 1.0 / math.log(2.0)


def kernels(package: Any, name: str, masked: bool = False) -> Kernels:
    """Dense kernels of backend ``name``; ``package.load()`` is a :class:`Dense`. ``masked``: the entry takes a mask."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None, dropout_p: float = 0.0,
        causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None,
        deterministic: bool = False, return_lse: bool = False,
    ) -> Forward:  # fmt: skip
        library: Dense = package.load()
        kind = "key_padding" if key_padding is not None else "none" if mask is None else "bool"
        faults = library.facts.reasons(capability_of(q), return_lse, kind, masked)
        _require(name, faults + too_large(q.shape, k.shape, mask is not None))
        if q.numel() == 0 or k.numel() == 0:
            return nothing(q, return_lse)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with on(q.device):
            if masked and (mask is not None or key_padding is not None):
                return _masked(name, library, q, k, v, mask, key_padding, scale, return_lse)
            if key_padding is not None:
                assert library.packed is not None
                return _flattened(library.packed, q, k, v, key_padding, False, scale), None, None
            return _dense(name, library, q, k, v, None, bool(causal & CAUSAL), scale, return_lse)

    return Kernels(forward)


def varlen_kernels(package: Any) -> Kernels:
    """Packed kernels; ``package.load()`` is a :class:`Packed`."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
        window: Any = None, deterministic: bool = False, return_lse: bool = False,
    ) -> Forward:  # fmt: skip
        library: Packed = package.load()
        _require("sage_varlen", too_large(q.shape, k.shape, False))
        if q.numel() == 0 or k.numel() == 0:
            return nothing(q, False)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        starts = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()  # Triton gets a pointer, and no stride
        with on(q.device):
            out = _packed(
                library, q, k, v, means_packed(k, starts[1]), None, *starts, max_seqlen_q, max_seqlen_k,
                bool(causal & CAUSAL), scale,
            )  # fmt: skip
            return masks.clear_behind(out, cu_seqlens_q), None, None

    return Kernels(forward)


def varlen_as_dense(package: Any) -> Kernels:
    """Dense calls by the packed kernels; ``package.load()`` is a :class:`Packed`."""

    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None, dropout_p: float = 0.0,
        causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None,
        deterministic: bool = False, return_lse: bool = False,
    ) -> Forward:  # fmt: skip
        library: Packed = package.load()
        _require("sage_varlen", too_large(q.shape, k.shape, False))
        if q.numel() == 0 or k.numel() == 0:
            return nothing(q, False)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        with on(q.device):
            return _flattened(library, q, k, v, key_padding, bool(causal & CAUSAL), scale), None, None

    return Kernels(forward)


def too_large(query: Sequence[int], key: Sequence[int], masked: bool) -> list[str]:
    """Why shapes are too large for the kernels, which count elements in 32 bits."""
    found = []
    for name, shape in (("query", query), ("key", key)):
        count = math.prod(shape) // max(shape[-1], 1) * (64 if shape[-1] <= 64 else 128)
        if count >= 2**31:
            found.append(f"counts in 32 bits, and {name} has {count} elements after padding of head_dim")
    if masked and query[-3] * key[-3] >= 2**31:
        found.append(f"counts in 32 bits, and the mask has {query[-3] * key[-3]} elements for a head")
    return found


def _require(name: str, faults: list[str]) -> None:
    # The rules ask the same; but until the library is loaded they cannot know which release it is.
    if faults:
        raise NotImplementedError(report(f"backend '{name}' cannot run this call:", faults))


def nothing(q: Tensor, return_lse: bool) -> Forward:
    """Results of a call without a query, or without a key to attend to."""
    lse = q.new_full((*q.shape[:-3], q.shape[-2], q.shape[-3]), -math.inf, dtype=torch.float32) if return_lse else None
    return q.new_zeros(q.shape), lse, None


def _dense(
    name: str, library: Dense, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    return_lse: bool,
) -> Forward:  # fmt: skip
    if library.blocks is not None:
        return _by_blocks(library.blocks, q, k, v, is_causal, scale, library.counts_padding), None, None
    width, length = q.shape[-1], k.shape[1]
    if is_causal and -(-length // BLOCK_K) % 2 and library.by_triton(capability_of(q)):
        # It reads blocks of keys in pairs, and so a scale behind the last one, see _sage_rounding.dense. One row more
        # makes another block; K's own mean moves neither the mean nor a scale.
        more = -length % BLOCK_K + 1
        q, v = (F.pad(tensor, (0, 0, 0, 0, 0, more)) for tensor in (q, v))
        k = torch.cat((k, k.mean(1, keepdim=True).expand(-1, more, -1, -1)), 1)
        _require(name, too_large(q.shape, k.shape, False))
        out, lse, _ = _dense(name, library, q, k, v, mask, is_causal, scale, return_lse)
        return out[:, :length], None if lse is None else lse[..., :length], None
    mean = None
    # 2.x subtracts the mean of K while it quantises, which costs nothing. Its lse, however, is put right by a product
    # in the dtype of q.
    if return_lse:
        k, mean = smoothed(k)
    options: dict[str, Any] = {}
    if mean is not None and library.takes_smooth_k:
        options["smooth_k"] = False
    if library.per_warp_on_12 and (capability_of(q) or (0, 0))[0] == 12:
        options["qk_quant_gran"] = "per_warp"  # as the library's own choice passes it there
    if mask is not None:
        options["attn_mask"] = mask
    if return_lse:
        options["return_lse"] = True
        # 2.2.0 repeats the heads of K's mean along the wrong dimension for its lse (thu-ml/SageAttention#306)
        k, v = _repeated(q, k), _repeated(q, v)
    q_, k_, v_ = _widened(q, k, v)

    def run(value: Tensor) -> Any:
        return library.entry(q_, k_, value, tensor_layout="NHD", is_causal=is_causal, sm_scale=scale, **options)

    if not return_lse:
        out = run(v_)
        if library.counts_padding and not is_causal and k.shape[1] % BLOCK_K:
            out = _without_padding(out, run(torch.ones_like(v_)))
        return fit(out, width), None, None
    out, lse = run(v_)
    assert mean is not None
    return fit(out, width), lse + shift(q, mean, scale), None


def _by_blocks(
    library: Blocks, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float, counts_padding: bool
) -> Tensor:
    """1.x by the kernels below its entry, which changes the caller's K in place, and reads behind its scales."""
    mean = k.mean(1, keepdim=True)  # sums in float32, whatever K is
    q8, k8, v16, q_scale, k_scale = _rounding().dense(q, k, v, mean, scale * LOG2_E, _width(q.shape[-1]))
    attend = library.causal if is_causal else library.full

    def run(value: Tensor, dtype: torch.dtype) -> Tensor:
        return attend(q8, k8, value, q_scale, k_scale, tensor_layout="NHD", output_dtype=dtype)

    partial = counts_padding and not is_causal and k.shape[1] % BLOCK_K > 0
    return fit(_attended(run, v16, q.dtype, partial), q.shape[-1])


def _rounding() -> Any:
    from . import _sage_rounding  # imports triton, as the library does

    return _sage_rounding


def _attended(run: Callable[[Tensor, torch.dtype], Tensor], value: Tensor, dtype: torch.dtype, partial: bool) -> Tensor:
    """``run``, and once more for the share of the real keys where it counts those that fill a ``partial`` block."""
    out = run(value, dtype)
    return _without_padding(out, run(torch.ones_like(value), torch.float32)) if partial else out


def _without_padding(out: Tensor, share: Tensor) -> Tensor:
    """``out`` of a kernel that counts the keys it pads a block of 64 with, at a score of 0; ``share`` is its sum of P.

    With v = 1 the same kernel returns L / (L + padding), L the sum that softmax divides by. K without its mean has
    scores around 0, so L >= Sk and the division is a mild one, by 1/64 or more.
    """
    share = share[..., :1].float()
    return torch.where(share > 0.0, out / share, 0.0).to(out.dtype)


def _masked(
    name: str, library: Dense, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, key_padding: Tensor | None,
    scale: float, return_lse: bool,
) -> Forward:  # fmt: skip
    """The Triton entry with a mask: bool, or additive in units of log 2."""
    if key_padding is not None:
        # NaN of a masked key would survive the -1e6 that the kernel adds, and spoil the mean
        unreal = ~key_padding[:, :, None, None]
        k, v = k.masked_fill(unreal, 0.0), v.masked_fill(unreal, 0.0)
        mask = key_padding[:, None, None, :]
    assert mask is not None
    empty = masks.empty_rows(mask)  # the kernel averages all values there
    if mask.dtype != torch.bool:
        # scores are in base 2 inside, which the kernel forgets for the mask; -inf would give it inf - inf
        smallest = torch.finfo(q.dtype).min
        mask = (mask.float() * LOG2_E).clamp(min=smallest).to(q.dtype)
    out, lse, _ = _dense(name, library, q, k, v, mask, False, scale, return_lse)
    out = out.masked_fill(empty.transpose(1, 2), 0.0)
    return out, None if lse is None else lse.masked_fill(empty.squeeze(-1), -math.inf), None


def _flattened(
    library: Packed, q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Dense attention by the packed kernels: (B, Sq, H, D). Masked keys are left out while K and V are rounded."""
    batch = PackedBatch(q, k, key_padding)
    if batch.packing is None:
        mean, source = k.mean(1), None
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    else:
        mean, source = _rounding().mean_of_real(k, key_padding), batch.packing.source
    out = _packed(library, q.flatten(0, 1), k, v, mean, source, *batch.lengths, is_causal, scale)
    return out.unflatten(0, q.shape[:2])


def _packed(
    library: Packed, q: Tensor, k: Tensor, v: Tensor, mean: Tensor, source: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, is_causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    """(Tq, H, D); rows behind the last sequence are whatever was in memory. K and V: see _sage_rounding.packed.

    The library's own entry waits for the device to learn how many scales there are (CUDA graphs refuse that) and
    subtracts one mean of K from all sequences. Below it lie these kernels.
    """
    starts = cu_seqlens_q, cu_seqlens_k
    blocks = _blocks(cu_seqlens_q, BLOCK_Q), _blocks(cu_seqlens_k, BLOCK_K)
    longest = max_seqlen_q, max_seqlen_k
    q8, k8, v16, q_scale, k_scale = _rounding().packed(
        q, k, v, mean, source, starts, blocks, longest, scale * LOG2_E, _width(q.shape[-1])
    )
    attend = library.causal if is_causal else library.full

    def run(value: Tensor, dtype: torch.dtype) -> Tensor:
        return attend(q8, k8, value, *starts, max_seqlen_q, q_scale, k_scale, *blocks, output_dtype=dtype)

    # whether a sequence fills its last block is known on the device alone
    return fit(_attended(run, v16, q.dtype, library.counts_padding and not is_causal), q.shape[-1])


def _blocks(cu_seqlens: Tensor, block: int) -> Tensor:
    """Where the scales of a sequence start, int64 (N + 1,): one for each block of rows, and one behind them that stays
    0 (see _sage_rounding.dense).
    """
    return F.pad(((cu_seqlens.diff() + (2 * block - 1)) // block).cumsum(0), (1, 0))


def smoothed(k: Tensor) -> tuple[Tensor, Tensor]:
    """K (B, Sk, Hk, D) less its mean over the keys, and that mean (B, 1, Hk, D). Softmax sees no difference."""
    mean = k.mean(1, keepdim=True)  # sums in float32, whatever K is
    return k - mean, mean


def means_packed(k: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """Means of the sequences of packed K (Tk, Hk, D): (N, Hk, D).

    One mean of the whole batch, as the library takes it, leaves in the int8 scales what sequences differ by: with keys
    of unit variance round -2 and 2 the error is 1.2 to 1.3 times as large, round -8 and 8 2.1 to 2.4 times
    (tests/test_sage.py). By a matrix product: atomic additions of 100k rows to a few are slow and differ from run to
    run.
    """
    sequences = cu_seqlens_k.shape[0] - 1
    rows = k.flatten(1)
    of = masks.segments(cu_seqlens_k, k.shape[0])
    member = of[:, None] == torch.arange(sequences, device=k.device)
    # 0 * NaN is NaN: a key that is not finite, of another sequence or behind the last one, would reach every mean
    real = rows.nan_to_num(0.0, 0.0, 0.0)
    lengths = cu_seqlens_k.diff().clamp(min=1)
    return ((member / lengths).to(k.dtype).T @ real).unflatten(1, k.shape[1:])


def shift(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """What taking ``mean`` (B, 1, Hk, D) from K took from every score of a row: float32 (B, H, Sq)."""
    mean = _repeated(q, mean)
    return (q.float() * mean.float()).sum(-1).transpose(1, 2) * scale


def _repeated(q: Tensor, k: Tensor) -> Tensor:
    group = q.shape[2] // k.shape[2]
    return k if group == 1 else k.repeat_interleave(group, 2)


def _width(head_dim: int) -> int:
    return next(width for width in WIDTHS if head_dim <= width)


def _widened(*tensors: Tensor) -> list[Tensor]:
    padding = _width(tensors[0].shape[-1]) - tensors[0].shape[-1]
    if padding:
        return [F.pad(tensor, (0, padding)) for tensor in tensors]
    # the quantising kernels read 16 bytes at a time, and say nothing when rows lie elsewhere
    return [aligned(tensor) for tensor in tensors]
