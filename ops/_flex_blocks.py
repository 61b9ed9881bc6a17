"""Which 128 x 128 blocks of the scores FlexAttention visits, as an operator that a compiled graph holds once.

FlexAttention's own ``create_block_mask`` evaluates the mask_mod for every (query, key): Sq * Sk values, again for each
layer. Here blocks come from what the mask is made of: intervals of keys for causal, window and packed sequences, and
one reduction over a mask tensor; and a graph gets them once for equal inputs: neither AOTAutograd (in inference) nor
Inductor removes common subexpressions.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_slot

from compiled_attn import masks
from compiled_attn.operators import NAMESPACE, VERSION
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL

_BEYOND = 2**31 - 1  # behind every key; Sk itself as the value of F.pad would fix a dynamic length
BLOCK = 128  # FlexAttention's own default; its kernels want multiples of their tiles

# Number and indices of the key blocks of each query block, the same of the full ones, both again transposed; and the
# keys [first, last) of each row, of size 0 where the mask tensors say it all.
Blocks = tuple[Tensor, ...]


def row_ranges(
    lengths: tuple[Tensor, Tensor] | None, q_length: int, k_length: int, causal: int, window: Any, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """int32 (Sq,) first and last + 1 key that each row attends to by its position, or by its packed sequence.

    A row with nothing to attend to has last <= first. (None, None): every row attends to all keys.
    """
    if lengths is None and not causal & CAUSAL and window is None:
        return None, None
    rows = torch.arange(q_length, device=device)
    if lengths is None:
        start, end = torch.zeros_like(rows), torch.full_like(rows, k_length)
        if causal & ALIGN_LOWER_RIGHT:
            rows = rows + (k_length - q_length)
    else:
        starts_q, starts_k = (one.to(torch.int64) for one in lengths)
        sequence = masks.segments(lengths[0], q_length)
        inside = sequence < starts_q.shape[0] - 1
        sequence = sequence.clamp(max=starts_q.shape[0] - 2)
        start = starts_k[sequence]
        end = torch.where(inside, starts_k[sequence + 1], start)  # rows behind the last sequence attend to nothing
        rows = rows - starts_q[sequence] + start
        if causal & ALIGN_LOWER_RIGHT:
            rows = rows + (starts_k.diff() - starts_q.diff())[sequence]
    left, right = (-1, -1) if window is None else window
    if causal & CAUSAL:
        right = 0
    first = start if left < 0 else torch.maximum(start, rows - left)
    last = end if right < 0 else torch.minimum(end, rows + (right + 1))
    return first.to(torch.int32), last.to(torch.int32)


def _blocks_of_ranges(first: Tensor, last: Tensor, k_length: int) -> tuple[Tensor, Tensor]:
    """Bool (1, 1, Nq, Nk): blocks with some, and with every pair inside its row's range."""
    padding = -first.shape[0] % BLOCK
    nothing = last <= first
    low = first.masked_fill(nothing, _BEYOND)
    high = last.masked_fill(nothing, 0)
    low = F.pad(low, (0, padding), value=_BEYOND).view(-1, BLOCK)
    high = F.pad(high, (0, padding), value=0).view(-1, BLOCK)
    begin = torch.arange((k_length + BLOCK - 1) // BLOCK, device=first.device) * BLOCK
    some = (low.amin(1, keepdim=True) < begin + BLOCK) & (high.amax(1, keepdim=True) > begin)
    every = (low.amax(1, keepdim=True) <= begin) & (high.amin(1, keepdim=True) >= begin + BLOCK)
    return some[None, None], every[None, None]


def _blocks_of_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a bool (B|1, H|1, Sq|1, Sk) mask: (B|1, H|1, Nq|1, Nk). Blocks over an edge are never full."""
    batch, heads, rows, columns = mask.shape
    mask = F.pad(mask, (0, -columns % BLOCK))
    if rows == 1:
        tiles = mask.reshape(batch, heads, 1, -1, BLOCK)
        return tiles.any(-1), tiles.all(-1)
    tiles = F.pad(mask, (0, 0, 0, -rows % BLOCK)).reshape(batch, heads, -1, BLOCK, mask.shape[-1] // BLOCK, BLOCK)
    return tiles.any(-1).any(-2), tiles.all(-1).all(-2)


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Number of marked columns in each row (int32), and the columns, marked ones in front (int32)."""
    numbers = dense.to(torch.int32)
    order = torch.argsort(numbers, dim=-1, descending=True, stable=True)
    return numbers.sum(-1, dtype=torch.int32).contiguous(), order.to(torch.int32).contiguous()


def _build(
    mask: Tensor | None, key_padding: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    q_length: int, k_length: int, causal: int, window: Any, device: torch.device,
) -> Blocks:  # fmt: skip
    lengths = None if cu_seqlens_q is None or cu_seqlens_k is None else (cu_seqlens_q, cu_seqlens_k)
    first, last = row_ranges(lengths, q_length, k_length, causal, window, device)
    parts = []
    if first is not None and last is not None:
        parts.append(_blocks_of_ranges(first, last, k_length))
    else:
        first = torch.empty(0, dtype=torch.int32, device=device)
        last = torch.empty(0, dtype=torch.int32, device=device)
    if mask is not None:
        parts.append(_blocks_of_mask(mask))
    if key_padding is not None:
        parts.append(_blocks_of_mask(key_padding[:, None, None, :]))
    rows = (q_length + BLOCK - 1) // BLOCK
    some = every = torch.ones((1, 1, rows, 1), dtype=torch.bool, device=device)
    for part_some, part_every in parts:
        some, every = some & part_some, every & part_every
    found: list[Tensor] = []
    for dense in (some & ~every, every):
        found += _ordered(dense)
    for dense in (some & ~every, every):
        found += _ordered(dense.transpose(-2, -1))
    return (*found, first, last)


def _fake(
    mask: Tensor | None, key_padding: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    q_length: int, k_length: int, causal: int, window: Any, device: torch.device,
) -> Blocks:  # fmt: skip
    batch = heads = 1
    for given in (mask, key_padding):
        if given is not None and given.shape[0] != 1:
            batch = given.shape[0]
    if mask is not None:
        heads = mask.shape[1]
    rows, columns = (q_length + BLOCK - 1) // BLOCK, (k_length + BLOCK - 1) // BLOCK
    found = []
    for one, other in ((rows, columns), (columns, rows)):
        shapes = ((batch, heads, one), (batch, heads, one, other))
        found += [torch.empty(shape, dtype=torch.int32, device=device) for shape in (*shapes, *shapes)]
    by_position = causal & CAUSAL or window is not None or cu_seqlens_q is not None
    found += [torch.empty(q_length if by_position else 0, dtype=torch.int32, device=device) for _ in range(2)]
    return tuple(found)


_NAME = f"flex_blocks.{VERSION}"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    f"{_NAME}(Tensor? mask, Tensor? key_padding, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt q_length, "
    f"SymInt k_length, int causal, int[2]? window, Device device) -> ({', '.join(['Tensor'] * 10)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl(_NAME, _build, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{_NAME}", _fake, lib=_library)
_op = torch.ops.compiled_attn.flex_blocks.v1


def build(
    mask: Tensor | None, key_padding: Tensor | None, lengths: tuple[Tensor, Tensor] | None, q_length: int,
    k_length: int, causal: int, window: Any, device: torch.device,
) -> Blocks:  # fmt: skip
    """Blocks of a bool (B|1, H|1, Sq|1, Sk) mask, a (B, Sk) key-padding mask, positions and packed sequences."""
    cu_seqlens_q, cu_seqlens_k = (None, None) if lengths is None else lengths
    return _op(mask, key_padding, cu_seqlens_q, cu_seqlens_k, q_length, k_length, causal, window, device)


def _copy_backward(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


# Inductor's CPU template for FlexAttention fails ("Unsupported for epilogue_nodes in CppFlexAttentionTemplate", and
# NoValidChoicesError for a mask computed in the graph; torch 2.9-2.13) on whatever it would fuse, before or after.
# Nothing fuses with an operator that it cannot see through.
_COPY = f"flex_copy.{VERSION}"
_library.define(f"{_COPY}(Tensor given) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl(_COPY, lambda given: given.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::{_COPY}", lambda given: given.new_empty(given.shape), lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::{_COPY}", _copy_backward, lib=_library)


def copied(given: Tensor) -> Tensor:
    """A contiguous copy that compilers do not fuse with anything."""
    return torch.ops.compiled_attn.flex_copy.v1(given)


# -------------------------------------------------------------------------------------------------- once in a graph


class _Graph:
    """What is known of a graph that is being traced: which of its nodes compute the same, and the blocks made."""

    def __init__(self) -> None:
        self.numbers: dict[torch.fx.Node, int] = {}
        self.expressions: dict[str, int] = {}
        self.mutations = 0
        self.made: dict[str, Any] = {}

    def number(self, graph: torch.fx.Graph) -> None:
        """Give nodes that compute the same one number (value numbering; views of a mask differ in each layer)."""
        for node in graph.nodes:
            if node in self.numbers:
                continue
            fresh = len(self.numbers)
            target = node.target
            pure = target is operator.getitem
            if isinstance(target, torch._ops.OpOverload):
                pure = torch.Tag.nondeterministic_seeded not in target.tags
                self.mutations += target._schema.is_mutable
            if node.op == "call_function" and pure:
                found = torch.fx.map_arg((node.args, node.kwargs), lambda one: f"%{self.numbers[one]}")  # type: ignore[arg-type]
                self.numbers[node] = self.expressions.setdefault(f"{target} {found} {self.mutations}", fresh)
            else:
                self.numbers[node] = fresh


_graphs: weakref.WeakKeyDictionary[torch.fx.Graph, _Graph] = weakref.WeakKeyDictionary()


def _once(mode: Any, func: Any, types: Any, args: tuple[Any, ...], kwargs: Any = None) -> Any:
    """Trace an operator into a graph; for inputs met before in this graph, what came out then."""
    tracer = mode.tracer
    known = _graphs.setdefault(tracer.graph, _Graph())
    known.number(tracer.graph)
    parts = [str(func), str(known.mutations)]
    for one in args:
        if isinstance(one, Tensor):
            slot = get_proxy_slot(one, tracer, None)
            parts.append(f"constant {id(one)}" if slot is None else f"%{known.numbers[slot.proxy.node]}")
        else:
            parts.append(str(one))
    key = " ".join(parts)
    if key not in known.made:
        # Never its body instead: Inductor bakes the strides of block lists that it computes itself into its kernel
        # before their layout is final (wrong numbers and illegal addresses on an H200, torch 2.11).
        known.made[key] = mode.__torch_dispatch__(func, types, args, kwargs)
    return known.made[key]


for _each in (_NAME, _COPY):
    torch.library.register_torch_dispatch(f"{NAMESPACE}::{_each}", ProxyTorchDispatchMode, _once, lib=_library)


# ------------------------------------------------------------------------------------------------- once for a tensor

_KEPT_AT_MOST = 8
_kept: OrderedDict[Any, tuple[Any, Blocks]] = OrderedDict()
_lock = threading.Lock()


def kept(
    mask: Tensor | None, key_padding: Tensor | None, q_length: int, k_length: int, causal: int, window: Any
) -> Blocks | None:
    """Blocks of an eager call, kept for as long as the caller's mask tensor lives unchanged; None: build them anew.

    For the dispatcher's eager calls alone. Inside an operator a tensor may be a buffer that Inductor reuses: the same
    object with other contents. For that reason nothing is kept for what has no version counter (inference tensors), or
    once CUDA graphs of torch.compile exist in the process, whose replays rewrite their outputs behind it.
    """
    mask = mask if mask is None or mask.dtype == torch.bool else None
    given = key_padding if mask is None else mask
    if given is None or (mask is not None and key_padding is not None):
        return None
    owner = given if given._base is None else given._base
    if owner.is_inference() or given.is_inference() or "torch._inductor.cudagraph_trees" in sys.modules:
        return None
    key = (
        id(owner), owner._version, given.data_ptr(), given.shape, given.stride(), q_length, k_length, causal, window,
        mask is None,
    )  # fmt: skip
    with _lock:
        found = _kept.get(key)
        if found is not None and found[0]() is owner:
            _kept.move_to_end(key)
            return found[1]
    with torch.inference_mode(False):  # or a later backward could not save them
        blocks = build(mask, key_padding, None, q_length, k_length, causal, window, given.device)
    with _lock:
        _kept[key] = (weakref.ref(owner), blocks)
        while len(_kept) > _KEPT_AT_MOST:
            _kept.popitem(last=False)
    return blocks
