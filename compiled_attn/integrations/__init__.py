"""compiled_attn for the libraries of others."""
