"""`flex`: FlexAttention, PyTorch's compiled attention with a mask that is a function (Dong et al. 2024).

Tensor masks, causal, windows and packed sequences become one ``mask_mod`` (float masks a ``score_mod``) and the lists
of blocks that hold something to attend to (``_flex_blocks.py``). Three ways lead to the same call:

* compiled code gets FlexAttention's own node (``Backend.traced``), so that Inductor generates its kernel there;
* eager calls on a GPU run it compiled by us, never FlexAttention's eager form, which is O(Sq * Sk) math;
* the operator serves the rest: every call on a CPU but compiled inference, ``switch``, packed sequences.

On a CPU FlexAttention cannot train and Inductor's kernel returns no lse: there the operator is its dense math.

Shape legend: B batch, Sq/Sk query/key length, H query heads, D head_dim. FlexAttention wants (B, H, S, D) views.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from compiled_attn.operators import Kernels, expected_shapes, lse_dtype
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import LOW_PRECISION, Call, Limits

from ._flex_blocks import copied, kept
from ._flex_call import Result, attend, autograd_keys, compiled, compiled_with, flex, run
from ._native_dense import math_backward, needs_gradient
from ._native_varlen import math_varlen_backward

Gradients = tuple[Tensor, Tensor, Tensor, None]


def _is_empty(q: Tensor, k: Tensor) -> bool:
    """The kernels refuse Sq == 0 and Sk == 0."""
    return q.numel() == 0 or k.shape[-3] == 0


def _nothing(q: Tensor, v: Tensor) -> Result:
    out, lse = expected_shapes(q, v)
    return q.new_zeros(out), q.new_full(lse, -math.inf, dtype=lse_dtype(q.dtype))


# -------------------------------------------------------------------------------------------------------- operator


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, key_padding: Any = None, dropout_p: float = 0.0,
    causal: int = 0, scale: float | None = None, gqa: bool = False, window: Any = None, deterministic: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
    if _is_empty(q, k):
        return *_nothing(q, v), None
    with torch.no_grad():
        # on a CPU FlexAttention refuses inputs that require gradients, also here
        q, k, v = q.detach(), k.detach(), v.detach()
        out, lse = run(q, k, v, mask, key_padding, None, causal, scale, window, return_lse)
    return out, lse if return_lse else None, None


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, causal: int = 0, scale: float | None = None, gqa: bool = False,
    window: Any = None, deterministic: bool = False, return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
    if _is_empty(q[None], k[None]):
        return *_nothing(q, v), None
    with torch.no_grad():
        q, k, v = q.detach()[None], k.detach()[None], v.detach()[None]
        out, lse = run(q, k, v, None, None, (cu_seqlens_q, cu_seqlens_k), causal, scale, window, return_lse)
    return out[0], lse[0] if return_lse else None, None


def _recomputed(grad_out: Tensor, inputs: tuple[Tensor, ...], call: Callable[..., Result]) -> Gradients:
    """Gradients by running the forward again under autograd: FlexAttention's backward kernel is reached only through
    the graph that its own forward records. ``switch`` and packed sequences pay that; other calls take the traced way,
    where FlexAttention's autograd works as usual."""
    with autograd_keys(), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out, _ = call(*leaves)
        dq, dk, dv = torch.autograd.grad(out, leaves, grad_out)
    return dq, dk, dv, None


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, out: Tensor, lse: Tensor,
    state: Tensor, dropout_p: float, causal: int, scale: float | None, gqa: bool, window: Any, deterministic: bool,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Any]:  # fmt: skip
    if _is_empty(q, k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
    if q.device.type == "cpu":  # FlexAttention has no backward there; its forward is the same plain math
        return math_backward(
            grad_out, q, k, v, mask, key_padding, out, lse, state, dropout_p, causal, scale, gqa, window,
            deterministic, False,
        )  # fmt: skip

    def call(q: Tensor, k: Tensor, v: Tensor) -> Result:
        return run(q, k, v, mask, key_padding, None, causal, scale, window, False)

    return _recomputed(grad_out, (q, k, v), call)


def varlen_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, out: Tensor, lse: Tensor, state: Tensor, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Any]:  # fmt: skip
    if _is_empty(q[None], k[None]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None
    if q.device.type == "cpu":
        return math_varlen_backward(
            grad_out, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, out, lse, state, dropout_p,
            causal, scale, gqa, window, deterministic, False,
        )  # fmt: skip

    def call(q: Tensor, k: Tensor, v: Tensor) -> Result:
        found = run(q[None], k[None], v[None], None, None, (cu_seqlens_q, cu_seqlens_k), causal, scale, window, False)
        return found[0][0], found[1]

    return _recomputed(grad_out, (q, k, v), call)


# ---------------------------------------------------------------------------------------------------- traced branch

# Inductor's CPU kernel for FlexAttention needs AVX2, and does not exist on macOS.
_CPU_COMPILES = "AVX" in torch.backends.cpu.get_cpu_capability() and sys.platform != "darwin"


def takes_traced(call: Call) -> bool:
    """Where FlexAttention's own node can do what is asked, and always for a BlockMask."""
    if call.mask == "block":
        return True
    if 0 in call.query or 0 in call.key:
        return False  # the kernels refuse Sq == 0 and Sk == 0
    if call.devices[0] == "cuda":
        return True
    inference = not call.gradient and not call.lse and call.dtypes[0] != torch.float64
    return call.devices[0] == "cpu" and call.compiling and inference and _CPU_COMPILES


def _require_block_mask(q: Tensor, k: Tensor, block_mask: Any) -> None:
    batch, heads = block_mask.kv_num_blocks.shape[0], block_mask.kv_num_blocks.shape[1]
    found = []
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        found.append(f"it is for batch {batch} and {heads} heads, the query has {q.shape[0]} and {q.shape[2]}")
    lengths = tuple(block_mask.seq_lengths)
    if lengths[0] != q.shape[1] or lengths[1] != k.shape[1]:
        found.append(f"it is for lengths {lengths}, query and key have {(q.shape[1], k.shape[1])}")
    if block_mask.kv_num_blocks.device != q.device:
        found.append(f"it is on {block_mask.kv_num_blocks.device}, query on {q.device}")
    if found:
        raise ValueError("the BlockMask does not fit: " + "; ".join(found) + "; create it for these tensors")


def _as_bool_mask(q: Tensor, k: Tensor, block_mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = block_mask.kv_num_blocks.shape[0], block_mask.kv_num_blocks.shape[1]
    return create_mask(block_mask.mask_mod, batch, heads, q.shape[1], k.shape[1], device=q.device.type)


def traced(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, dropout_p: float, causal: int, scale: float | None,
    gqa: bool, window: Any, deterministic: bool, return_lse: bool,
) -> Result:  # fmt: skip
    block_mask = None
    if mask is not None and not isinstance(mask, Tensor):
        _require_block_mask(q, k, mask)
        block_mask, mask = mask, None
    compiling = torch.compiler.is_compiling()
    if block_mask is not None and q.device.type == "cpu":
        gradient = needs_gradient(q, k, v)
        if not compiling or gradient or return_lse or q.dtype == torch.float64 or not _CPU_COMPILES:
            # what FlexAttention would do here, done by the operator, which has a backward
            mask = _as_bool_mask(q, k, block_mask)
            out, lse, _ = torch.ops.compiled_attn.flex.v1(
                q, k, v, mask, None, dropout_p, 0, scale, gqa, None, deterministic, return_lse or gradient
            )
            return out, lse
    if not compiling and block_mask is None and isinstance(q, FakeTensor):
        # a trace that is not Dynamo's (make_fx, FakeTensorMode): nothing to compile and run a kernel for, and a mask
        # without memory cannot say which blocks were kept for it
        return_lse = return_lse or needs_gradient(q, k, v)
        out, lse, _ = torch.ops.compiled_attn.flex.v1(
            q, k, v, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse
        )
        return out, lse
    if not compiling:
        if block_mask is not None:
            out, lse = compiled_with(q, k, v, block_mask, scale, return_lse)
        else:
            blocks = kept(mask, key_padding, q.shape[1], k.shape[1], causal, window)
            out, lse = compiled(q, k, v, mask, key_padding, None, blocks, causal, scale, window, return_lse)
        return out.contiguous(), lse
    if q.device.type == "cpu":
        # under no_grad too, FlexAttention refuses inputs that require gradients
        q, k, v = q.detach(), k.detach(), v.detach()
    if block_mask is not None:
        out, lse = flex(q, k, v, None, block_mask, scale, return_lse)
    else:
        out, lse = attend(q, k, v, mask, key_padding, None, None, causal, scale, window, return_lse)
    return copied(out) if q.device.type == "cpu" else out.contiguous(), lse


# ----------------------------------------------------------------------------------------------------- registration


def _widths(call: Call) -> str | None:
    narrow = call.value[-1] < 16 and call.value[-1] != call.query[-1]
    return f"head_dim={call.value[-1]} of value is under 16" if narrow else None


def _block_window(call: Call) -> str | None:
    if call.mask == "block" and call.window is not None:
        return "takes no window_size beside a BlockMask; put the window into its mask_mod"
    return None


_MASKS = ("none", "key_padding", "bool", "float", "block")
_CUDA = Limits(
    ("cuda",), (torch.bfloat16, torch.float16, torch.float32), min_capability=(8, 0), min_head_dim=16,
    value_head_dim=True, masks=_MASKS, window=True, also=(_widths, _block_window),
)  # fmt: skip
_CPU = Limits(
    ("cpu",), (torch.float32, *LOW_PRECISION, torch.float64), value_head_dim=True, masks=_MASKS, window=True,
    also=(_block_window,),
)  # fmt: skip

register_backend(
    Backend(
        "flex",
        "FlexAttention: a kernel generated for each kind of mask",
        family="PyTorch",
        limits=(_CUDA, _CPU),
        dense=Kernels(forward, backward),
        varlen_limits=(_CUDA, _CPU),
        varlen=Kernels(varlen_forward, varlen_backward),
        traced=traced,
        takes_traced=takes_traced,
    )
)
