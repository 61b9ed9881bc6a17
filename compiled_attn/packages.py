"""The packages that backends need: found, checked, imported and bound once, never inside a traced call.

``missing()`` tells apart, each with its fix, a package that is absent, another one of the same name, one that is too
old, one that fails to import and one whose functions do not take what we pass. It never touches a network.
``load()`` gives what the kernels call.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from .spec import report


class Unfit(Exception):
    """Raised by ``Package.bind`` for a package that cannot be used as it is; the text becomes a reason."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A distribution a backend needs: ``module`` must be importable and at least version ``minimum``.

    ``install`` says how to get it (default: pip install ``distribution``). ``bind(module)`` returns what ``load()``
    shall return, or raises :class:`Unfit`: it is where signatures are probed, once, instead of try/except around calls.

    >>> from compiled_attn.packages import Package
    >>> Package("no_such_module", "no-such-distribution").missing()
    ["module 'no_such_module' is not installed; pip install no-such-distribution"]
    >>> Package("math", "math", bind=lambda module: module.sqrt).load()(4.0)
    2.0
    """

    module: str
    distribution: str
    minimum: str | None = None
    install: str = ""
    bind: Callable[[Any], Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    def missing(self) -> list[str]:
        """Every reason why the package cannot be used in this process; imports it if nothing speaks against it."""
        if "loaded" in self.__dict__:
            return []
        # a failed import leaves half of a package behind: the first reason is the true one
        if "broken" in self.__dict__:
            return list(self.__dict__["broken"])
        return self.absent() or self._import()

    def absent(self) -> list[str]:
        """The reasons that can be had without importing the package."""
        root = self.module.split(".")[0]
        # find_spec raises for a module that is loaded and has no spec, such as somebody's stub
        if sys.modules.get(root) is None and importlib.util.find_spec(root) is None:
            return [f"module {self.module!r} is not installed{self._fix()}"]
        if self.minimum is not None:
            version = self.version()
            if version is None:
                return [f"module {root!r} is there, but not from {self.distribution!r}{self._fix()}"]
            if torch.torch_version.TorchVersion(version) < self.minimum:
                return [f"{self.distribution} {version} is older than {self.minimum}{self._fix()}"]
        return []

    def load(self) -> Any:
        """What ``bind`` made of the module; NotImplementedError, with the reasons, if it cannot be used."""
        try:
            return self.__dict__["loaded"]
        except KeyError:
            pass
        found = self.missing()
        if found:
            raise NotImplementedError(report(f"package {self.distribution!r} cannot be used here:", found))
        return self.__dict__["loaded"]

    def version(self) -> str | None:
        """The installed version of the distribution; None without it."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def __getstate__(self) -> dict[str, Any]:
        # what was loaded stays here: modules cannot be copied or pickled, and another process looks for itself
        return {field.name: self.__dict__[field.name] for field in dataclasses.fields(self)}

    def forget(self) -> None:
        """Look again at the next ``missing()`` or ``load()``: for tests, and after an installation."""
        self.__dict__.pop("loaded", None)
        self.__dict__.pop("broken", None)

    def _fix(self) -> str:
        return f"; {self.install}" if self.install else f"; pip install {self.distribution}"

    def _import(self) -> list[str]:
        label = f"{self.distribution} {self.version() or ''}".rstrip()
        try:
            module = importlib.import_module(self.module)
            self.__dict__["loaded"] = module if self.bind is None else self.bind(module)
        except Unfit as error:
            self.__dict__["broken"] = [f"{label}: {error}"]
        except Exception as error:  # whatever a foreign package raises while it is imported is the reason we report
            self.__dict__["broken"] = [f"{label} is installed but broken: {type(error).__name__}: {error}"]
        return list(self.__dict__.get("broken", []))


def parameters(function: Any, operator: Any = None) -> tuple[str, ...]:
    """The names of the parameters of ``function``, a Python function or an operator: one of torch.ops or an overload.

    ``operator`` tells them where ``function`` hides its own behind ``**kwargs``.

    >>> import torch
    >>> from compiled_attn.packages import parameters
    >>> parameters(torch.ops.aten.t), parameters(lambda *args, **kwargs: 0, torch.ops.aten.mm.default)
    (('self',), ('self', 'mat2'))
    """
    schema = _schema(function)
    if schema is None:
        signature = inspect.signature(function)
        if operator is None or not any(one.kind == one.VAR_KEYWORD for one in signature.parameters.values()):
            return tuple(signature.parameters)
        schema = _schema(operator)
    return tuple(argument.name for argument in schema.arguments)


def _schema(operator: Any) -> Any:
    return getattr(getattr(operator, "default", operator), "_schema", None)


def accepts(function: Any, name: str) -> bool:
    """Whether ``function`` has a parameter called ``name`` (``**kwargs`` does not count: it swallows).

    >>> from compiled_attn.packages import accepts
    >>> accepts(sorted, "key"), accepts(sorted, "order")
    (True, False)
    """
    return name in parameters(function)


def require(module: Any, path: str, *needed: str, operator: Any = None) -> Callable[..., Any]:
    """``module.path``; :class:`Unfit` if it is not there, or does not take all parameters ``needed``.

    ``operator`` is as in :func:`parameters`. What a library wrapped into a torch.library.custom_op is unwrapped: our
    own operator is round it already, and its dispatch costs 10 us a call.

    >>> import math
    >>> from compiled_attn.packages import require
    >>> require(math, "sqrt")(9.0)
    3.0
    """
    function = module
    for part in path.split("."):
        function = getattr(function, part, None)
    if function is None:
        raise Unfit(f"has no {path}")
    function = getattr(function, "_init_fn", function)
    if needed:
        known = parameters(function, operator)
        lacking = [name for name in needed if name not in known]
        if lacking:
            raise Unfit(f"{path} takes no {', '.join(lacking)}")
    return function  # type: ignore[no-any-return]
