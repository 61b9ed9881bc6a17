"""What code stands behind a compiled graph: PyTorch's caches know the graph, not what an operator in it turns into."""

from __future__ import annotations

import functools
import hashlib
import marshal
import pathlib
from collections.abc import Callable
from typing import Any

_ROOT = pathlib.Path(__file__).parent
_others: set[str] = set()


@functools.cache
def fingerprint() -> str:
    """Hash of this package's sources: what we decide inside a graph is not in the keys of PyTorch's caches."""
    digest = hashlib.sha256()
    for folder in (_ROOT, _ROOT / "integrations", _ROOT / "ops"):
        for path in sorted(folder.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def note(function: Callable[..., Any] | None) -> None:
    """Remember the code of another package's kernel that compilers look into: its whole file, as it is now."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None:
        return
    path = pathlib.Path(code.co_filename)
    if not path.is_relative_to(_ROOT):
        # no file: an interactive session
        _others.add(hashlib.sha256(path.read_bytes() if path.is_file() else marshal.dumps(code)).hexdigest())


def others() -> str:
    """Hash of everything noted; empty if nothing was."""
    return hashlib.sha256("".join(sorted(_others)).encode()).hexdigest()[:16] if _others else ""
