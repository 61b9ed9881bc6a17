"""The recorded signatures of kernel libraries, for stand-ins that must refuse what the library would refuse."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNATURES = Path(__file__).parent / "signatures"


@functools.cache
def record(distribution: str) -> dict[str, Any]:
    """What ``tests/signatures/refresh.py`` wrote about ``distribution``."""
    return json.loads((SIGNATURES / f"{distribution}.json").read_text())  # type: ignore[no-any-return]


def bound(distribution: str, function: str) -> inspect.Signature:
    """The recorded signature of ``function`` ("module.path:name") of ``distribution``."""
    text = record(distribution)["functions"][function]
    return inspect.signature(eval(f"lambda {text[1:-1]}: None"))


def as_recorded(distribution: str, function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the stand-in is called like the library's function, with every argument by its recorded name.

    A call that the library's signature refuses raises TypeError; ``inspect.signature`` shows the recorded signature;
    the decorated function gets all arguments as keywords, defaults filled in (those that are no literals are ...).
    ``*args`` and ``**kwargs`` of the library arrive under their names.
    """
    recorded = bound(distribution, function)

    def decorate(stand_in: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(stand_in)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = recorded.bind(*args, **kwargs)
            given.apply_defaults()
            return stand_in(**given.arguments)

        call.__signature__ = recorded  # type: ignore[attr-defined]
        del call.__wrapped__  # type: ignore[attr-defined]
        return call

    return decorate
