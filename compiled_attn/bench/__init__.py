"""Benchmarks: ``python -m compiled_attn bench <name>``."""
