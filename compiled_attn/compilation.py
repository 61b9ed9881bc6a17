"""torch.compile with what many backends need: a recompile limit that fits, all graphs up front, checkpointing."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import registry
from .sources import fingerprint, others
from .state import attention_backend, pin_of, pin_put_back, recompute, set_attention_backend

# torch's own limit is 8 graphs for each function; there are more backends than that.
RECOMPILE_LIMIT = 64
_TAG = "compiled_attn="


def compile(model: Any = None, **options: Any) -> Any:
    """``torch.compile`` whose recompile limit leaves room for a graph of every backend.

    Takes the options of ``torch.compile``; ``recompile_limit`` defaults to 64 instead of 8, past which
    ``fullgraph=True`` fails and other calls silently run uncompiled. Also works as a decorator.

    >>> import torch, compiled_attn
    >>> model = compiled_attn.compile(torch.nn.Linear(2, 2), fullgraph=True, backend="eager")
    >>> model(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """
    if model is None:
        return functools.partial(compile, **options)
    mark_caches()
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return torch.compile(model, **{"recompile_limit": RECOMPILE_LIMIT, **options})
    # Before torch had the keyword the limit was the process's alone. Raised, never lowered.
    limit = options.pop("recompile_limit", RECOMPILE_LIMIT)
    torch._dynamo.config.recompile_limit = max(limit, torch._dynamo.config.recompile_limit)
    return torch.compile(model, **options)


def precompile(model: Any, backends: Iterable[str], *args: Any, **kwargs: Any) -> None:
    """Run ``model(*args, **kwargs)`` once under each backend, so that no later swap among them compiles.

    ``model`` is a compiled module or function. If the module is pinned, its pin takes each name in turn and is put
    back; otherwise contexts do, which serve contexts and defaults alike. Shows a progress bar on stderr. Gradients are
    not touched; call it under the grad mode that the later calls will have, as torch compiles one graph for each.

    Raises ValueError for an unknown name and NotImplementedError for a backend that cannot run in this process,
    both before anything is compiled.

    >>> import torch, compiled_attn
    >>> def block(x):
    ...     return compiled_attn.attention(x, x, x)
    >>> compiled = compiled_attn.compile(block, fullgraph=True, backend="eager")
    >>> compiled_attn.precompile(compiled, ["native", "_native_math"], torch.randn(1, 8, 2, 16))
    """
    names = [registry.usable(name) for name in backends]
    pinned = pin_of(model) if isinstance(model, nn.Module) else None
    with contextlib.nullcontext() if pinned is None else pin_put_back(model):
        for name in (progress := tqdm(names, desc="precompile", unit="backend")):
            progress.set_postfix_str(name)
            if pinned is None:
                with attention_backend(name):
                    model(*args, **kwargs)
            else:
                set_attention_backend(model, name)
                model(*args, **kwargs)


def checkpoint_context_fn(policy: Any = None) -> tuple[Any, Any]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``.

    Eager: the recomputation, which happens inside backward and outside every ``with`` of the forward, runs the backend
    that the forward ran. Compiled: the outputs of ``switch`` are kept instead of recomputed, as the recomputation could
    not know its backend.

    ``policy`` says what else is kept, as for ``torch.utils.checkpoint.create_selective_checkpoint_contexts``: a list of
    operators, or a function ``(ctx, op, *args, **kwargs) -> CheckpointPolicy``; pass it with ``functools.partial``. Our
    operators are ``torch.ops.compiled_attn.<backend>.v1``; composite backends (PyTorch's own) appear as the operators
    of aten that they are made of. Without it all else is recomputed.

    >>> import torch, compiled_attn
    >>> from torch.utils.checkpoint import checkpoint
    >>> def block(x):
    ...     return compiled_attn.attention(x, x, x)
    >>> x = torch.randn(1, 8, 2, 16, requires_grad=True)
    >>> with compiled_attn.attention_backend("_native_math"):
    ...     out = checkpoint(block, x, use_reentrant=False, context_fn=compiled_attn.checkpoint_context_fn)
    >>> out.sum().backward()
    """
    # torch 2.9 asks while AOTAutograd traces, when is_compiling() is False
    if torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        return create_selective_checkpoint_contexts(functools.partial(_policy, policy))
    if policy is None:
        return contextlib.nullcontext(), recompute()
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    forward, backward = create_selective_checkpoint_contexts(policy)
    return forward, _Both(backward, recompute())


def _policy(policy: Any, ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    if op in (torch.ops.compiled_attn.switch.v1, torch.ops.compiled_attn.switch_varlen.v1):
        return CheckpointPolicy.MUST_SAVE
    if callable(policy):
        return policy(ctx, op, *args, **kwargs)
    return CheckpointPolicy.MUST_SAVE if op in (policy or ()) else CheckpointPolicy.PREFER_RECOMPUTE


class _Both:
    """Two context managers as one that can be entered again: torch does, for a second backward."""

    def __init__(self, *both: Any) -> None:
        self.both = both

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for one in self.both:
                stack.enter_context(one)
            self.stack = stack.pop_all()

    def __exit__(self, *exc: Any) -> None:
        self.stack.__exit__(*exc)


def mark_caches() -> None:
    """Put our fingerprint into the key of PyTorch's on-disk compile caches, beside what the user has there.

    Without it a warm cache runs old code after an upgrade (reproduced on torch 2.13: pytorch #144344, #160472). Done at
    import, and again whenever a call is traced and by ``package``: the key may have been assigned in between, or a
    backend registered whose code compilers look into.
    """
    config = torch.compiler.config
    parts = [part for part in config.cache_key_tag.split(";") if part and not part.startswith(_TAG)]
    wanted = ";".join([*parts, _TAG + fingerprint() + others()])
    if config.cache_key_tag != wanted:
        config.cache_key_tag = wanted


# as torch.compiler.assume_constant_result does: Dynamo calls it when it traces a call, before any key is made
mark_caches._dynamo_marked_constant = True  # type: ignore[attr-defined]
mark_caches()
