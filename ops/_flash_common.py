"""What FlashAttention 2, 3 and 4 have in common: the three kernels of a backend, made from one library's raw functions.

Everything between our schema and a library is here: padding of head_dim, packing by key-padding masks, empty tensors,
rows behind the last sequence, rows with nothing to attend to. What tells the releases apart is in their own files, as
a :class:`Library`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels, expected_shapes, lse_dtype
from compiled_attn.spec import CAUSAL, LOW_PRECISION, LOWER_RIGHT, Call, Limits

from ._native_dense import aligned, empty_to, fit, resolved_scale
from ._packing import PackedBatch
from ._quick_launch import capability_of

# cu_seqlens_q, cu_seqlens_k and bounds of the lengths of query and key; None for a dense call
Lengths = tuple[Tensor, Tensor, int, int]
# the same for dense queries beside packed keys, which only a library with ``dense_queries_on`` gets
KeyLengths = tuple[None, Tensor, int, int]
Window = tuple[int, int]
OPEN: Window = (-1, -1)


class Library(Protocol):
    """One release of FlashAttention, bound: positions are aligned at the lower right, a window of -1 is open.

    Tensors come with head_dim a multiple of 8 and rows at multiples of 16 bytes, (B, S, H, D), or (T, H, D) with
    ``lengths``; never without an element.
    """

    empty_lse: float  # what it writes for a row with nothing to attend to
    # compute capabilities on which its forward takes (B, Sq, H, D) queries beside packed keys
    dense_queries_on: tuple[tuple[int, int], ...]

    def packs(self, q_length: int, k_length: int, window: Window) -> bool:
        """Whether a dense call must go to the packed entry, as the dense one would be wrong."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | KeyLengths | None, scale: float, causal: bool,
        window: Window, dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """out, lse and the random state; rows behind the last sequence may hold anything."""

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths | None,
        scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq, dk and dv, 0 behind the last sequence."""


class Loader(Protocol):
    """A :class:`compiled_attn.packages.Package`, or what else can load a library (the Hub's kernels)."""

    def load(self) -> Any:
        """The :class:`Library`."""


def fake_dropout_state(q: Tensor, dropout_p: float) -> Tensor:
    """int64 (2,), seed and offset of the numbers drawn; empty without dropout."""
    return q.new_empty(2 if dropout_p > 0.0 else 0, dtype=torch.int64)


def padding_and_positions(call: Call) -> str | None:
    """Keys are packed by a key-padding mask, which moves them: positions are lost."""
    if call.mask == "key_padding" and (call.causal or call.window is not None):
        return (
            "packs the real keys, so that it cannot place a causal mask or a window over a key-padding mask; use a "
            "backend that takes real masks, or varlen_attention, where positions count inside each sequence"
        )
    return None


def limits(**differing: Any) -> Limits:
    """Limits that the FlashAttention releases share, with what is ``differing``."""
    shared: dict[str, Any] = {
        "devices": ("cuda",),
        "dtypes": tuple(reversed(LOW_PRECISION)),
        "min_capability": None if "capabilities" in differing else (8, 0),
        "max_head_dim": 256,
        "masks": ("none", "key_padding"),
        "alignments": (LOWER_RIGHT,),
        "window": True,
        "also": (padding_and_positions,),
    }
    return Limits(**{**shared, **differing})


def _options(q: Tensor, causal: int, scale: float | None, window: Any) -> tuple[float, bool, Window]:
    """Scale, causal and window as libraries take them: the two together are a window whose right part is 0."""
    span: Window = OPEN if window is None else (window[0], window[1])
    is_causal = bool(causal & CAUSAL)
    if is_causal and span[0] >= 0:
        is_causal, span = False, (span[0], 0)
    elif is_causal:
        span = OPEN
    return resolved_scale(q, scale), is_causal, span


def _nothing(q: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """The result where there are no queries or no keys: kernels divide by zero, or start with an empty grid."""
    out_shape, lse_shape = expected_shapes(q, v)
    lse = q.new_full(lse_shape, -math.inf, dtype=lse_dtype(q.dtype))
    return q.new_zeros(out_shape), lse, fake_dropout_state(q, dropout_p).zero_()


def _call(
    library: Library, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | KeyLengths | None, scale: float,
    causal: bool, window: Window, dropout_p: float, return_lse: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    out, lse, rng = library.forward(
        aligned(q), aligned(k), aligned(v), lengths, scale, causal, window, dropout_p, return_lse
    )
    if not return_lse:
        lse = None
    elif lse is not None and library.empty_lse != -math.inf:
        lse = empty_to(lse, library.empty_lse, -math.inf)
    return fit(out, v.shape[-1]), lse, rng if dropout_p > 0.0 else None


def _call_backward(
    library: Library, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lengths: Lengths | None, scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if library.empty_lse != -math.inf:
        lse = empty_to(lse, -math.inf, library.empty_lse)
    dq, dk, dv = library.backward(
        aligned(grad_out), aligned(q), aligned(k), aligned(v), aligned(out), lse.contiguous(), lengths, scale, causal,
        window, dropout_p, deterministic, state,
    )  # fmt: skip
    return fit(dq, q.shape[-1]), fit(dk, k.shape[-1]), fit(dv, v.shape[-1])


def kernels(package: Loader, dropout: bool = False) -> tuple[Kernels, Kernels, Kernels]:
    """The dense kernels of the library that ``package`` loads, the dense ones that always pack, and the varlen ones.

    The second are for a packed name (``flash_varlen``) in ``attention``.
    """

    def dense_forward(always_pack: bool) -> Any:
        def forward(
            q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
            causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None,
            deterministic: bool = False, return_lse: bool = False,
        ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
            library = package.load()
            if q.numel() == 0 or k.numel() == 0:
                return _nothing(q, v, dropout_p)
            options = _options(q, causal, scale, window)
            if key_padding is None and not always_pack and not library.packs(q.shape[1], k.shape[1], options[2]):
                return _call(library, q, k, v, None, *options, dropout_p, return_lse)
            packed = PackedBatch(q, k, key_padding)
            key, value = packed.keys(k, v)
            if capability_of(q) in library.dense_queries_on:
                lengths: KeyLengths = (None, packed.cu_seqlens_k, q.shape[1], k.shape[1])
                return _call(library, q, key, value, lengths, *options, dropout_p, return_lse)
            out, lse, rng = _call(
                library, q.flatten(0, 1), key, value, packed.lengths, *options, dropout_p, return_lse
            )  # fmt: skip
            if lse is not None:
                lse = lse.unflatten(1, q.shape[:2]).transpose(0, 1)
            return out.unflatten(0, q.shape[:2]), lse, rng

        return forward

    def dense_backward(always_pack: bool) -> Any:
        def backward(
            grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
            state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any,
            deterministic: bool, mask_gradient: bool,
        ) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
            library = package.load()
            if q.numel() == 0 or k.numel() == 0:
                return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
            options = (*_options(q, causal, scale, window), dropout_p, deterministic, state)
            if key_padding is None and not always_pack and not library.packs(q.shape[1], k.shape[1], options[2]):
                return *_call_backward(library, grad_out, q, k, v, out, lse, None, *options), None
            packed = PackedBatch(q, k, key_padding)
            key, value = packed.keys(k, v)
            dq, dk, dv = _call_backward(
                library, grad_out.flatten(0, 1), q.flatten(0, 1), key, value, out.flatten(0, 1),
                lse.transpose(0, 1).flatten(1), packed.lengths, *options,
            )  # fmt: skip
            return dq.unflatten(0, q.shape[:2]), packed.unpacked(dk), packed.unpacked(dv), None

        return backward

    def varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
        window: Any = None, deterministic: bool = False, return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        library = package.load()
        if q.numel() == 0 or k.numel() == 0:
            return _nothing(q, v, dropout_p)
        lengths = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
        options = _options(q, causal, scale, window)
        out, lse, rng = _call(library, q, k, v, lengths, *options, dropout_p, return_lse)
        if lse is not None:
            lse = lse.masked_fill_(masks.behind(q, cu_seqlens_q), -math.inf)
        return masks.clear_behind(out, cu_seqlens_q), lse, rng

    def varlen_backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int,
        scale: float | None, gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
        library = package.load()
        if q.numel() == 0 or k.numel() == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
        lengths = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k)
        options = (*_options(q, causal, scale, window), dropout_p, deterministic, state)
        return *_call_backward(library, grad_out, q, k, v, out, lse, lengths, *options), None

    shared: dict[str, Any] = {"random": True, "fake_state": fake_dropout_state} if dropout else {}
    return (
        Kernels(dense_forward(False), dense_backward(False), **shared),
        Kernels(dense_forward(True), dense_backward(True), **shared),
        Kernels(varlen_forward, varlen_backward, **shared),
    )
