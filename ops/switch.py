"""`switch`: one operator that looks its backend up when it runs.

A model compiled with it has one graph for all backends; so has a loaded ``.pt2``. What runs is the backend of the
calling thread's context, else the process default. ``state``, an int64 CPU tensor, tells backward what ran: backward
may run in another thread, under another context.

Where looking up late would be wrong without a word, it raises: while a CUDA graph is captured (the replay would keep
today's kernel; the tag ``cudagraph_unsafe`` makes Inductor cut its graphs round it) and when its forward is recomputed
inside backward, unless ``compiled_attn.checkpoint_context_fn`` brings the backend back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compiled_attn import registry
from compiled_attn.operators import Kernels, call_of
from compiled_attn.registry import Backend, Entry, register_backend
from compiled_attn.spec import Limits, report
from compiled_attn.state import slot


def _active(q: Tensor) -> Entry:
    here = slot()
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "backend 'switch' was called while a CUDA graph is captured: every replay would run the kernel chosen now. "
            "Name a backend for captured code, or let torch.compile(mode='reduce-overhead') cut its graphs round it"
        )
    if torch._C._current_graph_task_id() != -1 and not here.recompute:
        raise RuntimeError(
            "backend 'switch' was recomputed inside backward (activation checkpointing), where the context of its "
            "forward is gone. Pass context_fn=compiled_attn.checkpoint_context_fn to checkpoint(..., "
            "use_reentrant=False), or name a backend"
        )
    return registry.find(here.runtime)


def _check(entry: Entry, args: tuple[Any, ...], gradient: bool) -> None:
    """Refuse what the backend found at run time cannot serve; calls seen before pass at once."""
    q, k, v = args[:3]
    varlen = q.dim() == 3
    *_, dropout_p, causal, _, gqa, window, deterministic, return_lse = args
    mask, key_padding = (None, None) if varlen else args[3:5]
    facts = (
        None if mask is None else mask.dtype, key_padding is None, dropout_p, causal, gqa,
        None if window is None else tuple(window), deterministic, return_lse, gradient,
        varlen and args[3] is args[4],
    )  # fmt: skip
    process = torch.are_deterministic_algorithms_enabled()
    seen = ("switch", entry.number, q.shape, k.shape, v.shape, q.dtype, q.device, facts, process)
    if seen in registry.served:
        return
    call = call_of(args, varlen, gradient)
    found = registry.unavailable(entry.backend.name) + registry.refusal(entry, call)
    kernels = entry.backend.varlen if call.varlen else entry.backend.dense
    if not entry.backend.switchable or (kernels is not None and _state_size(kernels, q, dropout_p) > 0):
        found.append("be chosen at run time: its backward needs a state of its own, or it says switchable=False")
    if found:
        raise NotImplementedError(report(f"backend '{entry.backend.name}', active when 'switch' ran, cannot:", found))
    registry.remember(seen)


def _state_size(kernels: Kernels, q: Tensor, dropout_p: float) -> int:
    return 0 if kernels.fake_state is None else kernels.fake_state(q, dropout_p).numel()


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, *options: Any) -> Any:
    asked = entry = _active(q)
    _check(entry, (q, k, v, mask, key_padding, *options), False)
    if entry.backend.delegate is not None:
        causal, scale, window = options[1], options[2], options[4]
        entry = registry.find(entry.backend.delegate(q, k, v, mask, key_padding, causal, scale, window))
    assert entry.backend.dense is not None
    out, lse, _ = entry.backend.dense.forward(q, k, v, mask, key_padding, *options)
    return out, lse if options[-1] else None, torch.tensor([entry.number, asked.number])


def _varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int, *options: Any
) -> Any:
    entry = _active(q)
    _check(entry, (q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *options), False)
    assert entry.backend.varlen is not None
    out, lse, _ = entry.backend.varlen.forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *options)
    return out, lse if options[-1] else None, torch.tensor([entry.number, entry.number])


def _ran(state: Tensor) -> tuple[Entry, Entry]:
    """The backend that ran, and the one that was asked for (`native` delegates)."""
    entries = list(registry.BACKENDS.values())
    return entries[int(state[0])], entries[int(state[1])]


def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, key_padding: Any, *rest: Any) -> Any:
    out, lse, state, *options, mask_gradient = rest
    entry, asked = _ran(state)
    _check(entry, (q, k, v, mask, key_padding, *options, True), True)
    if mask_gradient and not any(limit.mask_gradient for limit in entry.backend.limits):
        if entry is asked:
            raise NotImplementedError(f"backend '{entry.backend.name}' gives no gradient for attn_mask")
        # It was chosen without knowing that the mask wants a gradient: inside a graph no tensor says so. The math
        # backward computes the weights again, and is right after any forward.
        entry = registry.find("_native_math")
    assert entry.backend.dense is not None and entry.backend.dense.backward is not None
    empty = state.new_empty(0, device=q.device)
    return entry.backend.dense.backward(grad_out, q, k, v, mask, key_padding, out, lse, empty, *options, mask_gradient)


def _varlen_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    *structure, out, lse, state = rest[:7]
    options = rest[7:-1]
    entry, _ = _ran(state)
    _check(entry, (q, k, v, *structure, *options, True), True)
    assert entry.backend.varlen is not None and entry.backend.varlen.backward is not None
    empty = state.new_empty(0, device=q.device)
    return entry.backend.varlen.backward(grad_out, q, k, v, *structure, out, lse, empty, *options, False)


def _fake_state(q: Tensor, dropout_p: float) -> Tensor:
    return torch.empty(2, dtype=torch.int64)


_TAGS = (torch.Tag.cudagraph_unsafe,)
_RUN = Limits(
    ("cpu", "cuda"),
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    value_head_dim=True,
    masks=("none", "key_padding", "bool", "float"),
    mask_gradient=True,
    window=True,
)
_LIMITS = (_RUN, replace(_RUN, devices=("xpu", "mps", "npu", "xla"), verified="not run"))

# No dropout: the random state lives on the device, `state` on the CPU.
register_backend(
    Backend(
        "switch",
        "looks its backend up when it runs: one graph for all",
        family="ours",
        limits=_LIMITS,
        dense=Kernels(_forward, _backward, fake_state=_fake_state, tags=_TAGS),
        varlen_limits=_LIMITS,
        varlen=Kernels(_varlen_forward, _varlen_backward, fake_state=_fake_state, tags=_TAGS),
    )
)
