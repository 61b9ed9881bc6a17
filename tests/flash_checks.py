"""What the tests of FlashAttention 2, 3 and 4 share: calls of their operators on a CPU, against the float64 reference.

The operators are called by themselves, as ``attention`` would refuse a CPU: inputs are float64, the stand-ins exact,
so that a wrong layout, alignment or sign is no matter of tolerances.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from graphs import Counter
from test_varlen import LENGTHS
from torch import Tensor

import compiled_attn
from compiled_attn import reference, registry
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, Call, reasons

# name -> causal, window: all at the lower right
POSITIONS: dict[str, tuple[int, tuple[int, int] | None]] = {
    "full": (0, None),
    "causal": (CAUSAL | ALIGN_LOWER_RIGHT, None),
    "window": (ALIGN_LOWER_RIGHT, (3, 2)),
    "causal_window": (CAUSAL | ALIGN_LOWER_RIGHT, (4, -1)),
    "open_left": (ALIGN_LOWER_RIGHT, (-1, 2)),
    "open_right": (ALIGN_LOWER_RIGHT, (3, -1)),
    # past the last key: with Sq > Sk the first rows do not see all for it
    "past_the_end": (ALIGN_LOWER_RIGHT, (2, 9)),
    "open_to_the_right_past_the_end": (ALIGN_LOWER_RIGHT, (-1, 9)),
    "wide": (ALIGN_LOWER_RIGHT, (1000, 1000)),
}
# (B, Sq, Sk, H, Hk, D)
SHAPES = {
    "plain": (2, 5, 7, 4, 4, 16),
    "more_queries": (2, 13, 6, 2, 2, 8),
    "grouped": (2, 6, 6, 4, 2, 8),
    "padded_width": (1, 4, 9, 2, 1, 12),
    "one_query": (2, 1, 5, 4, 2, 16),
    "one_key": (2, 5, 1, 2, 2, 8),
    "no_query": (2, 0, 5, 2, 2, 8),
    "no_key": (2, 5, 0, 2, 1, 8),
    "no_batch": (0, 4, 5, 2, 2, 8),
}


def tensors(shape: str, dtype: torch.dtype = torch.float64, transposed: bool = False) -> list[Tensor]:
    batch, q_length, k_length, heads, key_heads, width = SHAPES[shape]
    made = []
    for length, count in ((q_length, heads), (k_length, key_heads), (k_length, key_heads)):
        one = torch.randn(batch, count, length, width) if transposed else torch.randn(batch, length, count, width)
        made.append((one.transpose(1, 2) if transposed else one).to(dtype).requires_grad_())
    return made


def stand_in_for(flash: Any, made: Any, monkeypatch: Any) -> Any:
    """``made``, loaded in place of the library of ``flash`` (a file of ops) while the test runs; memory is poisoned."""
    monkeypatch.setitem(flash.PACKAGE.__dict__, "loaded", flash.bind(made.module))
    poison(monkeypatch)
    return made


def poison(monkeypatch: Any) -> None:
    """What the glue allocates and no kernel writes is NaN."""
    allocate = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(math.nan))


def padding(shape: str) -> Tensor:
    """A key-padding mask with holes; the last sequence has no key."""
    batch, _, k_length, *_ = SHAPES[shape]
    keep = torch.rand(batch, k_length) > 0.4
    keep[-1:] = False
    keep[:1, :1] = True
    return keep


def dense(backend: str, inputs: list[Tensor], key_padding: Any, positions: str, scale: Any = None) -> None:
    """out, lse and gradients of the dense operator of ``backend`` are the reference's; out is contiguous."""
    causal, window = POSITIONS[positions]
    operator = registry.find(backend).op
    assert operator is not None
    gqa = inputs[0].shape[2] != inputs[1].shape[2]
    out, lse, state = operator(
        *inputs, None, key_padding, 0.0, causal, scale, gqa, None if window is None else list(window), False, True
    )
    assert state.numel() == 0
    options: dict[str, Any] = {
        "key_padding_mask": key_padding, "is_causal": bool(causal & CAUSAL), "causal_alignment": "lower_right",
        "scale": scale, "window_size": window,
    }  # fmt: skip
    expected, expected_lse = reference.attention(*inputs, **options)
    _compare(inputs, (out, lse), (expected, expected_lse))
    with torch.no_grad():
        alone, no_lse, _ = operator(
            *inputs, None, key_padding, 0.0, causal, scale, gqa, None if window is None else list(window), False, False
        )
    assert no_lse.shape == (0,)
    torch.testing.assert_close(alone, out.detach(), rtol=0, atol=0)


def call(
    backend: str, inputs: list[Tensor], keep: Any, positions: str, dropout_p: float = 0.0, deterministic: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and state of the dense operator of ``backend``."""
    causal, window = POSITIONS[positions]
    operator = registry.find(backend).op
    assert operator is not None
    return operator(  # type: ignore[no-any-return]
        *inputs, None, keep, dropout_p, causal, None, True, window, deterministic, True
    )


def packed(lengths: str, key_heads: int = 4, width: int = 16, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, cu_seqlens_q and cu_seqlens_k; "rows_behind" has two rows of no sequence."""
    starts_q, starts_k = LENGTHS[lengths]
    rest = 2 if lengths == "rows_behind" else 0
    sizes = ((starts_q[-1] + rest, 4), (starts_k[-1] + rest, key_heads), (starts_k[-1] + rest, key_heads))
    made = [torch.randn(total, heads, width).to(dtype).requires_grad_() for total, heads in sizes]
    return [*made, *(torch.tensor(starts, dtype=torch.int32) for starts in (starts_q, starts_k))]


def varlen(backend: str, inputs: list[Tensor], positions: str, longest: tuple[int, int] | None = None) -> None:
    """The same for the packed operator, with bounds of the lengths as tight as they can be, or ``longest``."""
    causal, window = POSITIONS[positions]
    operator = registry.find(backend).varlen_op
    assert operator is not None
    *qkv, cu_seqlens_q, cu_seqlens_k = inputs
    if longest is None:
        longest = (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    gqa = qkv[0].shape[1] != qkv[1].shape[1]
    out, lse, _ = operator(
        *inputs, *longest, 0.0, causal, None, gqa, None if window is None else list(window), False, True
    )
    expected = reference.varlen_attention(
        *inputs, is_causal=bool(causal & CAUSAL), causal_alignment="lower_right", window_size=window
    )
    _compare(qkv, (out, lse), expected)


def only_rows_behind(backend: str) -> None:
    """Sequences without a row, and rows of no sequence: bounds of 0 must not become an empty grid."""
    starts = torch.zeros(3, dtype=torch.int32)
    inputs = [torch.randn(3, 4, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    varlen(backend, [*inputs, starts, starts.clone()], "full")


def _compare(inputs: list[Tensor], actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    out, lse = actual
    assert out.is_contiguous()
    assert lse.is_contiguous()
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    assert not (expected[0][(expected[1] == -math.inf).transpose(-1, -2)] != 0).any()
    grad = torch.randn_like(out)
    if out.dim() == 4:  # a layout that no kernel reads as it is
        grad = torch.randn(*out.shape[:-1], 2 * out.shape[-1], dtype=out.dtype)[..., ::2]
    found = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(expected[0], inputs, grad)
    for name, one, right in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, right, msg=lambda text, name=name: f"{name}: {text}")


def masked_keys_may_hold_anything(backend: str) -> None:
    """NaN and infinity in the rows of masked keys reach neither out nor a gradient."""
    for shape in ("plain", "grouped"):
        query, key, value = (tensor.detach() for tensor in tensors(shape))
        for keep in (padding(shape), padding(shape).flip(0), torch.zeros(key.shape[:2], dtype=torch.bool)):
            clean = [query, *(tensor.masked_fill(~keep[:, :, None, None], 0.0) for tensor in (key, value))]
            dirty = [query, *(
                tensor.masked_fill(~keep[:, :, None, None], filling)
                for tensor, filling in ((key, math.nan), (value, math.inf))
            )]  # fmt: skip
            found = []
            for inputs in (clean, dirty):
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                out, lse, _ = call(backend, leaves, keep, "full")
                found.append((out, lse, *torch.autograd.grad(out.sin().sum(), leaves)))
            for right, actual in zip(*found, strict=True):
                torch.testing.assert_close(actual, right, rtol=0, atol=0)


def half_precision(backend: str, dtype: torch.dtype) -> None:
    """out and gradients come in ``dtype`` and shape of the inputs, lse in float32."""
    inputs = tensors("padded_width", dtype)
    out, lse, _ = call(backend, inputs, padding("padded_width"), "full")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for gradient, like in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert (gradient.dtype, gradient.shape) == (dtype, like.shape)


def masked_keys_have_no_gradient(backend: str) -> None:
    """Exactly 0, and nothing that was left in memory."""
    query, key, value = tensors("plain")
    keep = padding("plain")
    operator = registry.find(backend).op
    assert operator is not None
    out, _, _ = operator(query, key, value, None, keep, 0.0, 0, None, False, None, False, True)
    for gradient in torch.autograd.grad(out.sin().sum(), (key, value)):
        assert (gradient[~keep] == 0).all()
        assert (gradient[:1][keep[:1]] != 0).any()


def wide(width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a dense call of that head_dim, for :func:`refusals`."""
    return dict.fromkeys(("query", "key", "value"), (1, 4, 2, width))


def refusals(backend: str, *, varlen: bool = False, **call: Any) -> list[str]:
    """Reasons of ``backend``'s limits against a call made of facts, on a GPU of ``capability``."""
    shape = (6, 4, 64) if varlen else (2, 6, 4, 64)
    facts: dict[str, Any] = {"query": shape, "key": shape, "value": shape, "dtypes": (torch.bfloat16,) * 3}
    facts.update(devices=("cuda",) * 3, capability=(9, 0), varlen=varlen)
    record = compiled_attn.backend_info(backend)
    return reasons(record.varlen_limits if varlen else record.limits, Call(**{**facts, **call}))


def traced(backend: str, case: str) -> None:
    """attention() on meta tensors, whole, forward and backward: one node of ours, exact shapes, no library."""
    given: dict[str, dict[str, Any]] = {
        "plain": {}, "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.3},
        "mask": {"key_padding_mask": torch.ones(2, 6, dtype=torch.bool, device="meta")},
    }  # fmt: skip
    inputs = [torch.randn(2, 6, 4, 16, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(3)]

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return compiled_attn.attention_with_lse(query, key, value, backend=backend, **given[case])

    _traced(run, inputs, registry.find(backend).op)


def traced_packed(backend: str) -> None:
    """varlen_attention() likewise."""
    inputs = [torch.randn(9, 4, 16, dtype=torch.bfloat16, device="meta").requires_grad_() for _ in range(3)]
    starts = torch.empty(4, dtype=torch.int32, device="meta")

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return compiled_attn.varlen_attention_with_lse(query, key, value, starts, starts, 5, 5, backend=backend)

    _traced(run, inputs, registry.find(backend).varlen_op)


def _traced(run: Any, inputs: list[Tensor], operator: Any) -> None:
    torch._dynamo.reset()
    counter = Counter("aot_eager")
    out, lse = torch.compile(run, fullgraph=True, backend=counter)(*inputs)
    assert (out.shape, out.dtype, lse.dtype) == (inputs[0].shape, torch.bfloat16, torch.float32)
    assert lse.shape == (*out.shape[:-3], out.shape[-2], out.shape[-3])
    out.sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
    assert counter.operators() == [[operator._opname]]


def opcheck(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """The dense and the packed operator of ``backend``, with the stand-in behind them."""
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    entry = registry.find(backend)
    limits, kernels = entry.backend.limits[0], entry.backend.dense
    assert kernels is not None
    for keep in (None, padding("plain")) if "key_padding" in limits.masks else (None,):
        for transposed in (False, True):
            inputs = tensors("plain", dtype, transposed)
            if kernels.backward is None:
                inputs = [tensor.detach() for tensor in inputs]
            rest = (None, keep, 0.0, 0, None, False, None, False, limits.lse)
            torch.library.opcheck(entry.op, (*inputs, *rest), test_utils=utils)  # type: ignore[arg-type]
    if entry.varlen_op is None:
        return
    inputs = packed("rows_behind", dtype=dtype)
    if kernels.backward is None:
        inputs = [tensor.detach() for tensor in inputs]
    rest = (7, 7, 0.0, 0, None, False, None, False, True)
    torch.library.opcheck(entry.varlen_op, (*inputs, *rest), test_utils=utils)  # type: ignore[arg-type]


def require_built(width: int) -> None:
    """Skip where this build of flash-attn lacks a head_dim: it leaves output as allocated then, without a word.

    It has a kernel of its own for few queries and many keys (split-KV), which may be absent while the other is there.
    """
    flash_attn = pytest.importorskip("flash_attn")
    for q_length, k_length in ((64, 64), (150, 300)):
        query, key = (torch.randn(2, length, 4, width, device="cuda").bfloat16() for length in (q_length, k_length))
        right, _ = reference.attention(query, key, key)
        if not (flash_attn.flash_attn_func(query, key, key).double() - right).abs().max() < 0.1:
            pytest.skip(f"this build of flash-attn gives garbage for head_dim={width}")
