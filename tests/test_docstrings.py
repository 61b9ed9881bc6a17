"""Every public name has a docstring with an example, and every example of the package runs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import pytest

import compiled_attn

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(compiled_attn.__path__, "compiled_attn.")
    if not info.name.endswith("__main__")
)
NAMES = sorted(name for name in compiled_attn.__all__ if callable(getattr(compiled_attn, name)))


def test_public_names_are_all_there():
    assert len(set(compiled_attn.__all__)) == len(compiled_attn.__all__)
    assert list(compiled_attn.__all__) == sorted(compiled_attn.__all__)
    for name in compiled_attn.__all__:
        assert hasattr(compiled_attn, name), name


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_has_a_docstring_with_an_example(name):
    text = inspect.getdoc(getattr(compiled_attn, name)) or ""
    assert len(text.splitlines()[0]) > 20, "a docstring starts with a sentence"
    assert doctest.DocTestParser().get_examples(text), f"compiled_attn.{name} has no example"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name):
    module = importlib.import_module(name)
    assert (inspect.getdoc(module) or "").strip()


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, tried = doctest.testmod(module, optionflags=flags)
    assert failed == 0, f"{failed} of {tried} examples of {name} failed; python -m doctest shows them"


def test_examples_are_found():
    """An empty run would pass above."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = sum(len(found.examples) for name in MODULES for found in finder.find(importlib.import_module(name)))
    assert examples > 50
