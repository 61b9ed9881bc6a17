"""What the files of compile_tests/ share: a Dynamo without memories, and packages (one takes 6 to 25 s to compile)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import probes  # noqa: F401  registers its backends, as stand_in does: their names are parameters of tests
import pytest
import stand_in  # noqa: F401
import torch
from packaged import block, make

import compiled_attn


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Counts of graphs begin at none: graphs of earlier tests would be found again, or use up the limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="session")
def math_package(folder: Path) -> Path:
    model = block()
    compiled_attn.set_attention_backend(model, "_native_math")
    return make(folder, "math", model)


@pytest.fixture(scope="session")
def flash_package(folder: Path) -> Path:
    return make(folder, "flash", backend="_native_flash")


@pytest.fixture(scope="session")
def switch_package(folder: Path) -> Path:
    return make(folder, "switch", backend="switch")
