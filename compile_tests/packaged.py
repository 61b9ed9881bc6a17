"""The models, inputs and yardstick of the package tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compiled_attn
from compiled_attn import export, reference

ROOT = Path(__file__).parent.parent
FLASH = "_scaled_dot_product_flash_attention_for_cpu"
B, S = torch.export.Dim("B", min=1, max=64), torch.export.Dim("S", min=2, max=256)
DYNAMIC = {"x": {0: B, 1: S}, "keep": {0: B, 1: S}}
HEADS, WIDTH = 2, 16


class Block(nn.Module):
    """Self-attention of (B, S, 32) with a key-padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(2)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        return compiled_attn.attention(*self.heads(x), key_padding_mask=keep).flatten(2)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return compiled_attn.attention(x, x, x, is_causal=True)


class Varlen(nn.Module):
    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return compiled_attn.varlen_attention(x, x, x, cu_seqlens, cu_seqlens)


def block() -> Block:
    torch.manual_seed(1)
    return Block().eval()


def inputs(batch: int = 2, length: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * batch + length)
    keep = torch.rand(batch, length, generator=generator) > 0.3
    keep[0] = False  # a row of the batch with nothing to attend to
    return torch.randn(batch, length, HEADS * WIDTH, generator=generator), keep


def assert_right(out: Tensor, model: Block, x: Tensor, keep: Tensor) -> None:
    """Against float64: at most twice the error of plain PyTorch in float32, plus rounding."""
    with torch.no_grad():
        q, k, v = model.heads(x)
        right = reference.attention(q, k, v, key_padding_mask=keep)[0].flatten(2)
        plain = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=keep[:, None, None])
    error = (plain.transpose(1, 2).flatten(2).nan_to_num() - right).abs().max().item()
    rounding = torch.finfo(torch.float32).eps * right.abs().max().item()
    torch.testing.assert_close(out.double(), right, rtol=0, atol=2 * error + rounding)


def source(path: Path) -> str:
    """The C++ that AOTInductor generated, which it puts into the package."""
    with zipfile.ZipFile(path) as file:
        return "".join(file.read(name).decode() for name in file.namelist() if name.endswith(".cpp"))


def make(folder: Path, name: str, model: nn.Module | None = None, **options: Any) -> Path:
    path = folder / f"{name}.pt2"
    x, keep = inputs()
    options = {"kwargs": {"keep": keep}, "dynamic_shapes": DYNAMIC, **options}
    export.package(block() if model is None else model, (x,), path, **options)
    return path


def python(script: str, cwd: Path, *arguments: object, timeout: int = 120, path: str = "") -> str:
    """Run ``script`` in a fresh process, which sees this checkout only when ``path`` says so."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
