"""Diffusers reaches this library: ``install()``, and our pins, contexts and default drive its models.

Its models bind ``dispatch_attention_fn`` by name when they are imported, so replacing it in the module that defines it
is not enough: every module that holds the function gets ours, and whatever is imported later finds ours there. The
same is done for ``attention_backend``, Diffusers' context manager, which would otherwise set a backend that nobody
reads any more. ``uninstall()`` puts back what was there.

A backend that Diffusers' own ``model.set_attention_backend(...)`` stored on a processor arrives as ``backend=`` and
is honoured for that processor; the process-wide value that method also writes belongs to Diffusers and is not read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from compiled_attn import dispatch, questions, state
from compiled_attn.spec import Call

_OWNER = "diffusers.models.attention_dispatch"
_lock = threading.RLock()


class _Originals:
    """What Diffusers had, while ours is installed. Attributes, not globals: the search below goes through globals."""

    def __init__(self) -> None:
        self.dispatch: Any = None
        self.context: Any = None
        self.wrappers: list[Any] = []  # of wrapped(), innermost last


_originals = _Originals()


# A function of its own: by its identity uninstall() tells what install() replaced from what imported
# compiled_attn.dispatch_attention_fn itself.
@functools.wraps(dispatch.dispatch_attention_fn)
def _dispatch_attention_fn(*args: Any, **kwargs: Any) -> Any:
    return dispatch.dispatch_attention_fn(*args, **kwargs)


def _attention_backend(backend: Any = "native") -> state.attention_backend:
    """Diffusers' context manager, ours inside: per thread, undone by exceptions, visible to Dynamo."""
    return state.attention_backend(getattr(backend, "value", backend))


def install() -> None:
    """Send every attention call that Diffusers dispatches to :func:`compiled_attn.dispatch_attention_fn`.

    Imports ``diffusers.models.attention_dispatch`` if need be. It does not matter whether models were imported, built
    or compiled before (compiled ones compile once more). Calling it again changes nothing.

    Raises ImportError if Diffusers is missing or older than its dispatcher.

    >>> from compiled_attn.integrations import diffusers
    >>> diffusers.install()
    >>> diffusers.is_installed()
    True
    >>> diffusers.uninstall()
    """
    with _lock:
        if is_installed():
            return
        _refuse_inside_wrapped("install")
        owner = _owner()
        _originals.dispatch, _originals.context = owner.dispatch_attention_fn, owner.attention_backend
        _replace({_originals.dispatch: _dispatch_attention_fn, _originals.context: _attention_backend})


def uninstall() -> None:
    """Give Diffusers its own dispatcher back, everywhere. Does nothing if ours is not installed."""
    with _lock:
        if not is_installed():
            return
        _refuse_inside_wrapped("uninstall")
        _replace({_dispatch_attention_fn: _originals.dispatch, _attention_backend: _originals.context})
        _originals.dispatch = _originals.context = None


def is_installed() -> bool:
    """Whether Diffusers' calls come here now."""
    return _originals.dispatch is not None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Context manager: :func:`install`, and back to what it was before.

    >>> from compiled_attn.integrations import diffusers
    >>> with diffusers.installed():
    ...     diffusers.is_installed()
    True
    """
    before = is_installed()
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Context manager: the different attention calls that Diffusers' models make inside it, in order.

    For eager code, with or without :func:`install`; the calls run as they would have. ``why_not`` and
    ``registry.refusal`` say which backends can serve them.

    >>> from compiled_attn.integrations import diffusers
    >>> with diffusers.recorded() as calls:
    ...     pass  # a forward of a model of Diffusers
    >>> calls
    []
    """
    calls: dict[Call, None] = {}
    found: list[Call] = []
    signature = inspect.signature(dispatch.dispatch_attention_fn)

    def watch(target: Callable[..., Any]) -> Callable[..., Any]:
        def recording(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            extra = dict(given.pop("attention_kwargs", None) or {})
            for name in ("backend", "parallel_config"):
                given.pop(name, None)
            call = questions.call_of(**given, **extra)
            if call not in calls:
                calls[call] = None
                found.append(call)
            return target(*args, **kwargs)

        return recording

    with wrapped(watch):
        yield found


@contextlib.contextmanager
def wrapped(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Context manager: Diffusers' models call ``wrap(f)`` where they would have called the dispatcher ``f``."""
    with _lock:
        current = _owner().dispatch_attention_fn
        outer = wrap(current)
        _replace({current: outer})
        _originals.wrappers.append(outer)
    try:
        yield
    finally:
        with _lock:
            _originals.wrappers.remove(outer)
            _replace({outer: current})


def _refuse_inside_wrapped(what: str) -> None:
    if _originals.wrappers:
        raise RuntimeError(f"{what}() was called inside recorded() or wrapped(); call it outside, before or after")


def as_compiled(call: Call) -> Call:
    """``call`` as it will be under ``torch.compile``."""
    return replace(call, compiling=True)


def _owner() -> types.ModuleType:
    try:
        importlib.import_module("diffusers")
        return importlib.import_module(_OWNER)
    except ModuleNotFoundError as error:
        if error.name is None or not _OWNER.startswith(error.name):
            raise
        seen = "is not installed" if error.name == "diffusers" else f"has no {error.name}, so it is too old"
        raise ImportError(
            f"compiled_attn.integrations.diffusers needs diffusers>=0.36, which {seen}: pip install -U diffusers"
        ) from error


def _replace(table: dict[Any, Any]) -> None:
    """Swap objects by identity among the globals of all loaded modules.

    All modules, not only those of Diffusers: processors live in training scripts and downloaded code as well, and
    whether such a module was imported before or after install() must not decide what it calls.
    """
    swap = {id(old): new for old, new in table.items()}
    for module in list(sys.modules.values()):
        if not isinstance(module, types.ModuleType) or module is sys.modules[__name__]:
            continue
        names = module.__dict__  # never getattr: Diffusers' packages import on attribute access
        for name, value in list(names.items()):
            new = swap.get(id(value))
            if new is not None:
                names[name] = new
