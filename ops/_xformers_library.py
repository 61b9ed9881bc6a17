"""What xFormers must offer, bound and checked once: the package behind ops/xformers.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compiled_attn import masks
from compiled_attn.packages import Package, Unfit, parameters, require

from ._flash_common import Lengths, Window
from .flash2 import Flash2, _bounds


class Flash:
    """xFormers' flash operator, FlashAttention-2; see :class:`compiled_attn.ops._flash_common.Library`.

    Called itself, under the classes for biases: those want Python lists of lengths, it takes cu_seqlens on the device,
    windows and grouped heads. ``seed_dtype`` is what its random state is stored in.
    """

    empty_lse = math.inf
    dense_queries_on = ()
    packs = Flash2.packs

    def __init__(self, forward: Any, backward: Any, seed_dtype: torch.dtype) -> None:
        self._forward, self._backward, self._seed_dtype = forward, backward, seed_dtype

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, scale: float, causal: bool, window: Window,
        dropout_p: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        starts, most, window = _lengths(q, k, lengths, causal, window)
        out, lse, seeds = self._forward(q, k, v, *starts, None, *most, dropout_p, scale, causal, *window, False, None)
        return out, lse, seeds.view(torch.int64) if dropout_p > 0.0 else None

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lengths: Lengths | None,
        scale: float, causal: bool, window: Window, dropout_p: float, deterministic: bool, state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        starts, most, window = _lengths(q, k, lengths, causal, window)
        seeds = state.view(self._seed_dtype) if dropout_p > 0.0 else None
        dq, dk, dv = self._backward(
            False, grad_out, q, k, v, out, lse, *starts, *most, dropout_p, scale, causal, *window, seeds
        )
        if lengths is None:
            return dq, dk, dv
        starts_q, starts_k = lengths[:2]
        return masks.clear_behind(dq, starts_q), masks.clear_behind(dk, starts_k), masks.clear_behind(dv, starts_k)


def _lengths(
    q: Tensor, k: Tensor, lengths: Lengths | None, causal: bool, window: Window
) -> tuple[tuple[Any, Any], tuple[int, int], Window]:
    """cu_seqlens (or None), bounds of the lengths, and the window that goes with them."""
    if lengths is None:
        return (None, None), (q.shape[1], k.shape[1]), window
    lengths, window = _bounds(lengths, causal, window)
    return lengths[:2], lengths[2:], window


class Library(NamedTuple):
    """What the kernels call: the flash operator, and the CUTLASS one through the classes that it wants."""

    flash: Flash
    cutlass_forward: Any
    cutlass_backward: Any
    inputs: Any
    context: Any
    causal: Any
    block_diagonal: Any
    block_diagonal_causal: Any
    lengths: Any


_SPAN = ("max_seqlen_q", "max_seqlen_k", "p", "softmax_scale", "is_causal", "window_left", "window_right")
_STARTS = ("cu_seqlens_q", "cu_seqlens_k")
_FORWARD = ("query", "key", "value", *_STARTS, "seqused_k", *_SPAN, "return_softmax", "block_tables")
_BACKWARD = ("grads_share_storage", "grad", "query", "key", "value", "out", "lse", *_STARTS, *_SPAN, "rng_state")


def _bind(module: Any) -> Library:
    loading: Any = require(module, "_cpp_lib")
    error = loading._cpp_library_load_exception
    if error is not None:  # it was a warning only, when xformers was imported
        while error.__cause__ is not None:  # the loader's own words are under torch's and xFormers'
            error = error.__cause__
        text = " ".join(str(error).split())
        if "libcudart" in text:
            raise Unfit(
                f"its compiled part does not load ({text}); pip install nvidia-cuda-runtime-cu12 and put its lib "
                "folder on LD_LIBRARY_PATH, or install the wheel from https://download.pytorch.org/whl/cu130"
            )
        raise Unfit(f"its compiled part does not load ({text}); install the build for torch {torch.__version__}")
    try:
        from xformers.ops import fmha
    except ModuleNotFoundError as missing:
        if missing.name is None or not missing.name.startswith("flash_attn"):
            raise
        raise Unfit(
            f"xformers.ops does not import: it finds flash-attn-4, which has no {missing.name}, and takes it for "
            "flash-attn; pip install flash-attn beside it, or uninstall flash-attn-4"
        ) from missing
    except ImportError as wrong:
        if "Flash-Attention" not in str(wrong):
            raise
        raise Unfit(f"xformers.ops does not import: {wrong} Install such a flash-attn, or none") from wrong
    flash, cutlass, biases = fmha.flash, fmha.cutlass, fmha.attn_bias
    lacking = [label for label, op in (("flash", flash.FwOp), ("CUTLASS", cutlass.FwOp)) if not op.is_available()]
    if lacking:
        raise Unfit(f"has no {' and no '.join(lacking)} operator here: this PyTorch was built without it")
    for path, *names in (
        ("common.Inputs", "query", "key", "value", "attn_bias", "p", "scale"),
        ("common.Context", "lse", "out"),
        ("cutlass.FwOp.apply", "inp", "needs_gradient"),
        ("cutlass.BwOp.apply", "ctx", "inp", "grad"),
        ("attn_bias._SeqLenInfo", "seqstart", "max_seqlen", "min_seqlen", "seqstart_py"),
    ):
        require(fmha, path, *names)
    # passed by position, so the whole list must be as it is known
    for operator, known in ((flash.FwOp.OPERATOR, _FORWARD), (flash.BwOp.OPERATOR, _BACKWARD)):
        found = parameters(operator)
        if found != known:
            raise Unfit(f"its flash operator takes {', '.join(found)}; known is {', '.join(known)}")
    # PyTorch's flash stores seed and offset as uint64 (named "...-pt"), the flash-attn package as int64
    seed_dtype = torch.uint64 if flash.FwOp.NAME.endswith("-pt") else torch.int64
    return Library(
        Flash(flash.FwOp.OPERATOR, flash.BwOp.OPERATOR, seed_dtype), cutlass.FwOp, cutlass.BwOp, fmha.common.Inputs,
        fmha.common.Context, biases.LowerTriangularMask, biases.BlockDiagonalMask, biases.BlockDiagonalCausalMask,
        biases._SeqLenInfo,
    )  # fmt: skip


PACKAGE = Package("xformers", "xformers", minimum="0.0.33", bind=_bind)
