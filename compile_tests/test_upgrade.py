"""The package is upgraded in place while the compile caches on disk are warm: the new code runs.

Each process imports a copy of the package, compiles the same functions with Inductor and prints what they gave. Between
two processes the copy is edited. Without our mark in the caches' key the third process runs old code, silently.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_attn
from compiled_attn import attention, compilation, sources
from compiled_attn.operators import Kernels

PROGRAM = """
import json, sys
import torch
import compiled_attn
from compiled_attn import attention, compilation, varlen_attention
from torch._dynamo.utils import counters
assert compiled_attn.__file__.startswith(sys.argv[1])
protected = sys.argv[2] == "protected"
if not protected:
    compilation.mark_caches.__code__ = (lambda: None).__code__
    torch.compiler.config.cache_key_tag = ""
import third_party

torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.ones(1, 4, 1, 2)
packed, starts = torch.ones(4, 1, 2), torch.tensor([0, 4], dtype=torch.int32)
ramp = torch.arange(4.0)[None, :, None, None].expand(1, 4, 1, 2)
calls = {
    "glue of an opaque kernel": lambda: varlen_attention(
        packed, packed, packed, starts, starts, backend="_native_flash"
    ),
    "body of an inlined kernel": lambda: attention(x, x, x, backend="triton"),
    "body of a composite kernel": lambda: attention(x, x, x, backend="_native_math"),
    "masks": lambda: attention(x, x, ramp, window_size=(0, 0), backend="_native_math"),
    "dispatcher": lambda: attention(x, x, ramp, is_causal=True, backend="_native_flash"),
    "third party": lambda: attention(x, x, x, backend="third_party"),
}
found = {}
for name, call in calls.items():
    found[name] = torch.compile(call, fullgraph=True)().mean().item()
leaf = x.clone().requires_grad_()
torch.compile(lambda t: attention(t, t, t, backend="triton"), fullgraph=True)(leaf).sum().backward()
found["gradient formula"] = leaf.grad.mean().item()
found_in_cache = counters["aot_autograd"]
hits = {"hits": found_in_cache["autograd_cache_hit"], "misses": found_in_cache["autograd_cache_miss"]}
print(json.dumps({"found": found, "tag": torch.compiler.config.cache_key_tag, **hits}))
"""

THIRD_PARTY = """
import torch
from compiled_attn import Backend, Kernels, Limits, register_backend

def forward(q, k, v, *rest):
    return v * 1.0, None, None

limits = (Limits(("cpu",), (torch.float32,), gradient=False),)
register_backend(Backend("third_party", "1 times value", limits, Kernels(forward, composite=True)))
"""

TWICE = """

_before = {name}


def {name}(*args, **kwargs):
    first, *rest = _before(*args, **kwargs)
    return (first * 2.0, *rest)
"""


@dataclass(frozen=True)
class Edit:
    """``new`` in the place of ``old`` in ``file``, or at its end."""

    file: str
    new: str
    old: str = ""


_TRITON = "DENSE = Kernels(triton_forward, triton_backward, inlined=True)"
EDITS = {
    "glue of an opaque kernel": Edit("ops/_native_varlen.py", TWICE.format(name="flash_varlen_forward")),
    "body of an inlined kernel": Edit(
        "ops/_triton_functions.py", TWICE.format(name="triton_forward") + "\n\n" + _TRITON, _TRITON
    ),
    "body of a composite kernel": Edit("ops/_native_dense.py", TWICE.format(name="math_forward")),
    "masks": Edit("masks.py", "\n\ndef positions(*args):\n    return None\n"),
    "dispatcher": Edit("dispatch.py", "\n\ndef _position_bits(is_causal, alignment):\n    return 0\n"),
    "gradient formula": Edit("transforms.py", TWICE.format(name="apply")),
    "third party": Edit("../third_party.py", "v * 2.0", "v * 1.0"),
}
# What the compilers took in is in their caches; what Dynamo traces or Python runs is new in any case.
TAKEN_IN = [
    "body of an inlined kernel", "body of a composite kernel", "masks", "gradient formula", "third party",
]  # fmt: skip


class Installation:
    """A copy of the package in a folder of its own, with compile caches of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        package = folder / "compiled_attn"
        source = Path(compiled_attn.__file__).parent
        shutil.copytree(source, package, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "third_party.py").write_text(THIRD_PARTY)

    def edit(self, edit: Edit) -> None:
        path = self.folder / "compiled_attn" / edit.file
        text = path.read_text()
        assert text.count(edit.old) == 1 or not edit.old, f"{edit.file} has changed; change this test with it"
        path.write_text(text.replace(edit.old, edit.new) if edit.old else text + edit.new)

    def run(self, protection: str) -> dict[str, Any]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
            "TORCH_COMPILE_CACHE_KEY_TAG": "the user's",
        }
        command = [sys.executable, "-c", PROGRAM, str(self.folder), protection]
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=400, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("protection", ["protected", "unprotected"])
def test_an_upgrade_in_place_runs_new_code_from_warm_caches(protection: str, tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    before = installation.run(protection)
    assert before["hits"] == 0 and before["misses"] == len(EDITS)
    again = installation.run(protection)
    assert again == before | {"hits": len(EDITS), "misses": 0}, "the caches are warm"
    for edit in EDITS.values():
        installation.edit(edit)
    after = installation.run(protection)
    shutil.rmtree(tmp_path / "cache")
    right = installation.run(protection)
    changed = [name for name in EDITS if right["found"][name] != before["found"][name]]
    assert changed == list(EDITS), "every edit shows in a number"
    stale = [name for name in EDITS if after["found"][name] != right["found"][name]]
    if protection == "protected":
        assert stale == []
        assert before["tag"].startswith("the user's;compiled_attn=")
        assert after["tag"].startswith("the user's;compiled_attn=")
        assert after["tag"] != before["tag"]
    else:
        assert stale == TAKEN_IN


def test_a_key_assigned_after_the_import_is_kept_and_completed_when_a_call_is_traced() -> None:
    """Plain torch.compile, not ours: the key is read after tracing."""
    config = torch.compiler.config
    x = torch.randn(1, 4, 1, 2)
    seen = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(config.cache_key_tag)
        return graph.forward

    with config.patch(cache_key_tag="mine"):
        for backend in ("native", "switch"):
            torch.compile(lambda t: attention(t, t, t, backend=backend), fullgraph=True, backend=compiler)(x)  # noqa: B023
            config.cache_key_tag = "mine again"
    mark = f"compiled_attn={sources.fingerprint()}{sources.others()}"
    assert seen == [f"mine;{mark}", f"mine again;{mark}"]


def test_the_code_of_other_packages_backends_is_part_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composite and inlined ones, which compilers look into; opaque ones are Python whenever they run."""

    def register(name: str, times: float, **sort: bool) -> str:
        path = tmp_path / "kernels.py"
        path.write_text(f"def forward(q, k, v, *rest):\n    return v * {times}, None, None\n")
        found: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), found)
        limits = (compiled_attn.Limits(("cpu",), (torch.float32,), gradient=False),)
        kernels = Kernels(found["forward"], **sort)
        compiled_attn.register_backend(compiled_attn.Backend(name, "times value", limits, kernels))
        with torch.compiler.config.patch(cache_key_tag=""):
            compilation.mark_caches()
            return torch.compiler.config.cache_key_tag

    for sort in ("composite", "inlined"):
        keys = []
        for turn, times in enumerate((1.0, 2.0, 1.0)):
            monkeypatch.setattr(sources, "_others", set())
            keys.append(register(f"tmp_{sort}_{turn}", times, **{sort: True}))
        assert keys[0] == keys[2] != keys[1]
    monkeypatch.setattr(sources, "_others", set())
    assert register("tmp_opaque_code", 3.0) == f"compiled_attn={sources.fingerprint()}"


def test_the_fingerprint_covers_every_file_that_is_imported() -> None:
    """Those of the bench, the demo and the command line decide nothing inside a graph."""
    root = Path(compiled_attn.__file__).parent
    loaded = [
        getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "compiled_attn" in name
    ]
    folders = {Path(file).parent for file in loaded if file and Path(file).is_relative_to(root)}
    assert folders - {root / "bench", root / "demo"} <= {root, root / "integrations", root / "ops"}
