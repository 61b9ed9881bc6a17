"""Measuring: overhead of a call, and tables of results."""
