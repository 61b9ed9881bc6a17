"""One attention call for diffusion transformers, many kernels behind it, none lost under torch.compile.

Importing this package registers every operator; it imports no kernel library and touches no device.
"""

from . import export as export
from . import integrations as integrations
from . import ops as ops
from .checks import set_checks
from .compilation import checkpoint_context_fn, compile, precompile
from .dispatch import (
    attention,
    attention_with_lse,
    dispatch_attention_fn,
    varlen_attention,
    varlen_attention_with_lse,
)
from .operators import Kernels
from .questions import explain, why_not
from .registry import Backend, backend_info, list_backends, register_backend
from .spec import Limits
from .state import (
    AttentionBackendMixin,
    active_backend,
    attention_backend,
    reset_attention_backend,
    set_attention_backend,
    set_default_backend,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionBackendMixin",
    "Backend",
    "Kernels",
    "Limits",
    "active_backend",
    "attention",
    "attention_backend",
    "attention_with_lse",
    "backend_info",
    "checkpoint_context_fn",
    "compile",
    "dispatch_attention_fn",
    "explain",
    "list_backends",
    "precompile",
    "register_backend",
    "reset_attention_backend",
    "set_attention_backend",
    "set_checks",
    "set_default_backend",
    "varlen_attention",
    "varlen_attention_with_lse",
    "why_not",
]
