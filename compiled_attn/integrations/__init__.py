"""compiled_attn for the libraries of others."""

from . import diffusers as diffusers
