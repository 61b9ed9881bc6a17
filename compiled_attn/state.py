"""Which backend is active: the process default, contexts, and pins on modules.

One string per thread answers the question on the traced path: ``slot().name``. Contexts write it, the default is
pushed into it, pins push and pop it round a module's forward. One place to read means one Dynamo guard, and the
same graph whether a backend was chosen by a context or as the default.

Facts this file rests on (torch 2.13): Dynamo cannot trace ContextVar; a ``threading.local`` subclass must set its
attributes in ``__init__`` (a class-level default is silently stale in compiled code); forward hooks are not guarded.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import os
import threading
import types
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import nn

from . import registry
from .registry import DEFAULT

SWITCH = "switch"
_ENVIRONMENT = ("COMPILED_ATTN_BACKEND", "DIFFUSERS_ATTN_BACKEND")


class _Process:
    """The default of the process and where it came from."""

    def __init__(self) -> None:
        self.default, self.origin = DEFAULT, ""
        for variable in _ENVIRONMENT:
            if os.environ.get(variable):
                self.default, self.origin = os.environ[variable], f" (from {variable})"
                break


class Slot:
    """The state of one thread.

    ``inner``    the innermost context or pin entered by code that is being *traced*, None at rest. Compiled code
                 writes back what it touched when the frame ends; were that ``name``, it could overwrite a default
                 that another thread had set meanwhile;
    ``name``     what an attention call binds to when ``inner`` is None;
    ``context``  the innermost context or pin entered by eager code, None outside of all;
    ``runtime``  what ``switch`` runs: the innermost context (``outer``) or default that is not ``switch`` itself.
                 Pins do not touch it: in a compiled graph their Python is gone when ``switch`` runs;
    ``traced``   True inside a context entered by code that is being traced (``switch`` cannot see that one);
    ``recompute`` True while ``checkpoint_context_fn`` recomputes a forward;
    ``reached``  set by eager attention calls, read by the check of pins.
    """

    def __init__(self) -> None:
        self.inner: str | None = None
        self.context: str | None = None
        self.outer: str | None = None
        self.traced = False
        self.recompute = False
        self.reached = False
        with _lock:
            self.name = _process.default
            self.runtime = _runtime(_process.default)
            _slots.add(self)


class _Local(threading.local):
    def __init__(self) -> None:
        self.slot = Slot()


def _runtime(name: str) -> str:
    return DEFAULT if name == SWITCH else name


_lock = threading.Lock()
_slots: weakref.WeakSet[Slot] = weakref.WeakSet()
_process = _Process()
_local = _Local()


def slot() -> Slot:
    """The calling thread's slot."""
    return _local.slot


def origin(name: str) -> str:
    """Where an unknown default came from, for its error message."""
    return _process.origin if name == _process.default else ""


def active_backend() -> str:
    """The name of the backend that an attention call made here and now, without ``backend=``, would use.

    >>> import compiled_attn
    >>> with compiled_attn.attention_backend("_native_math"):
    ...     compiled_attn.active_backend()
    '_native_math'
    """
    slot = _local.slot
    return slot.name if slot.inner is None else slot.inner


def set_default_backend(name: str) -> None:
    """Use backend ``name`` in every thread, wherever no context and no pin says otherwise.

    Raises ValueError for an unknown name, NotImplementedError if the backend cannot run in this process.

    >>> import compiled_attn
    >>> compiled_attn.set_default_backend("_native_math")
    >>> compiled_attn.active_backend()
    '_native_math'
    >>> compiled_attn.set_default_backend("native")
    """
    registry.usable(name)
    with _lock:
        _process.default, _process.origin = name, ""
        for one in list(_slots):
            if one.context is None:
                one.name = name
            if one.outer is None:
                one.runtime = _runtime(name)


def _restore(slot: Slot, inner: str | None, context: str | None, outer: str | None) -> None:
    """Leave an eager context or pin: what the slot says again is ``context``, or the default of this moment."""
    slot.inner = inner
    slot.context = context
    slot.outer = outer
    slot.runtime = _process_runtime() if outer is None else outer
    slot.name = _process.default if context is None else context
    if context is None:
        # set_default_backend in another thread may have pushed between our reading and our writing
        while slot.name != _process.default or (outer is None and slot.runtime != _process_runtime()):
            slot.name = _process.default
            if outer is None:
                slot.runtime = _process_runtime()


def _tracing() -> bool:
    # Not is_compiling(): that flag is the process's, and a thread that compiles would mislead all the others.
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def _process_runtime() -> str:
    return _runtime(_process.default)


class attention_backend:
    """Context manager: attention calls inside use backend ``name``, in this thread only.

    Works round a compiled call and inside a compiled function, nested, and is undone by exceptions. Construct it
    where it is entered. The innermost of contexts and pins wins. Like ``torch.no_grad`` it belongs to a thread, not
    to an asyncio task: do not hold it across an ``await``.

    Raises ValueError for an unknown name, NotImplementedError if the backend cannot run in this process.

    >>> import torch, compiled_attn
    >>> x = torch.randn(1, 8, 2, 16)
    >>> with compiled_attn.attention_backend("_native_math"):
    ...     out = compiled_attn.attention(x, x, x)
    >>> out.shape
    torch.Size([1, 8, 2, 16])
    """

    def __init__(self, name: str) -> None:
        if _tracing():
            if name not in registry.BACKENDS:
                raise registry.unknown(name)
        else:
            registry.usable(name)
        self.name = name

    def __enter__(self) -> None:
        slot = _local.slot
        self.inner = slot.inner
        self.in_trace = _tracing()
        if self.in_trace:
            self.traced = slot.traced
            slot.inner = self.name
            slot.traced = True
            return
        self.context = slot.context
        self.outer = slot.outer
        slot.inner = None
        slot.context = slot.name = self.name
        if self.name != SWITCH:
            slot.outer = slot.runtime = self.name

    def __exit__(self, *exc: object) -> None:
        slot = _local.slot
        if self.in_trace:
            slot.inner = self.inner
            slot.traced = self.traced
        else:
            _restore(slot, self.inner, self.context, self.outer)


class recompute:
    """Context manager for the recomputation of a checkpointed forward: what the slot said when it was made holds
    again, in whatever thread enters it."""

    def __init__(self) -> None:
        self.name, self.runtime = active_backend(), _local.slot.runtime

    def __enter__(self) -> None:
        slot = _local.slot
        self.saved = (slot.inner, slot.context, slot.outer)
        self.outer_recompute = slot.recompute
        slot.inner, slot.recompute = None, True
        slot.context = slot.name = self.name
        slot.outer = slot.runtime = self.runtime

    def __exit__(self, *exc: object) -> None:
        slot = _local.slot
        slot.recompute = self.outer_recompute
        _restore(slot, *self.saved)


# ---------------------------------------------------------------------------------------------------------------
# Pins. A pinned module carries the backend's name as an attribute (Dynamo guards it like any other) and an instance
# `forward` that enters it. Every descendant outside torch.nn gets one too: activation checkpointing recomputes a
# block by calling the block, not the root, and a pin on the root alone would be lost there.

_PIN = "_compiled_attn_pin"  # the backend in force on this module
_OWN = "_compiled_attn_own_pin"  # set on this module itself, not on a parent
_FROM_PARENT = "_compiled_attn_parent_pin"
_UNPROVEN = "_compiled_attn_unproven"
# What the instance's forward was before (None: the class's), and the class's. The pinned one is a bound method of one
# function: that function is what Dynamo guards. Any other object it guards as that object, so that each of fifty equal
# blocks would compile a graph of its own.
_ORIGINAL = "_compiled_attn_original"
_OF_CLASS = "_compiled_attn_of_class"


def set_attention_backend(module: nn.Module, name: str) -> None:
    """Pin ``module`` and everything in it to backend ``name`` until :func:`reset_attention_backend`.

    Nothing else in the process changes. A pin set on a submodule wins over its parents' pins, whichever came first.
    Pins survive ``copy.deepcopy`` and pickle, and hold in activation checkpointing, other threads, ``torch.compile``
    (one graph for each backend, going back is free) and ``torch.export``.

    Raises ValueError for an unknown name, NotImplementedError if the backend cannot run in this process. If the first
    eager forward of ``module`` reaches no attention call of this library, a UserWarning says so, once.

    >>> import torch, compiled_attn
    >>> class Block(torch.nn.Module):
    ...     def forward(self, x):
    ...         return compiled_attn.attention(x, x, x)
    >>> block = Block()
    >>> compiled_attn.set_attention_backend(block, "_native_math")
    >>> block(torch.randn(1, 8, 2, 16)).shape
    torch.Size([1, 8, 2, 16])
    >>> compiled_attn.reset_attention_backend(block)
    """
    registry.usable(name)
    module = unwrapped(module)
    module.__dict__[_OWN] = name
    module.__dict__[_UNPROVEN] = True
    _spread(module, module.__dict__.get(_FROM_PARENT))


def reset_attention_backend(module: nn.Module) -> None:
    """Remove the pins of ``module`` and of everything in it; a pin of a parent shows again.

    >>> import torch, compiled_attn
    >>> compiled_attn.reset_attention_backend(torch.nn.Linear(2, 2))
    """
    module = unwrapped(module)
    for one in module.modules():
        one.__dict__.pop(_OWN, None)
        one.__dict__.pop(_UNPROVEN, None)
    _spread(module, module.__dict__.get(_FROM_PARENT))


def pin_of(module: nn.Module) -> str | None:
    """The backend that ``module`` is pinned to, by itself or by a parent; None if it is not."""
    return unwrapped(module).__dict__.get(_PIN)


@contextlib.contextmanager
def pin_put_back(module: nn.Module) -> Iterator[None]:
    """Inside, the pin of ``module`` may be set; afterwards it is as before, its own or a parent's."""
    module = unwrapped(module)
    saved = {key: module.__dict__[key] for key in (_OWN, _UNPROVEN) if key in module.__dict__}
    try:
        yield
    finally:
        for key in (_OWN, _UNPROVEN):
            module.__dict__.pop(key, None)
        module.__dict__.update(saved)
        _spread(module, module.__dict__.get(_FROM_PARENT))


class AttentionBackendMixin:
    """Gives a module class the two methods that users of Diffusers know.

    >>> import torch, compiled_attn
    >>> class Block(compiled_attn.AttentionBackendMixin, torch.nn.Module):
    ...     def forward(self, x):
    ...         return compiled_attn.attention(x, x, x)
    >>> block = Block()
    >>> block.set_attention_backend("_native_math")
    >>> block.reset_attention_backend()
    """

    def set_attention_backend(self, name: str) -> None:
        """Pin this module: see :func:`compiled_attn.set_attention_backend`."""
        assert isinstance(self, nn.Module)
        set_attention_backend(self, name)

    def reset_attention_backend(self) -> None:
        """Remove the pins: see :func:`compiled_attn.reset_attention_backend`."""
        assert isinstance(self, nn.Module)
        reset_attention_backend(self)


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module inside what torch.compile returned (whose own ``forward`` is Dynamo's)."""
    return getattr(module, "_orig_mod", module)


def _spread(module: nn.Module, from_parent: str | None) -> None:
    own = module.__dict__.get(_OWN)
    pin = from_parent if own is None else own
    compiled_wrapper = "_orig_mod" in module._modules
    pinned = own is not None or _PIN in module.__dict__  # a container of torch.nn can be pinned itself
    if pinned or not (compiled_wrapper or type(module).__module__.startswith("torch.nn")):
        _install(module, pin)
    # also on containers, which have no pin: their children go back to this one when a pin of the container goes
    if from_parent is None:
        module.__dict__.pop(_FROM_PARENT, None)
    else:
        module.__dict__[_FROM_PARENT] = from_parent
    for child in module.children():
        _spread(child, pin)


def _install(module: nn.Module, pin: str | None) -> None:
    state = module.__dict__
    forward = state.get("forward")
    if pin is not None:
        state[_PIN] = pin
        if is_pinned(forward):
            return
        # A plain function: Dynamo cannot look it up on a class marked allow_in_graph, as Diffusers' blocks are.
        of_class = type(module).forward
        if _OF_CLASS in state:  # others wrapped our forward, which still needs what it finds on the module
            state["forward"] = functools.partial(_run_pinned, module, forward, of_class)
        else:
            state[_ORIGINAL], state[_OF_CLASS] = forward, of_class
            state["forward"] = types.MethodType(_forward_for(of_class), module)
    elif isinstance(forward, functools.partial) and is_pinned(forward):
        state["forward"] = forward.args[1]
        state[_PIN] = None
    elif is_pinned(forward):
        del state["forward"], state[_OF_CLASS], state[_PIN]
        original = state.pop(_ORIGINAL)
        if original is not None:
            state["forward"] = original
    elif _PIN in state:
        state[_PIN] = None  # others wrapped our forward; without a pin it passes through


def is_pinned(forward: Any) -> bool:
    """Whether ``forward``, of an instance, is what a pin put there."""
    if isinstance(forward, types.MethodType):
        return any(forward.__func__ is one for one in _forwards.values())
    return isinstance(forward, functools.partial) and forward.func is _run_pinned


# By the forward of a class: Dynamo's limit of 8 graphs is for one code object, so that every class gets its own.
_forwards: weakref.WeakKeyDictionary[Any, types.FunctionType] = weakref.WeakKeyDictionary()


def _forward_for(of_class: Any) -> types.FunctionType:
    found = _forwards.get(of_class)
    if found is None:
        code = _pinned_forward.__code__.replace(co_name=f"_pinned_forward_of_{of_class.__qualname__}")
        found = _forwards[of_class] = types.FunctionType(code, globals())
    return found


def _pinned_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _run_pinned(module, getattr(module, _ORIGINAL), getattr(module, _OF_CLASS), *args, **kwargs)


def _run_pinned(module: nn.Module, original: Any, of_class: Any, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(of_class, module) if original is None else original
    pin = getattr(module, _PIN)
    if pin is None:
        return forward(*args, **kwargs)
    slot = _local.slot
    inner = slot.inner
    if _tracing():
        if inner == pin:  # a parent's: nothing to write, which Dynamo of torch 2.9 cannot do inside a checkpoint
            return forward(*args, **kwargs)
        slot.inner = pin
        try:
            return forward(*args, **kwargs)
        finally:
            slot.inner = inner
    context, outer = slot.context, slot.outer
    slot.inner = None
    slot.context = slot.name = pin
    unproven = module.__dict__.pop(_UNPROVEN, False)
    if unproven:
        slot.reached = False
    try:
        result = forward(*args, **kwargs)
    finally:
        _restore(slot, inner, context, outer)
    if unproven and not slot.reached and not _has_compiled_parts(module):
        warnings.warn(
            f"{type(module).__name__} is pinned to attention backend {pin!r}, but its forward made no "
            "compiled_attn call: the pin has no effect. Models of Diffusers reach this library through "
            "compiled_attn.integrations.diffusers.install().",
            stacklevel=4,
        )
    return result


def _reduce_method(method: types.MethodType) -> tuple[Any, ...]:
    """How pickle takes bound methods: by name, as ever, and ours, which no class has under any name, by ``_bound``."""
    if is_pinned(method):
        return _bound, (method.__self__,)
    return getattr, (method.__self__, method.__func__.__name__)


def _bound(module: nn.Module) -> types.MethodType:
    return types.MethodType(_forward_for(type(module).forward), module)


copyreg.pickle(types.MethodType, _reduce_method)  # type: ignore[arg-type]
ForkingPickler.register(types.MethodType, _reduce_method)


def _has_compiled_parts(module: nn.Module) -> bool:
    """Compiled submodules make their attention calls where ``reached`` cannot see them."""
    return any(one._compiled_call_impl is not None or "_orig_mod" in one._modules for one in module.modules())
