"""Kernel folders as kernel-builder lays them out, which `kernels` loads without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# The Hub's module -> what its folder's __init__.py does. Each holds a stand-in of the library it is a build of.
SOURCES = {
    "sage": "from stand_ins.sage import Library\nstand_in = Library('hub')\nsageattn = stand_in.module.sageattn\n",
    "blackwell": (
        "from stand_ins.sage import Blackwell\nstand_in = Blackwell()\n"
        "sageattn3_blackwell = stand_in.module.sageattn3_blackwell\n"
    ),
    "flash2": (
        "from stand_ins.flash2 import Library\nstand_in = Library()\nflash_attn_interface = stand_in.module\n"
    ),
    "flash3": (
        "from stand_ins.flash3 import Library\nstand_in = Library()\nflash_attn_interface = stand_in.module\n"
    ),
    "flash4": "from stand_ins.flash4 import Library\nstand_in = Library()\ninterface = stand_in.module.interface\n",
    "aiter": (
        "from stand_ins import aiter\nbuilt = aiter.hub(aiter.Library())\n"
        "flash_attn_func, flash_attn_varlen_func = built.flash_attn_func, built.flash_attn_varlen_func\n"
    ),
    # the libraries themselves, for the tests on a GPU
    "real_sage": "from sageattention import core, sageattn, sageattn_varlen\n",
    "real_flash2": "from flash_attn import flash_attn_interface\n",
    "real_flash4": "from flash_attn.cute import interface\n",
    "empty": "",
    "broken": "raise OSError('libcudart.so.12: cannot open shared object file')\n",
}  # fmt: skip


def folder(root: Path, kind: str, number: int = 1, variant: str = "torch-universal") -> Path:
    """A kernel repository in ``root`` with one build of ``kind``; its module is not one that was imported before."""
    name = f"stand_in_{kind}"
    build = root / kind / "build" / variant
    build.mkdir(parents=True)
    (build / "__init__.py").write_text(SOURCES[kind])
    identity = f"{name}_{abs(hash(str(root))):x}"
    sys.modules.pop(identity, None)
    backend = {"type": "cpu"}
    (build / "metadata.json").write_text(
        json.dumps(
            {
                "name": name.replace("_", "-"), "id": identity, "version": number, "license": "Apache-2.0",
                "python-depends": [], "backend": backend,
            }
        )
    )  # fmt: skip
    return root / kind
