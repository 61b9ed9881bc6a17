"""What tests/ and compile_tests/ share: GPU marks, a seed, and a process put back as it was."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import compiled_attn
from compiled_attn import state

# the helpers of tests/ (stand_in, probes, matrix) serve compile_tests/ too
sys.path.insert(0, str(Path(__file__).parent / "tests"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # tiny shapes: more threads only fight with the other workers of pytest-xdist
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """A seed before each test; after it no test leaves a default, a context, checks or determinism behind."""
    torch.manual_seed(0)
    yield
    compiled_attn.set_default_backend("native")
    compiled_attn.set_checks(False)
    torch.use_deterministic_algorithms(False)
    slot = state.slot()
    assert (slot.inner, slot.context, slot.outer, slot.traced, slot.recompute) == (None, None, None, False, False)
    assert compiled_attn.active_backend() == "native"
