"""FlexAttention called in its three forms: in code that is being traced, compiled by us, and as dense math on a CPU.

B batch, Sq/Sk query/key length, H query heads, D head_dim. FlexAttention wants (B, H, S, D) views.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from compiled_attn.spec import CAUSAL, LOW_PRECISION

from ._flex_blocks import BLOCK, Blocks, build, copied, row_ranges

Result = tuple[Tensor, Any]  # out (B, Sq, H, Dv) and lse (B, H, Sq), None unless asked for


# ------------------------------------------------------------------------------------------ mask_mod and score_mod


def _lookup(mask: Tensor) -> tuple[Tensor, tuple[bool, bool, bool]]:
    """A (B|1, H|1, Sq|1, Sk) mask without its broadcast dimensions, and which of the first three are left.

    Indices into a dimension of size 1 would read past it: the mods see the batch, head and row of the query.
    """
    batch, heads, rows = (True if size != 1 else False for size in mask.shape[:3])
    if not rows:
        mask = mask.squeeze(2)
    if not heads:
        mask = mask.squeeze(1)
    if not batch:
        mask = mask.squeeze(0)
    return mask, (batch, heads, rows)


def _index(used: tuple[bool, bool, bool], b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, ...]:
    index: tuple[Tensor, ...] = (column,)
    if used[2]:
        index = (row, *index)
    if used[1]:
        index = (h, *index)
    return (b, *index) if used[0] else index


def _mask_mod(mask: Tensor | None, key_padding: Tensor | None, first: Tensor | None, last: Tensor | None) -> Any:
    """mask_mod of a bool mask, a key-padding mask and the keys [first, last) of every row."""
    table, used = (None, None) if mask is None else _lookup(mask)

    def keep(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        found = None
        if first is not None and last is not None:
            found = (column >= first[row]) & (column < last[row])
        if key_padding is not None:
            real = key_padding[b, column]
            found = real if found is None else found & real
        if table is not None and used is not None:
            allowed = table[_index(used, b, h, row, column)]
            found = allowed if found is None else found & allowed
        assert found is not None
        return found

    return keep


def _score_mod(bias: Tensor) -> Any:
    table, used = _lookup(bias.detach())

    def add(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + table[_index(used, b, h, row, column)].to(score.dtype)

    return add


# --------------------------------------------------------------------------------------------- the call, traceable


def _bhsd(*tensors: Tensor) -> Any:
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _kernel_options(q: Tensor, table: Tensor | None) -> dict[str, int | bool]:
    """What the generated CUDA kernels need: fewer pipeline stages where shared memory is short, one kernel for all Sq.

    Inductor picks block sizes and stages by dtype and head_dim alone, but a ``table`` that the mods read for each pair
    (Sq > 1) is loaded in stages too, and widths between 128 and 256 are filled up to 256 in blocks for 128. With
    bfloat16, head_dim 64 and a float32 mask 240 KiB were asked for, with head_dim 160 and a bool mask 232; an H100 has
    227, and the compilation ends with "No valid triton configs". Fewer stages than needed cost up to 4 x the time.

    Inductor has another kernel for fewer than 128 queries, and picks it by the length it compiles with: a package
    would keep it for every length.
    """
    if q.device.type != "cuda":
        return {}
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # 0.2 s, there already where code is traced

    if statically_known_true(q.shape[1] < BLOCK):  # the kernel for few queries has one stage
        return {}
    low = True if q.dtype in LOW_PRECISION else False
    read = True if table is not None and table.shape[2] != 1 else False
    width = q.shape[-1]
    found: dict[str, int | bool] = {}
    if not statically_known_true(q.shape[1] >= BLOCK):
        found["FORCE_USE_FLEX_ATTENTION"] = True
    if 128 < width < 256:
        if read or not low:
            found["fwd_num_stages"] = 1
    elif read and (not low or (width == 64 and table is not None and table.element_size() == 4)):
        found["fwd_num_stages"] = 2
    if read and low and width > 128:  # the backward of 32-bit inputs has one stage anyway
        found["bwd_num_stages"] = 1
    return found


def flex(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Any, block_mask: Any, scale: Any, return_lse: bool,
    table: Tensor | None = None,
) -> Result:  # fmt: skip
    """flex_attention on (B, S, H, D) tensors, in code that is being compiled; ``table`` is what the mods read."""
    from torch.nn.attention import flex_attention as module

    options: dict[str, Any] = {}
    kernel_options = _kernel_options(q, table)
    if kernel_options:
        options["kernel_options"] = kernel_options
    if return_lse:
        if hasattr(module, "AuxRequest"):
            options["return_aux"] = module.AuxRequest(lse=True)
        else:
            options["return_lse"] = True
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = True if q.shape[2] != k.shape[2] else False
    if q.device.type == "cpu":
        # Inductor's CPU template cannot unpack a view of a matrix product ("not enough values to unpack (expected 4,
        # got 2)"), which is what a projection followed by unflatten is
        q, k, v = copied(q), copied(k), copied(v)
    q, k, v = _bhsd(q, k, v)
    found: Any = module.flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped, **options
    )
    if not return_lse:
        return found.transpose(1, 2), None
    out, lse = found
    lse = lse.lse if hasattr(module, "AuxRequest") else lse
    return out.transpose(1, 2), lse.detach()


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, lengths: Any, blocks: Blocks | None, causal: int,
    scale: float | None, window: Any, return_lse: bool,
) -> Result:  # fmt: skip
    """One call with tensor masks, or packed as one sequence with ``lengths`` (cu_seqlens_q, cu_seqlens_k)."""
    from torch.nn.attention.flex_attention import BlockMask

    bias = None
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask
        bias = copied(bias) if q.device.type == "cpu" else bias
    block_mask = None
    if mask is not None or key_padding is not None or causal & CAUSAL or window is not None or lengths is not None:
        if blocks is None:
            blocks = build(mask, key_padding, lengths, q.shape[1], k.shape[1], causal, window, q.device)
        first, last = blocks[8:] if blocks[8].shape[0] else (None, None)
        if q.device.type == "cpu":
            mask = None if mask is None else copied(mask)
            key_padding = None if key_padding is None else copied(key_padding)
        mask_mod = _mask_mod(mask, key_padding, first, last)
        block_mask = BlockMask(
            seq_lengths=(q.shape[1], k.shape[1]), kv_num_blocks=blocks[0], kv_indices=blocks[1],
            full_kv_num_blocks=blocks[2], full_kv_indices=blocks[3], q_num_blocks=blocks[4], q_indices=blocks[5],
            full_q_num_blocks=blocks[6], full_q_indices=blocks[7], BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod,
        )  # fmt: skip
    table = mask if bias is None else bias
    return flex(q, k, v, None if bias is None else _score_mod(bias), block_mask, scale, return_lse, table)


# ------------------------------------------------------------------------------------------------- compiled by us

# Compiled callables by what is fixed in them. Each is a code object of its own: torch counts recompiles for each code
# object, and past its limit FlexAttention silently runs O(Sq * Sk) math (7 TFLOP/s instead of 440 on an H100; vllm
# #27178). Here only batch and lengths are left to vary, which torch makes dynamic at the second size.
_variants: dict[Hashable, Callable[..., Result]] = {}


def _variant(key: Hashable, body: Callable[..., Result], **compiler: Any) -> Callable[..., Result]:
    """``body`` compiled for ``key``; fullgraph, so that a recompile limit raises instead of running uncompiled."""
    found = _variants.get(key)
    if found is None:
        from compiled_attn.compilation import compile as compile_with_room

        # torch also keeps which sizes are dynamic by the name of the code
        code = body.__code__.replace(co_name=f"{body.__code__.co_name}_{len(_variants)}")
        copy = types.FunctionType(code, body.__globals__, code.co_name, body.__defaults__, body.__closure__)
        found = _variants[key] = compile_with_room(copy, fullgraph=True, **compiler)
    return found


def _require_compiled() -> None:
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "backend 'flex' compiles its kernel, but torch.compile is switched off (TORCHDYNAMO_DISABLE, "
            "torch.compiler.set_stance or disable); FlexAttention would run O(Sq * Sk) math. Use another backend"
        )


def compiled(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, lengths: Any, blocks: Blocks | None, causal: int,
    scale: float | None, window: Any, return_lse: bool, **compiler: Any,
) -> Result:  # fmt: skip
    window = None if window is None else tuple(window)

    def body(
        q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, lengths: Any, blocks: Blocks | None
    ) -> Result:
        _require_compiled()
        return attend(q, k, v, mask, key_padding, lengths, blocks, causal, scale, window, return_lse)

    kind = None if mask is None else (mask.dtype, *(size == 1 for size in mask.shape[:3]))
    key = (
        q.device, q.dtype, q.shape[2:], k.shape[2:], v.shape[2:], kind, key_padding is None, lengths is None,
        blocks is None, causal, scale, window, return_lse, torch.is_grad_enabled(), *sorted(compiler.items()),
    )  # fmt: skip
    return _variant(key, body, **compiler)(q, k, v, mask, key_padding, lengths, blocks)


def compiled_with(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: Any, return_lse: bool) -> Result:
    def block_mask_body(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Result:
        _require_compiled()
        return flex(q, k, v, None, block_mask, scale, return_lse)

    code = getattr(block_mask.mask_mod, "__code__", None)
    key = ("block", q.device, q.dtype, q.shape[2:], k.shape[2:], v.shape[2:], scale, return_lse, code)
    return _variant(key, block_mask_body)(q, k, v, block_mask)


# ---------------------------------------------------------------------------------------------- inside an operator


@functools.cache
def _excluded_at_rest() -> Any:
    """The dispatch keys that a new thread leaves out."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(torch._C._dispatch_tls_local_exclude_set).result()


@contextlib.contextmanager
def autograd_keys() -> Iterator[None]:
    """The dispatch keys of autograd and functorch, which are off inside an operator's kernel.

    Gradients are still recorded only if grad mode is on. FlexAttention's eager form needs the keys without it too: it
    looks masks up with an autograd.Function under vmap.
    """
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _excluded_at_rest()):
        yield


def _dense_math(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, lengths: Any, causal: int, scale: Any, window: Any
) -> Result:
    """FlexAttention's eager form: O(Sq * Sk), for a CPU.

    The node itself rather than flex_attention(), which traces every call with Dynamo before it runs the same math.
    """
    from torch._higher_order_ops.flex_attention import flex_attention as node

    bias = None
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask
    first, last = row_ranges(lengths, q.shape[1], k.shape[1], causal, window, q.device)
    mask_mod: Any = _everything
    if mask is not None or key_padding is not None or first is not None:
        mask_mod = _mask_mod(mask, key_padding, first, last)
    score_mod = _unchanged if bias is None else _score_mod(bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = _bhsd(q, k, v)
    with autograd_keys():
        found: Any = node(q, k, v, score_mod, (mask_mod,), scale, {})
    return found[0].transpose(1, 2), found[1] * math.log(2.0)  # the node's lse is in base 2


def _everything(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return column >= 0


def _unchanged(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return score


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, lengths: Any, causal: int, scale: Any, window: Any,
    return_lse: bool,
) -> Result:  # fmt: skip
    if q.device.type == "cpu":
        return _dense_math(q, k, v, mask, key_padding, lengths, causal, scale, window)
    return compiled(q, k, v, mask, key_padding, lengths, None, causal, scale, window, return_lse)
