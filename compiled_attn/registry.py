"""The backends: one record each, registered by the file in ``ops/`` that holds its kernels.

Nothing here knows a backend by name, except that the process falls back to :data:`DEFAULT` when nobody chose.
"""

from __future__ import annotations

import difflib
import keyword
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import operators, sources
from .operators import Kernels
from .packages import Package
from .spec import Call, Limits, mistakes, reasons, report

DEFAULT = "native"


@dataclass(frozen=True)
class Backend:
    """One attention backend, as given to :func:`register_backend`.

    ``dense`` and ``varlen`` are its kernels for :func:`compiled_attn.attention` and
    :func:`compiled_attn.varlen_attention` (None: it refuses such calls), ``limits`` and ``varlen_limits`` what
    they take, one entry for each group of device types. ``packages`` are needed beside PyTorch;
    ``available`` returns reasons why the backend cannot run in this process at all (a torch too old, say).

    ``partner`` names the backend, registered before, whose packed kernels serve this one in ``varlen_attention``.
    ``packed`` says that the name is a varlen one (``flash_varlen``): its packed operator has that name, and the
    operator for ``attention`` is ``<name>_dense``.

    ``traced(q, k, v, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse)``
    returns ``(out, lse)`` and, where ``takes_traced(call)`` is true, is called instead of the operator: for what
    cannot be an operator's argument, such as a BlockMask. ``mask`` is then whatever the caller gave.

    ``switchable=False`` keeps it from being chosen by ``switch``, as does a ``state`` (``Kernels.fake_state``) that is
    not empty without dropout: switch brings its own.

    ``fastest(call)``, asked of calls that it can serve, says that no other backend without a package of its own was
    measured to have a faster forward there; ``explain`` names it.

    ``delegate`` names the backend that serves a call at run time (used by ``switch``, whose backward must know).

    >>> import compiled_attn
    >>> compiled_attn.backend_info("native").summary
    "scaled_dot_product_attention, PyTorch's own choice of kernel"
    """

    name: str
    summary: str
    limits: tuple[Limits, ...] = ()
    dense: Kernels | None = None
    varlen_limits: tuple[Limits, ...] = ()
    varlen: Kernels | None = None
    family: str = "third party"
    packages: tuple[Package, ...] = ()
    available: Callable[[], list[str]] | None = None
    traced: Callable[..., Any] | None = None
    takes_traced: Callable[[Call], bool] | None = None
    delegate: Callable[..., str] | None = None
    fastest: Callable[[Call], bool] | None = None
    switchable: bool = True
    partner: str | None = None
    packed: bool = False

    def operator_names(self) -> tuple[str, str]:
        """What the dense and the packed operator are called, without namespace and version."""
        return (f"{self.name}_dense", self.name) if self.packed else (self.name, f"{self.name}_varlen")


@dataclass(frozen=True)
class Entry:
    """A registered backend with its operators."""

    backend: Backend
    number: int
    op: torch._ops.OpOverload | None = None
    varlen_op: torch._ops.OpOverload | None = None


BACKENDS: dict[str, Entry] = {}

# Keys of eager calls that passed every static check: the rules cost 10 us a call, finding a known call under 1 us.
served: set[Hashable] = set()
_SERVED_AT_MOST = 4096

# Checks of values are added to every call while this is true; compiled_attn.set_checks writes it.
checks_enabled = False

# The dense and the packed call on DTensors; compiled_attn.integrations.dtensor.install() writes them.
distributed: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def register_backend(backend: Backend) -> None:
    """Register ``backend`` under ``backend.name`` and define its operators.

    Raises ValueError when the name is taken, is no identifier, or kernels and limits do not go together.
    A worked example is ``examples/backend.py``.

    >>> import compiled_attn
    >>> compiled_attn.register_backend(compiled_attn.Backend("my-backend", "says what is missing"))
    Traceback (most recent call last):
    ValueError: cannot register backend 'my-backend':
      the name is not an identifier; operators need one
      it has neither dense nor varlen kernels
    """
    name = backend.name
    found = []
    if not (name.isidentifier() and name.isascii()) or keyword.iskeyword(name):
        found.append("the name is not an identifier; operators need one")
    if name in BACKENDS:
        found.append("the name is taken; list_backends() has all names")
    if name.endswith(("_backward", "_dense")):
        found.append("the name ends like an operator that backends get by themselves")
    packed_op = None
    if backend.partner is not None:
        if backend.varlen is not None or backend.varlen_limits:
            found.append("it has a partner, and varlen kernels or limits of its own")
        partner = BACKENDS.get(backend.partner)
        if partner is None or partner.varlen_op is None:
            found.append(f"its partner {backend.partner!r} has no varlen kernels, or is not registered yet")
        else:
            packed_op = partner.varlen_op
            backend = replace(backend, varlen=partner.backend.varlen, varlen_limits=partner.backend.varlen_limits)
    bases = backend.operator_names()
    own_varlen = None if packed_op is not None else backend.varlen
    for kernels, base in ((backend.dense, bases[0]), (own_varlen, bases[1])):
        if kernels is not None and name not in BACKENDS and operators.is_defined(base):
            found.append(f"operator {base!r} is taken, by another backend or by this library")
    if (backend.traced is None) != (backend.takes_traced is None):
        found.append("traced and takes_traced must be given together")
    if backend.dense is None and backend.varlen is None:
        found.append("it has neither dense nor varlen kernels")
    for which, kernels, limits in (
        ("dense", backend.dense, backend.limits),
        ("varlen", backend.varlen, backend.varlen_limits),
    ):
        if (kernels is None) != (not limits):
            found.append(f"{which} kernels and {which} limits must be given together")
        elif kernels is not None and kernels.backward is None and not kernels.composite:
            if any(limit.gradient for limit in limits):
                found.append(f"{which} limits promise a gradient, the kernels have no backward")
    if found:
        raise ValueError(report(f"cannot register backend {name!r}:", found))
    dense, varlen = backend.dense, backend.varlen
    if packed_op is None and varlen is not None:
        packed_op = operators.define(bases[1], varlen, varlen=True)
    for kernels in (dense, varlen):
        if kernels is not None and (kernels.composite or kernels.inlined):
            sources.note(kernels.forward)
            sources.note(kernels.backward)
    BACKENDS[name] = Entry(
        backend,
        number=len(BACKENDS),
        op=operators.define(bases[0], dense) if dense else None,
        varlen_op=packed_op,
    )


def list_backends() -> list[str]:
    """The names of all registered backends, runnable here or not, in the order of registration.

    >>> import compiled_attn
    >>> compiled_attn.list_backends()[:2]
    ['native', '_native_math']
    """
    return list(BACKENDS)


def unknown(name: object, origin: str = "") -> ValueError:
    """The error for a name that is no backend, with the nearest one."""
    text = f"unknown attention backend {name!r}{origin}"
    near = _nearest(name) if isinstance(name, str) else ""
    if near:
        text += f", did you mean {near!r}?"
    return ValueError(f"{text}; known: {', '.join(list_backends())}")


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), list_backends(), n=1, cutoff=0.5)
    return near[0] if near else ""


# as torch.compiler.assume_constant_result does: Dynamo cannot trace difflib, and the message would be lost
_nearest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find(name: str, origin: str = "") -> Entry:
    """The entry called ``name``; raises ValueError with the nearest name."""
    entry = BACKENDS.get(name)
    if entry is None:
        raise unknown(name, origin)
    return entry


def usable(name: str) -> str:
    """``name`` if that backend exists and its packages are there; otherwise raise with all reasons.

    For the places where a backend is *set*: eager, so that it may look at packages and import.
    """
    entry = find(name)
    found = unavailable(name)
    if found:
        raise NotImplementedError(report(f"backend {name!r} cannot run here:", found))
    for package in entry.backend.packages:
        package.load()  # may download (kernels of the Hub), which is why unavailable() does not
    return entry.backend.name


def unavailable(name: str) -> list[str]:
    """Every reason why backend ``name`` cannot run in this process; empty when it can."""
    backend = find(name).backend
    found: list[str] = []
    for package in backend.packages:
        found += package.missing()
    if backend.available is not None:
        found += backend.available()
    return found


def backend_info(name: str) -> Backend:
    """The record of backend ``name``: its summary, limits, packages. Raises ValueError for an unknown name.

    >>> import compiled_attn
    >>> compiled_attn.backend_info("_native_math").limits[0].window
    True
    """
    return find(name).backend


def refusal(entry: Entry, call: Call) -> list[str]:
    """Every reason why ``entry`` cannot serve ``call``."""
    backend = entry.backend
    if call.varlen:
        if backend.varlen is None:
            return ["has no varlen kernel"]
        return reasons(backend.varlen_limits, call)
    if backend.dense is None:
        return ["has no dense kernel"]
    return reasons(backend.limits, call)


def check(entry: Entry, call: Call) -> None:
    """Raise ValueError if ``call`` makes no sense, NotImplementedError if ``entry`` cannot serve it."""
    wrong = mistakes(call)
    if wrong:
        raise ValueError(report("attention call makes no sense:", wrong))
    found = refusal(entry, call)
    if found:
        raise NotImplementedError(
            report(f"backend '{entry.backend.name}' cannot run this call:", found)
            + "\n  compiled_attn.explain(...) shows which backends can"
        )


def remember(seen: Hashable) -> None:
    """Note that an eager call passed its checks; ``seen`` holds everything the rules looked at."""
    if len(served) >= _SERVED_AT_MOST:
        served.clear()
    served.add(seen)
