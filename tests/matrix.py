"""The cases of the numeric tests, made from the backends' own Limits, and the yardstick that measures them.

Shape legend: B batch, Sq/Sk query/key length, H/Hk query/key heads, D/Dv head_dim of query and key / value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import stand_in  # noqa: F401  registers a third party's backend, which goes through the same matrix
import torch
from torch import Tensor

import compiled_attn
from compiled_attn import masks, reference, registry
from compiled_attn.cli_list import fetched
from compiled_attn.spec import ALIGN_LOWER_RIGHT, CAUSAL, Limits

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
MASKS = ("none", "key_padding", "bool", "bool_per_head", "float", "float_row")
POSITIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "causal_lower": {"is_causal": True, "causal_alignment": "lower_right"},
    "window": {"window_size": (3, 2)},
    "window_lower": {"window_size": (3, 2), "causal_alignment": "lower_right"},
    "causal_window": {"is_causal": True, "window_size": (4, -1)},
}
# causal composes with key padding alone
MASKS_AND_POSITIONS = tuple(
    pytest.param(mask, positions, id=f"{mask}-{positions}")
    for mask in MASKS
    for positions in POSITIONS
    if mask in ("none", "key_padding") or not positions.startswith("causal")
)
LAYOUTS = ("contiguous", "transposed", "qkv_slice", "expanded_batch", "expanded_heads", "strided_width")


def limits_on(name: str, device: str, varlen: bool = False) -> Limits | None:
    """The entry of backend ``name``'s Limits for ``device``."""
    info = compiled_attn.backend_info(name)
    for limits in info.varlen_limits if varlen else info.limits:
        if device in limits.devices:
            return limits
    return None


def names_on(device: str, varlen: bool = False) -> list[str]:
    """Every backend, but for those that tests register for themselves, whose Limits name ``device``."""
    return [
        name
        for name in compiled_attn.list_backends()
        if not name.startswith(("probe_", "tmp_")) and limits_on(name, device, varlen) is not None
    ]


def backends_and_devices(varlen: bool = False) -> list[Any]:
    """Parameters (backend, device) for every backend whose Limits name the device; CUDA's carry the gpu mark."""
    found = []
    for device in ("cpu", "cuda"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        found += [pytest.param(name, device, id=f"{name}-{device}", marks=marks) for name in names_on(device, varlen)]
    return found


def absent(name: str) -> list[str]:
    """Why backend ``name`` cannot run here without a download; empty when it can."""
    return registry.unavailable(name) or ([] if fetched(name) else ["its kernel is not fetched yet"])


def require(name: str) -> None:
    """Skip, with the reasons, where backend ``name`` lacks a package or its kernel was never fetched; else load it."""
    if missing := absent(name):
        pytest.skip("; ".join(missing))
    registry.usable(name)


@dataclass(frozen=True)
class Case:
    """One dense call."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    q_length: int = 17
    k_length: int = 33
    heads: int = 4
    key_heads: int = 4
    width: int = 16
    value_width: int | None = None
    mask: str = "none"
    positions: str = "full"
    layout: str = "contiguous"
    scale: float | None = None
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`compiled_attn.attention`, tensors made in the low dtype."""
        value_width = self.width if self.value_width is None else self.value_width
        lengths = ((self.q_length, self.heads, self.width), (self.k_length, self.key_heads, self.width))
        shapes = (*lengths, (self.k_length, self.key_heads, value_width))
        tensors = [self._laid_out(index, *shape) for index, shape in enumerate(shapes)]
        query, key, value = (tensor.requires_grad_() for tensor in tensors)
        found = {"query": query, "key": key, "value": value, "scale": self.scale, **self._masks()}
        if self.heads != self.key_heads:
            found["enable_gqa"] = True
        return {**found, **POSITIONS[self.positions], **self.options}

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype).to(self.device)

    def _laid_out(self, index: int, length: int, heads: int, width: int) -> Tensor:
        if self.layout == "transposed":
            return self._random(self.batch, heads, length, width).transpose(1, 2)
        if self.layout == "qkv_slice":
            return self._random(self.batch, length, 3, heads, width)[:, :, index]
        if self.layout == "expanded_batch":
            return self._random(1, length, heads, width).expand(self.batch, -1, -1, -1)
        if self.layout == "expanded_heads":
            return self._random(self.batch, length, 1, width).expand(-1, -1, heads, -1)
        if self.layout == "strided_width":
            return self._random(self.batch, length, heads, 2 * width)[..., ::2]
        return self._random(self.batch, length, heads, width)

    def _masks(self) -> dict[str, Tensor]:
        """Masks with holes, and with rows that attend to nothing."""
        full = (self.batch, self.heads, self.q_length, self.k_length)
        if self.mask == "none":
            return {}
        if self.mask == "key_padding":
            keep = torch.rand(self.batch, self.k_length) > 0.4
            keep[-1:] = False  # a sequence without a key
            keep[:1, :3] = False  # a hole in front: empty rows under an upper-left causal mask
            keep[:1, 3:5] = True
            return {"key_padding_mask": keep.to(self.device)}
        if self.mask in ("bool", "bool_per_head"):
            heads = full[1] if self.mask == "bool_per_head" else 1
            keep = torch.rand(full[0], heads, *full[2:]) > 0.4
            keep[:, -1:, 2:4] = False
            return {"attn_mask": keep.to(self.device)}
        shape = (1, full[1], 1, full[3]) if self.mask == "float_row" else (full[0], 1, *full[2:])
        bias = torch.randn(*shape)
        bias[..., ::5] = -math.inf
        bias[:, -1:, 2:3] = -math.inf
        return {"attn_mask": bias.to(self.dtype).to(self.device)}


def far_apart(*tensors: Tensor) -> list[Tensor]:
    """float16 copies whose sequences lie 2^31 elements apart: 4 GB of addresses each, a few pages of them touched."""
    room = 2**14
    gaps = max(tensors[0].shape[0] - 1, 0) * 2**31
    store = torch.from_numpy(numpy.empty(gaps + len(tensors) * room, dtype=numpy.float16))
    return [
        store.as_strided(one.shape, (2**31, *one.stride()[1:]), place * room).copy_(one)
        for place, one in enumerate(tensors)
    ]


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The yardstick: attention as plain PyTorch writes it, every step in the dtype of the inputs.

    Returns out (B, Sq, H, Dv) and lse (B, H, Sq). The error of a kernel may be twice the error of this.
    """
    mask, key_padding = masks.canonical(attn_mask, key_padding_mask, query, key)
    causal = (CAUSAL if is_causal else 0) | (ALIGN_LOWER_RIGHT if causal_alignment == "lower_right" else 0)
    keep = masks.positions(query.shape[1], key.shape[1], causal, window_size, query.device)
    mask = masks.combined(mask, key_padding, keep)
    group = query.shape[2] // key.shape[2]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + masks.additive(mask, scores.dtype)
    lse = scores.logsumexp(-1)
    empty = (lse == -math.inf)[..., None]
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return (weights @ v).transpose(1, 2), lse


def assert_as_good(
    what: str, actual: Tensor, expected: Tensor, yardstick: Tensor, size: float = 0.0, recomputed: float = 0.0
) -> None:
    """Error of ``actual`` <= 2 x error of ``yardstick`` + rounding; ``expected`` is float64.

    Rounding is relative to the largest expected value, or to ``size`` if that is larger: with one key dq is exactly 0
    and the yardstick finds it, while a kernel is left with the difference of two equal sums. ``recomputed`` is what
    weights may be off by, relatively, that a backward computes again from a rounded lse.
    """
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    finite = expected.isfinite()
    error = 0.0
    if finite.any():
        error = float((yardstick.double() - expected)[finite].abs().max())
        size = max(size, largest(expected))
    rounding = 4 * torch.finfo(actual.dtype).eps * (1 + size) + recomputed * size
    torch.testing.assert_close(
        actual.double(), expected, rtol=0.0, atol=2 * error + rounding, msg=lambda text: f"{what}: {text}"
    )


def largest(*tensors: Tensor) -> float:
    """The largest finite absolute value in ``tensors``; 0.0 if there is none."""
    values = torch.cat([tensor[tensor.isfinite()].abs().flatten() for tensor in tensors])
    return float(values.max()) if values.numel() else 0.0


def measured(call: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of ``call``, which returns (out, lse)."""
    out, lse = call(**arguments)
    torch.manual_seed(1)
    grad = torch.randn(out.shape).to(out.dtype).to(out.device)
    inputs = [arguments[name] for name in ("query", "key", "value")]
    return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad, allow_unused=False)


def expectations(arguments: dict[str, Any]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the float64 reference and the yardstick make of ``arguments``."""
    known = {name: value for name, value in arguments.items() if name not in ("enable_gqa", "backend")}
    double = {name: known[name].detach().double().requires_grad_() for name in ("query", "key", "value")}
    # the same cotangent for all three: drawn in the low dtype, then promoted
    out, lse = reference.attention(**{**known, **double})
    torch.manual_seed(1)
    low = known["query"].dtype
    grad = torch.randn(out.shape).to(low).to(out.device).double()
    right = (out.detach(), lse, *torch.autograd.grad(out, list(double.values()), grad))
    return right, measured(plain, known)


NAMES = ("out", "lse", "dq", "dk", "dv")


def verify(backend: str, case: Case) -> None:
    """Forward, lse and gradients of one call: right to the 2x rule, or refused with exactly the reasons given."""
    arguments = case.arguments()
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    asked = {name: item for name, item in arguments.items() if name not in ("query", "key", "value", "attn_mask")}
    why = compiled_attn.why_not(backend, query, key, value, arguments.get("attn_mask"), return_lse=True, **asked)
    if why:
        with pytest.raises(NotImplementedError) as refused:
            compiled_attn.attention_with_lse(**arguments, backend=backend)
        for reason in why:
            assert reason in str(refused.value)
        return
    right, yardstick = expectations(arguments)
    kernel = measured(lambda **kw: compiled_attn.attention_with_lse(backend=backend, **kw), arguments)
    gradients = largest(*right[2:])
    # exp(score - lse): an lse of 4 is rounded by 4 eps; the yardstick's softmax has no such step
    recomputed = torch.finfo(kernel[1].dtype).eps * largest(right[1])
    for what, actual, expected, plainly in zip(NAMES, kernel, right, yardstick, strict=True):
        of_gradients = (gradients, recomputed) if what.startswith("d") else (0.0, 0.0)
        assert_as_good(what, actual, expected, plainly, *of_gradients)
    assert kernel[0].is_contiguous()
    assert kernel[1].is_contiguous()
    assert kernel[0].dtype == case.dtype
    assert kernel[1].dtype == (torch.float64 if case.dtype == torch.float64 else torch.float32)
    alone = compiled_attn.attention(**arguments, backend=backend)  # without lse another kernel may run
    assert alone.is_contiguous()
    assert_as_good("out without lse", alone.detach(), right[0], yardstick[0])
    with torch.no_grad():
        assert_as_good(
            "out without gradients", compiled_attn.attention(**arguments, backend=backend), right[0], yardstick[0]
        )
