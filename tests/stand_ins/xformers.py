"""xformers 0.0.35 on a CPU: its flash and CUTLASS operators, by their sources, in float64.

The flash operator is FlashAttention-2 (see flash2 and flash_exact). The CUTLASS one aligns causal masks as their class
says, keeps lse in rows of a multiple of 32, packed ones by sequence, and leaves NaN wherever no key or no query met.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from recorded import as_recorded, bound
from torch import Tensor

from . import flash2, flash_exact
from .flash_exact import Batch

FMHA = "xformers.ops.fmha"
GARBAGE = 7.0  # what the operator stores as lse of an empty row is nobody's business


class Operator:
    """An operator as torch.ops has it: called, with a schema, without a signature."""

    def __init__(self, recorded: str, function: Any) -> None:
        names = bound("xformers", recorded).parameters
        arguments = [types.SimpleNamespace(name=name) for name in names]
        schema = types.SimpleNamespace(name=recorded, arguments=arguments)
        self.default = types.SimpleNamespace(_schema=schema)
        self._call = as_recorded("xformers", recorded)(function)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def record(recorded: str, name: str, *bases: type) -> type:
    """A class whose instances take what the recorded dataclass takes."""

    def fill(self: Any, *args: Any, **kwargs: Any) -> None:
        as_recorded("xformers", recorded)(lambda **fields: self.__dict__.update(fields))(*args, **kwargs)

    made = type(name, bases, {"__init__": fill})
    made.__signature__ = bound("xformers", recorded)  # type: ignore[attr-defined]
    return made


SeqLenInfo = record(f"{FMHA}.attn_bias:_SeqLenInfo", "_SeqLenInfo")
BlockDiagonalMask = record(f"{FMHA}.attn_bias:BlockDiagonalMask", "BlockDiagonalMask")
BlockDiagonalCausalMask = type("BlockDiagonalCausalMask", (BlockDiagonalMask,), {})
LowerTriangularMask = type("LowerTriangularMask", (), {})
Inputs = record(f"{FMHA}.common:Inputs", "Inputs")
Context = record(f"{FMHA}.common:Context", "Context")
Gradients = record(f"{FMHA}.common:Gradients", "Gradients")


class Library:
    """``calls`` counts; ``module`` is what ``import xformers`` would give, ``modules`` what sys.modules would hold."""

    def __init__(self, pytorch_flash: bool = True) -> None:
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.seeds = torch.uint64 if pytorch_flash else torch.int64
        common = types.SimpleNamespace(Inputs=Inputs, Context=Context, Gradients=Gradients)
        biases = types.SimpleNamespace(
            _SeqLenInfo=SeqLenInfo, BlockDiagonalMask=BlockDiagonalMask, LowerTriangularMask=LowerTriangularMask,
            BlockDiagonalCausalMask=BlockDiagonalCausalMask,
        )  # fmt: skip
        name = "fa2F@2.7.4-pt" if pytorch_flash else "fa2F@2.8.3"
        flash = types.SimpleNamespace(
            FwOp=self._operation(NAME=name, OPERATOR=Operator(f"{FMHA}.flash:_flash_fwd", self.flash_forward)),
            BwOp=self._operation(NAME=name, OPERATOR=Operator(f"{FMHA}.flash:_flash_bwd", self.flash_backward)),
        )
        forward = as_recorded("xformers", f"{FMHA}.cutlass:FwOp.apply")(self.cutlass_forward)
        backward = as_recorded("xformers", f"{FMHA}.cutlass:BwOp.apply")(self.cutlass_backward)
        cutlass = types.SimpleNamespace(
            FwOp=self._operation(apply=classmethod(forward)), BwOp=self._operation(apply=classmethod(backward))
        )
        self.module = types.ModuleType("xformers")
        self.module._cpp_lib = types.SimpleNamespace(_cpp_library_load_exception=None)  # type: ignore[attr-defined]
        ops, fmha = types.ModuleType("xformers.ops"), types.ModuleType(FMHA)
        fmha.__dict__.update(flash=flash, cutlass=cutlass, attn_bias=biases, common=common)
        ops.fmha = fmha  # type: ignore[attr-defined]
        self.modules = {"xformers": self.module, "xformers.ops": ops, FMHA: fmha}

    def _operation(self, **members: Any) -> type:
        return type("Op", (), {"is_available": classmethod(lambda cls: True), **members})

    # ------------------------------------------------------------------------------------------------------- flash

    def flash_forward(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_k: None,
        max_seqlen_q: int, max_seqlen_k: int, p: float, softmax_scale: float, is_causal: bool, window_left: int,
        window_right: int, return_softmax: bool, block_tables: None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        self.calls.append("flash_forward")
        self.asked = {"window": (window_left, window_right), "most": (max_seqlen_q, max_seqlen_k), "p": p}
        flash_exact.demand_layout(query, key, value)
        assert query.shape[-1] == value.shape[-1] <= 256
        assert not return_softmax
        batch = Batch(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        rng = torch.randint(1 << 31, (2,))
        span = flash2.span(batch, is_causal, window_left, window_right)
        out, lse = flash_exact.forward(batch, query, key, value, softmax_scale, span, math.inf, rng, p)
        return out, lse, rng.view(self.seeds)

    def flash_backward(
        self, grads_share_storage: bool, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor,
        lse: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int, p: float,
        softmax_scale: float, is_causal: bool, window_left: int, window_right: int, rng_state: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        self.calls.append("flash_backward")
        flash_exact.demand_layout(grad, query, key, value, out)
        assert not grads_share_storage
        assert lse.is_contiguous()
        assert (rng_state is None) == (p == 0.0)
        batch = Batch(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        gradients = tuple(torch.full_like(one, math.nan) for one in (query, key, value))
        if p > 0.0:
            assert rng_state.dtype == self.seeds
            rng_state = rng_state.view(torch.int64)
        span = flash2.span(batch, is_causal, window_left, window_right)
        flash_exact.backward(batch, grad, query, key, value, out, lse, softmax_scale, span, gradients, rng_state, p)
        return gradients

    # ----------------------------------------------------------------------------------------------------- CUTLASS

    def cutlass_forward(self, cls: type, inp: Any, needs_gradient: bool) -> tuple[Tensor, Any]:
        self.calls.append("cutlass_forward")
        q, k, v = inp.query, inp.key, inp.value
        flash_exact.demand_layout(q, k, v)
        assert q.shape[2] == k.shape[2] == v.shape[2], "no grouped heads"
        assert inp.p == 0.0
        pieces, most = _pieces(inp)
        out = q.new_full((*q.shape[:-1], v.shape[-1]), math.nan)
        lse = q.new_full((len(pieces), q.shape[2], -(-most // 32) * 32), math.nan, dtype=_sum_dtype(q))
        for number, (batch, rows, keys) in enumerate(pieces):
            scores = _scores(inp, batch, rows, keys)
            sums = scores.logsumexp(-1)
            weights = (scores - sums.masked_fill(sums == -math.inf, 0.0)[..., None]).exp()
            if scores.shape[-1]:
                out[batch, rows] = (weights @ v[batch, keys].double().transpose(0, 1)).transpose(0, 1).to(q.dtype)
            lse[number, :, : scores.shape[1]] = sums.masked_fill(sums == -math.inf, GARBAGE)
        return out, Context(lse=lse, out=out) if needs_gradient else None

    def cutlass_backward(self, cls: type, ctx: Any, inp: Any, grad: Tensor) -> Any:
        self.calls.append("cutlass_backward")
        q, k, v = inp.query, inp.key, inp.value
        flash_exact.demand_layout(q, k, v, ctx.out, grad)
        pieces, most = _pieces(inp)
        assert ctx.lse.shape == (len(pieces), q.shape[2], -(-most // 32) * 32)
        wants_bias = isinstance(inp.attn_bias, Tensor) and inp.attn_bias.requires_grad
        dbias = None
        if wants_bias:
            assert all(stride != 0 for stride in inp.attn_bias.stride()), "no gradient of a broadcast bias"
            dbias = torch.empty(inp.attn_bias.shape, dtype=q.dtype)
        dq, dk, dv = (torch.full_like(one, math.nan) for one in (q, k, v))
        for number, (batch, rows, keys) in enumerate(pieces):
            scores = _scores(inp, batch, rows, keys)
            if not scores.numel():
                continue
            stored = ctx.lse[number, :, : scores.shape[1]].double()
            assert stored.isfinite().all()
            weights = (scores - stored[..., None]).exp()
            high_q, upstream, out = (one[batch, rows].double().transpose(0, 1) for one in (q, grad, ctx.out))
            high_k, high_v = (one[batch, keys].double().transpose(0, 1) for one in (k, v))
            dscores = weights * (upstream @ high_v.transpose(-1, -2) - (upstream * out).sum(-1, keepdim=True))
            dq[batch, rows] = (dscores @ high_k * inp.scale).transpose(0, 1).to(q.dtype)
            dk[batch, keys] = (dscores.transpose(-1, -2) @ high_q * inp.scale).transpose(0, 1).to(q.dtype)
            dv[batch, keys] = (weights.transpose(-1, -2) @ upstream).transpose(0, 1).to(q.dtype)
            if dbias is not None:
                dbias[batch] = dscores.to(q.dtype)
        return Gradients(dq=dq, dk=dk, dv=dv, db=dbias)


def _sum_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _pieces(inp: Any) -> tuple[list[tuple[int, slice, slice]], int]:
    bias = inp.attn_bias
    assert bias is None or isinstance(bias, Tensor) or type(bias) in (
        LowerTriangularMask, BlockDiagonalMask, BlockDiagonalCausalMask,
    )  # fmt: skip
    if not isinstance(bias, BlockDiagonalMask):
        return [(number, slice(None), slice(None)) for number in range(inp.query.shape[0])], inp.query.shape[1]
    assert inp.query.shape[0] == inp.key.shape[0] == 1
    starts = []
    for info in (bias.q_seqinfo, bias.k_seqinfo):
        assert info.seqstart.dtype == torch.int32
        assert info.seqstart.is_contiguous()
        assert info.max_seqlen >= max(1, int(info.seqstart.diff().max()))
        ends = info.seqstart.tolist()
        starts.append([slice(a, b) for a, b in zip(ends, ends[1:], strict=False)])
    return [(0, rows, keys) for rows, keys in zip(*starts, strict=True)], bias.q_seqinfo.max_seqlen


def _scores(inp: Any, batch: int, rows: slice, keys: slice) -> Tensor:
    q, k = (one.double().transpose(0, 1) for one in (inp.query[batch, rows], inp.key[batch, keys]))
    scores = q @ k.transpose(-1, -2) * inp.scale
    if isinstance(inp.attn_bias, Tensor):
        bias = inp.attn_bias
        assert bias.dtype == inp.query.dtype
        assert bias.shape == (inp.query.shape[0], q.shape[0], q.shape[1], k.shape[1]), "nothing is broadcast"
        assert bias.stride(-1) <= 1
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1]), "rows start at multiples of 8"
        return scores + bias[batch].double()
    if isinstance(inp.attn_bias, (LowerTriangularMask, BlockDiagonalCausalMask)):
        return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -math.inf)
    return scores
