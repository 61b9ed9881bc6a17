"""AMD's AI Tensor Engine for ROCm: `aiter`, from the package amd-aiter (the PyPI package called aiter is another one).

Its assembly kernels are reached through ``_flash_attn_forward`` and its like, the Composable Kernel (CK) ones through
``mha_fwd``; which of the two a call may use is decided here where the library decides wrongly (see :class:`Aiter`).
Bound to the signatures of amd-aiter 0.1.7.post2.dev18 and its C++ source; not run on hardware.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.operators import Kernels, lse_dtype
from compiled_attn.packages import Package, parameters, require
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import CAUSAL, Call, Limits

from . import _flash_common
from ._flash_common import OPEN, Lengths, Loader, Window, fake_dropout_state, padding_and_positions
from ._native_dense import aligned, aligned_bias, empty_to, fit, resolved_scale

# What some releases ask for besides, all meaning "none of it".
_NOTHING = {
    "sink_size": 0, "bias": None, "alibi_slopes": None, "return_softmax": False, "return_dropout_randval": False,
    "min_seqlen_q": 0, "logits_soft_cap": 0.0, "zero_tensors": False, "cu_seqlens_q_padded": None,
    "cu_seqlens_k_padded": None, "dbias": None,
}  # fmt: skip
_PACKED = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def _function(module: Any, name: str, *needed: str) -> Any:
    """``module.name`` to be called with ``needed`` as keywords, and :data:`_NOTHING` for what else it has of that."""
    # aiter hides most signatures behind (*args, **kwargs) and an operator of the same name
    operator = getattr(torch.ops.aiter, name, None)
    function = require(module, name, *needed, operator=operator)
    known = parameters(function, operator)
    rest = {parameter: value for parameter, value in _NOTHING.items() if parameter in known}

    def call(**arguments: Any) -> Any:
        return function(**{**rest, **arguments})

    return call


def _past_window(lengths: Lengths, window: Window) -> Lengths:
    """The kernels take a window's right part >= max_seqlen_k for an open one: wrong for rows with Sq > Sk."""
    return (*lengths[:3], max(lengths[3], window[1] + 1))


class Aiter:
    """The raw functions of amd-aiter; see :class:`compiled_attn.ops._flash_common.Library`.

    Windows go to CK: the library takes its assembly kernels for windows (0, 0) and (0, -1), which they do not know.
    So does the backward of causal calls whose lengths differ, or may: its assembly kernels align at the upper left
    (mha.py says so beside the choice), the forward at the lower right.
    """

    empty_lse = -math.inf
    dense_queries_on = ()

    def __init__(self, module: Any) -> None:
        tensors = ("q", "k", "v", "dropout_p", "softmax_scale", "window_size_left", "window_size_right")
        gradients = (*tensors, "dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic", "rng_state")
        forward, raw = (*tensors, "causal", "return_lse"), (*tensors, "is_causal", "return_softmax_lse")
        self._forward = _function(module, "_flash_attn_forward", *forward)
        self._packed_forward = _function(module, "_flash_attn_varlen_forward", *forward, *_PACKED)
        self._backward = _function(module, "_flash_attn_backward", *gradients, "causal")
        self._packed_backward = _function(module, "_flash_attn_varlen_backward", *gradients, "causal", *_PACKED)
        self._ck_forward = _function(module, "mha_fwd", *raw, "bias")
        self._ck_packed_forward = _function(module, "mha_varlen_fwd", *raw, *_PACKED)
        self._ck_backward = _function(module, "mha_bwd", *gradients, "is_causal", "bias")
        self._ck_packed_backward = _function(module, "mha_varlen_bwd", *gradients, "is_causal", *_PACKED)

    def packs(self, q_length: int, k_length: int, window: Window) -> bool:
        return q_length > k_length and window[1] >= k_length  # see _past_window

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, scale: float, causal: bool, window: Window,
        dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        options = {
            "q": q, "k": k, "v": v, "dropout_p": dropout_p, "softmax_scale": scale, "window_size_left": window[0],
            "window_size_right": window[1],
        }  # fmt: skip
        if lengths is not None:
            options.update(zip(_PACKED, _past_window(lengths, window), strict=True))
        if window == OPEN:
            function = self._forward if lengths is None else self._packed_forward
            results = function(causal=causal, return_lse=return_lse, **options)
        else:
            function = self._ck_forward if lengths is None else self._ck_packed_forward
            results = function(is_causal=causal, return_softmax_lse=return_lse, **options)
        out, lse, _, rng = results
        lse = empty_to(lse, math.inf, -math.inf) if return_lse else None  # +inf where max_seqlen_k is 0
        if lengths is not None:
            lonely = masks.lonely(out, *lengths[:2])
            out = out.masked_fill(lonely[:, None, None], 0.0)
            lse = None if lse is None else lse.masked_fill(lonely, -math.inf)
        return out, lse, rng

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths | None,
        scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in (q, k, v))
        options = {
            "dout": grad_out, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv,
            "dropout_p": dropout_p, "softmax_scale": scale, "window_size_left": window[0],
            "window_size_right": window[1], "deterministic": deterministic,
            # mha_bwd reads where it points without dropout too
            "rng_state": state if dropout_p > 0.0 else state.new_zeros(2),
        }  # fmt: skip
        differ = lengths is not None or q.shape[1] != k.shape[1]
        through_ck = window != OPEN or (causal and differ)
        if lengths is None:
            if through_ck:
                self._ck_backward(is_causal=causal, **options)
            else:
                self._backward(causal=causal, **options)
            return dq, dk, dv
        options.update(zip(_PACKED, _past_window(lengths, window), strict=True))
        if through_ck:
            self._ck_packed_backward(is_causal=causal, **options)
        else:
            self._packed_backward(causal=causal, **options)
        starts_q, starts_k = lengths[:2]
        lonely_q, lonely_k = masks.lonely(q, starts_q, starts_k), masks.lonely(k, starts_k, starts_q)
        dq, dk, dv = (
            gradient.masked_fill(lonely[:, None, None], 0.0)
            for gradient, lonely in ((dq, lonely_q), (dk, lonely_k), (dv, lonely_k))
        )
        return dq, dk, dv

    def biased(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """out and lse with one additive bias (Sq, Sk) for all heads of all sequences: what CK takes."""
        results = self._ck_forward(
            q=q, k=k, v=v, dropout_p=0.0, softmax_scale=scale, is_causal=False, window_size_left=-1,
            window_size_right=-1, return_softmax_lse=return_lse, bias=bias,
        )  # fmt: skip
        return results[0], results[1]

    def biased_backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor, scale: float,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (torch.empty_like(one, memory_format=torch.contiguous_format) for one in (q, k, v))
        self._ck_backward(
            dout=grad_out, q=q, k=k, v=v, out=out, softmax_lse=lse, dropout_p=0.0, softmax_scale=scale,
            is_causal=False, window_size_left=-1, window_size_right=-1, deterministic=deterministic, dq=dq, dk=dk,
            dv=dv, bias=bias, rng_state=torch.zeros(2, dtype=torch.int64, device=q.device),
        )  # fmt: skip
        return dq, dk, dv


PACKAGE = Package(
    "aiter.ops.mha",
    "amd-aiter",
    minimum="0.1.5",
    install="pip install amd-aiter on a ROCm machine (the package called aiter is another project: uninstall it)",
    bind=Aiter,
)
_plain, _, _varlen = _flash_common.kernels(PACKAGE, dropout=True)


# --------------------------------------------------------------------------------------------------------- masks


def _full_mask(q: Tensor, k: Tensor, mask: Any, key_padding: Any, causal: int, window: Any) -> Tensor | None:
    """The 4-D mask of a call that packing does not serve; None for the others."""
    if mask is None and (key_padding is None or not (causal & CAUSAL or window is not None)):
        return None
    keep = masks.positions(q.shape[1], k.shape[1], causal, window, q.device)
    return masks.combined(mask, key_padding, keep)


def _parts(full: Tensor, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Sequences, query heads and key heads that share one (Sq, Sk) bias; the library takes no other."""
    group = q.shape[2] // k.shape[2]
    everything = slice(None)
    for sequence in range(full.shape[0]):
        for head in range(full.shape[1]):
            bias = masks.additive(full[sequence, head], q.dtype).expand(q.shape[1], k.shape[1])
            yield (
                everything if full.shape[0] == 1 else slice(sequence, sequence + 1),
                everything if full.shape[1] == 1 else slice(head, head + 1),
                everything if full.shape[1] == 1 else slice(head // group, head // group + 1),
                aligned_bias(bias.contiguous()),
            )


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    full = None if q.numel() == 0 or k.numel() == 0 else _full_mask(q, k, mask, key_padding, causal, window)
    if full is None:
        return _plain.forward(
            q, k, v, None, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse
        )
    library: Aiter = PACKAGE.load()
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype(q.dtype)) if return_lse else None
    for sequences, heads, key_heads, bias in _parts(full, q, k):
        part, part_lse = library.biased(
            aligned(q[sequences, :, heads]), aligned(k[sequences, :, key_heads]), aligned(v[sequences, :, key_heads]),
            bias, resolved_scale(q, scale), return_lse,
        )  # fmt: skip
        out[sequences, :, heads] = fit(part, v.shape[-1])
        if lse is not None:
            lse[sequences, heads] = part_lse
    empty = masks.empty_rows(full)  # a row of -inf alone gives NaN: CK divides by the sum unless its own mask is on
    out = out.masked_fill(empty.transpose(1, 2), 0.0)
    return out, None if lse is None else lse.masked_fill(empty.squeeze(-1), -math.inf), None


def dense_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:  # fmt: skip
    full = None if q.numel() == 0 or k.numel() == 0 else _full_mask(q, k, mask, key_padding, causal, window)
    if full is None:
        assert _plain.backward is not None
        return _plain.backward(  # type: ignore[return-value]
            grad_out, q, k, v, None, key_padding, out, lse, state, dropout_p, causal, scale, gqa, window,
            deterministic, False,
        )  # fmt: skip
    library: Aiter = PACKAGE.load()
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (one.new_zeros(one.shape, dtype=lse_dtype(q.dtype)) for one in (k, v))  # sums over the parts
    for sequences, heads, key_heads, bias in _parts(full, q, k):
        upstream, part_q, part_out = (aligned(one[sequences, :, heads]) for one in (grad_out, q, out))
        part_k, part_v = (aligned(one[sequences, :, key_heads]) for one in (k, v))
        gradients = library.biased_backward(
            upstream, part_q, part_k, part_v, part_out, lse[sequences, heads].contiguous(), bias,
            resolved_scale(q, scale), deterministic,
        )  # fmt: skip
        dq[sequences, :, heads] = fit(gradients[0], q.shape[-1])
        dk[sequences, :, key_heads] += fit(gradients[1], k.shape[-1])
        dv[sequences, :, key_heads] += fit(gradients[2], v.shape[-1])
    dq = dq.masked_fill(masks.empty_rows(full).transpose(1, 2), 0.0)
    return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _masked_dropout(call: Call) -> str | None:
    positional = call.causal or call.window is not None
    biased = call.mask in ("bool", "float") or (call.mask == "key_padding" and positional)
    if call.dropout_p > 0.0 and biased:
        return (
            "has no dropout with a mask that goes in as a bias: one call for each bias, and each draws its own numbers"
        )
    return None


# Its README: most Composable Kernel and assembly kernels are for CDNA alone. What it builds of those: gfx90a and later.
CDNA = ("gfx90a", "gfx942", "gfx950")
# rocm-archs in the build.toml of kernels-community/aiter-flash-attn-ck
HUB_BUILDS = ("gfx942", "gfx950")


def unsuitable(builds: Sequence[str]) -> list[str]:
    """Why this PyTorch, or every GPU it sees, cannot run kernels for the ROCm targets ``builds``."""
    if torch.version.hip is None:
        return ["runs on ROCm alone, and this PyTorch is not built for it"]
    if not torch.cuda.is_available():
        return []
    names = (torch.cuda.get_device_properties(index).gcnArchName for index in range(torch.cuda.device_count()))
    seen = sorted({name.partition(":")[0] for name in names})
    return [] if set(seen) & set(builds) else [f"has kernels for {', '.join(builds)}, and there is {', '.join(seen)}"]


_SHARED: dict[str, Any] = {"min_capability": None, "verified": "contract"}
LIMITS = _flash_common.limits(
    dropout=True, masks=("none", "key_padding", "bool", "float"), also=(_masked_dropout,), **_SHARED
)
VARLEN_LIMITS = _flash_common.limits(dropout=True, masks=("none",), also=(), **_SHARED)

register_backend(
    Backend(
        "aiter",
        "AMD's AI Tensor Engine for ROCm (amd-aiter)",
        family="AITER",
        packages=(PACKAGE,),
        available=functools.partial(unsuitable, CDNA),
        limits=(LIMITS,),
        dense=Kernels(dense_forward, dense_backward, random=True, fake_state=fake_dropout_state),
        varlen_limits=(VARLEN_LIMITS,),
        varlen=_varlen,
    )
)


# -------------------------------------------------------------------- the Hub's build of the CK kernels, forward only


class AiterForward:
    """kernels-community/aiter-flash-attn-ck: the same conventions behind two public functions, without a backward."""

    empty_lse = -math.inf
    dense_queries_on = ()
    packs = Aiter.packs

    def __init__(self, module: Any) -> None:
        options = ("dropout_p", "softmax_scale", "causal", "window_size", "return_lse")
        self._forward = require(module, "flash_attn_func", "q", "k", "v", *options)
        self._packed_forward = require(module, "flash_attn_varlen_func", "q", "k", "v", *_PACKED, *options)
        # (left, right), or (left, right, sink) since sinks came
        default = inspect.signature(self._forward).parameters["window_size"].default
        self._sink = (0,) * (len(default) - 2)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, scale: float, causal: bool, window: Window,
        dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
        options = {
            "dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size": (*window, *self._sink),
            "return_lse": return_lse,
        }  # fmt: skip
        if lengths is None:
            results = self._forward(q, k, v, **options)
        else:
            options.update(zip(_PACKED, _past_window(lengths, window), strict=True))
            results = self._packed_forward(q, k, v, **options)
        out, lse = results if return_lse else (results, None)
        lse = None if lse is None else empty_to(lse, math.inf, -math.inf)
        if lengths is not None:
            lonely = masks.lonely(out, *lengths[:2])
            out = out.masked_fill(lonely[:, None, None], 0.0)
            lse = None if lse is None else lse.masked_fill(lonely, -math.inf)
        return out, lse, None


def hub_kernels(package: Loader) -> tuple[Kernels, Kernels]:
    """Dense and packed kernels of what ``package`` loads, bound by :class:`AiterForward`: inference only."""
    dense, _, varlen = _flash_common.kernels(package)
    return Kernels(dense.forward), Kernels(varlen.forward)


HUB_LIMITS: Limits = _flash_common.limits(gradient=False, also=(padding_and_positions,), **_SHARED)
HUB_VARLEN_LIMITS: Limits = _flash_common.limits(gradient=False, masks=("none",), also=(), **_SHARED)
