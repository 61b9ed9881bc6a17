"""Names of the parameters of foreign functions, some of which are operators: those have a schema and no signature."""

from __future__ import annotations

import inspect
from typing import Any

from compiled_attn.packages import Unfit


def parameters(function: Any, operator: Any = None) -> list[str]:
    """The names; from ``operator`` where ``function`` hides them behind ``**kwargs``."""
    schema = getattr(getattr(function, "default", None), "_schema", None)
    if schema is None:
        signature = inspect.signature(function)
        if operator is None or not any(one.kind == one.VAR_KEYWORD for one in signature.parameters.values()):
            return list(signature.parameters)
        schema = operator.default._schema
    return [argument.name for argument in schema.arguments]


def demand(module: Any, path: str, *names: str) -> Any:
    """``module.path``, a function or an operator that takes ``names``; Unfit otherwise."""
    function = module
    for part in path.split("."):
        function = getattr(function, part, None)
    if function is None:
        raise Unfit(f"has no {path}")
    known = parameters(function)
    lacking = [name for name in names if name not in known]
    if lacking:
        raise Unfit(f"{path} takes no {', '.join(lacking)}")
    return function
