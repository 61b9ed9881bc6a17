"""compiled_attn for the libraries of others."""

from typing import Any

from . import diffusers as diffusers


def __getattr__(name: str) -> Any:
    if name == "dtensor":  # imports torch.distributed.tensor, which takes longer than all of ours
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
