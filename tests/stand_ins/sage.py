"""SageAttention on a CPU: 1.0.6, 2.2 and the build from the Hub, by their sources, in float64.

``quantised`` rounds Q and K to int8 in blocks of 128 and 64 rows, as the Triton kernels do; without it every line of
our glue can be held to float64. What the libraries get wrong is wrong here too: 1.0.6 changes K in place and counts
the keys that fill its last block, masks are added in base 2, rows that nobody writes are NaN.
"""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import torch
import torch.nn.functional as F
from recorded import as_recorded
from torch import Tensor

LOG2_E = 1.44269504

PINNED = ("fp16_triton", "fp16_cuda", "fp8_cuda", "fp8_cuda_sm90")
# release -> (name of the record, module path of core, of the packed quantisation, of the packed kernels)
RECORDS = {
    "1.0.6": ("sageattention", "sageattention.core", "sageattention", "sageattention.attn_qk_int8_block_varlen"),
    "2.2.0": (
        "sageattention-2", "sageattention.core", "sageattention.triton",
        "sageattention.triton.attn_qk_int8_block_varlen",
    ),
    "hub": ("sage-attention-hub", "sage_attention", "", ""),
}  # fmt: skip


def rounded(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """int8 of (..., S, D) in blocks of ``block`` rows, and the scale of each row (..., S, 1)."""
    length = rows.shape[-2]
    blocks = F.pad(rows, (0, 0, 0, -length % block)).unflatten(-2, (-1, block))
    scale = blocks.abs().amax((-1, -2), keepdim=True) / 127
    whole = torch.where(scale > 0, blocks / scale, 0.0)
    whole = (whole + 0.5 * whole.sign()).trunc()
    scale = scale.expand(*blocks.shape[:-1], 1)
    return whole.flatten(-3, -2)[..., :length, :], scale.flatten(-3, -2)[..., :length, :]


def round_blocks(
    q: Tensor, k: Tensor, v: Tensor, mean: Tensor, scale: float, width: int
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What _sage_rounding.round_blocks returns, in plain PyTorch; and Q and K before they are rounded."""
    exact = [F.pad(rows, (0, width - q.shape[-1])) for rows in (q.double() * scale, k.double() - mean.double())]
    found = [rounded(rows.transpose(1, 2), block) for rows, block in zip(exact, (128, 64), strict=True)]
    whole = [rows.transpose(1, 2).to(torch.int8).contiguous() for rows, _ in found]
    scales = [of[:, :, ::block].float() for (_, of), block in zip(found, (128, 64), strict=True)]
    memory = torch.zeros(scales[1].numel() + 1)
    memory[:-1] = scales[1].flatten()
    v16 = F.pad(v, (0, width - q.shape[-1])).to(torch.float16)
    return (*whole, v16, scales[0].contiguous(), memory[:-1].view_as(scales[1])), exact


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, padding: int) -> tuple[Tensor, Tensor]:
    """(H, Sq, D) and the base-2 lse (H, Sq) of scores q k^T in base 2; ``padding`` keys more have a score of 0."""
    if k.shape[-2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf)
    group = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    scores = q @ k.transpose(-1, -2)
    if causal:
        assert q.shape[-2] == k.shape[-2]
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -1.0e6) if mask.dtype == torch.bool else mask.double())
    scores, v = F.pad(scores, (0, padding)), F.pad(v, (0, 0, 0, padding))
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp2(scores - highest)
    total = weights.sum(-1, keepdim=True)
    return weights @ v / total, (total.log2() + highest).squeeze(-1)


class Quantise:
    """A Triton kernel, as far as anybody looks: ``arg_names``, and ``kernel[grid](...)``."""

    arg_names = [  # noqa: RUF012
        "Input", "Output", "Scale", "cu_seqlens_input", "cu_seqlens_scale", "stride_ih", "stride_in", "stride_oh",
        "stride_on", "sm_scale", "H", "C", "BLK",
    ]  # fmt: skip

    def __init__(self, library: Library, recorded: str) -> None:
        self.library, self.recorded = library, recorded

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        record, *_ = RECORDS[self.library.release]
        return as_recorded(record, f"{self.recorded}:quant_per_block_int8_kernel")(
            lambda **given: self.run(grid, **given)
        )

    def run(
        self, grid: tuple[int, int, int], Input: Tensor, Output: Tensor, Scale: Tensor, cu_seqlens_input: Tensor,
        cu_seqlens_scale: Tensor, stride_ih: int, stride_in: int, stride_oh: int, stride_on: int, sm_scale: float,
        H: int, C: int, BLK: int,
    ) -> None:  # fmt: skip
        assert (Input.stride(1), Input.stride(0), Input.stride(2)) == (stride_ih, stride_in, 1)
        assert (Output.stride(1), Output.stride(0), Output.stride(2)) == (stride_oh, stride_on, 1)
        assert (Input.shape[1], Input.shape[2]) == (H, C)
        assert cu_seqlens_input.is_contiguous() and cu_seqlens_scale.is_contiguous(), "no stride is passed"
        starts = cu_seqlens_input.tolist()
        lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
        assert grid == (grid[0], H, len(lengths)) and grid[0] * BLK >= max(lengths)
        exact = torch.full(Input.shape, math.nan, dtype=torch.float64)
        for start, length, first in zip(starts, lengths, cu_seqlens_scale.tolist(), strict=False):
            rows = Input[start : start + length].transpose(0, 1).double() * sm_scale
            exact[start : start + length] = rows.transpose(0, 1)
            whole, scale = rounded(rows, BLK)
            Output[start : start + length] = whole.transpose(0, 1).to(torch.int8)
            blocks = -(-length // BLK)
            assert first + blocks <= Scale.shape[0], "scales are written behind the end of their memory"
            Scale[first : first + blocks] = scale[:, ::BLK, 0].T.float()
        self.library.exact[Output.data_ptr()] = exact


class Library:
    """``module`` is what ``import sageattention`` gives. ``asked`` holds (entry, its options) of each call."""

    def __init__(self, release: str = "2.2.0", quantised: bool = False, hopper_fault: bool = False) -> None:
        self.release, self.quantised = release, quantised
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.exact: dict[int, Tensor] = {}
        self.record, core, packed, kernel = RECORDS[release]
        self.module = types.ModuleType("sageattention")
        self.first = release == "1.0.6"
        names = ["sageattn"]
        if release == "2.2.0":
            names += [f"sageattn_qk_int8_pv_{name}" for name in PINNED]
        for name in names:
            self._add(self.module, name, f"{core}:{name}", self._entry(name))
        if release != "hub":
            self._add_packed(core, packed, kernel)
        if release == "2.2.0":
            self.module.sm90_compile = types.SimpleNamespace()
            operator = (lambda: None) if hopper_fault else object()
            self.module.sm90_compile.qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf = operator

    def _add(self, module: Any, name: str, recorded: str, function: Any) -> None:
        setattr(module, name, as_recorded(self.record, recorded)(function))

    def _add_packed(self, core: str, packed: str, kernel: str) -> None:
        self.module.core = types.SimpleNamespace()
        self._add(self.module, "sageattn_varlen", f"{core}:sageattn_varlen", self._varlen)
        if self.first:
            for name, of in (("attn_false", "block"), ("attn_true", "block_causal")):
                self._add(
                    self.module.core, name, f"sageattention.attn_qk_int8_per_{of}:forward",
                    lambda causal=name == "attn_true", **given: self._attend_blocks(causal, **given),
                )  # fmt: skip
        for name, causal in (("attn_false_varlen", False), ("attn_true_varlen", True)):
            self._add(
                self.module.core, name, f"{kernel}:forward",
                lambda causal=causal, **given: self._attend_packed(causal, **given),
            )  # fmt: skip
        # its globals are where the kernel is looked for
        home: dict[str, Any] = {"quant_per_block_int8_kernel": Quantise(self, f"{packed}.quant_per_block_varlen")}
        signature = "q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, BLKQ=128, BLKK=64, sm_scale=None"
        exec(f"def per_block_int8({signature}): raise AssertionError('it waits for the device')", home)
        name = "per_block_int8_varlen" if self.first else "per_block_int8_varlen_triton"
        setattr(self.module.core, name, home["per_block_int8"])

    def _entry(self, name: str) -> Any:
        def call(**given: Any) -> Any:
            self.asked.append((name, given))
            assert not given.get("kwargs"), "sageattn swallows what it does not know"
            return self._dense(name, **given)

        return call

    def _dense(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, is_causal: bool, sm_scale: float,
        smooth_k: bool = True, return_lse: bool = False, attn_mask: Tensor | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        assert tensor_layout == "NHD"
        assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "Last dim of qkv must be contiguous."
        assert q.shape[-1] in ((64, 96, 128) if self.first else range(1, 129))
        if name.endswith("triton") and is_causal:
            assert -(-k.shape[1] // 64) % 2 == 0, "reads a scale that is not there"
        # vectorised loads of the quantising kernels
        assert all(x.data_ptr() % 16 == 0 and not any(s % 8 for s in x.stride()[:-1]) for x in (q, k, v))
        mean = k.mean(1, keepdim=True)
        if smooth_k and self.first:
            k -= mean
        elif smooth_k:
            k = k - mean
        rows = [x.transpose(1, 2).double() for x in (q, k, v)]
        rows[0] *= sm_scale * LOG2_E
        if self.quantised:
            rows[0], rows[1] = (whole * scale for whole, scale in (rounded(rows[0], 128), rounded(rows[1], 64)))
        if attn_mask is not None:
            assert not is_causal, "Mask should be None for causal attention."
            assert attn_mask.dtype in (torch.bool, q.dtype)
            attn_mask = attn_mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        padding = -k.shape[1] % 64 if self.first and not is_causal else 0
        out, lse = attend(*rows, attn_mask, is_causal, padding)
        out = out.transpose(1, 2).to(q.dtype)
        if not return_lse:
            return out
        lse = lse / LOG2_E
        if smooth_k:
            assert q.shape[2] == k.shape[2], "2.2.0 repeats the mean along the wrong dimension"
            # a product in the dtype of q
            lse = lse + (q.transpose(1, 2) @ mean.permute(0, 2, 3, 1)).squeeze(-1).double() * sm_scale
        return out, lse.float()

    def round_blocks(self, *arguments: Any) -> tuple[Tensor, ...]:
        """In place of our kernel, with the exact rows remembered."""
        found, exact = round_blocks(*arguments)
        for rows, right in zip(found, exact, strict=False):
            self.exact[rows.data_ptr()] = right
        return found

    def _attend_blocks(
        self, causal: bool, q: Tensor, k: Tensor, v: Tensor, q_scale: Tensor, k_scale: Tensor, tensor_layout: str,
        output_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert tensor_layout == "NHD"
        assert q.dtype == k.dtype == torch.int8 and v.dtype == torch.float16 and q.shape[-1] in (64, 128)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q_scale.is_contiguous() and k_scale.is_contiguous(), "no stride is passed"
        self.asked.append(("blocks", {"causal": causal, "v": v}))
        rows = []
        for whole, scale, block in ((q, q_scale, 128), (k, k_scale, 64)):
            of = scale.repeat_interleave(block, 2)[:, :, : whole.shape[1]]
            exact = self.exact[whole.data_ptr()]
            rows.append(whole.transpose(1, 2).double() * of if self.quantised else exact.transpose(1, 2))
        padding = 0 if causal else -k.shape[1] % 64
        out, _ = attend(*rows, v.transpose(1, 2).double(), None, causal, padding)
        if causal and -(-k.shape[1] // 64) % 2:
            out = out + 0.0 * k_scale.as_strided((k_scale.numel() + 1,), (1,))[-1]
        return out.transpose(1, 2).to(output_dtype)

    def _varlen(self, **given: Any) -> Tensor:
        raise AssertionError("sageattn_varlen waits for the device and takes one mean of all sequences")

    def _attend_packed(
        self, causal: bool, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, q_scale: Tensor, k_scale: Tensor, cu_seqlens_q_scale: Tensor, cu_seqlens_k_scale: Tensor,
        output_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert q.dtype == k.dtype == torch.int8 and v.dtype == torch.float16 and q.shape[-1] in (64, 128)
        assert v.stride(-1) == 1
        starts = (cu_seqlens_q, cu_seqlens_k, cu_seqlens_q_scale, cu_seqlens_k_scale)
        assert all(start.is_contiguous() for start in starts), "no stride is passed"
        self.asked.append(("packed", {"causal": causal, "v": v}))
        out = torch.full(q.shape, math.nan, dtype=output_dtype)
        rows = list(zip(*(start.tolist() for start in starts), strict=True))
        behind = 0.0
        if causal:
            behind = sum(
                0.0 * k_scale[ks + -(-(k1 - k0) // 64)].sum()
                for (_, k0, _, ks), (_, k1, *_) in itertools.pairwise(rows)
            )
        for (q0, k0, qs, ks), (q1, k1, *_) in itertools.pairwise(rows):
            parts = []
            for rounds, scale, first, start, stop, block in (
                (q, q_scale, qs, q0, q1, 128), (k, k_scale, ks, k0, k1, 64)
            ):  # fmt: skip
                of = first + torch.arange(stop - start) // block
                part = rounds[start:stop].double() * scale[of].double()[..., None]
                if not self.quantised:
                    part = self.exact[rounds.data_ptr()][start:stop]
                parts.append(part.transpose(0, 1))
            padding = -(k1 - k0) % 64 if self.first and not causal else 0
            result, _ = attend(*parts, v[k0:k1].transpose(0, 1).double(), None, causal, padding)
            out[q0:q1] = (result + behind).transpose(0, 1).to(output_dtype)
        return out


class Blackwell:
    """``sageattn3_blackwell``: HND, takes the mean from the caller's K in place, has a scale of its own."""

    def __init__(self, in_place: bool = True) -> None:
        self.in_place = in_place
        self.module = types.ModuleType("sageattn3")
        self.asked: list[dict[str, Any]] = []
        self.module.sageattn3_blackwell = as_recorded("sageattention-3", "sageattn3:sageattn3_blackwell")(self._call)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, is_causal: bool, per_block_mean: bool,
        kwargs: dict[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        assert attn_mask is None and not kwargs, "it ignores them"
        assert q.shape[1] == k.shape[1], "no grouped heads"
        assert q.shape[-1] in (64, 128), "the FP4 kernels are built for these"
        self.asked.append({"is_causal": is_causal})
        mean = k.mean(-2, keepdim=True)
        if self.in_place:
            k -= mean
        else:
            k = k - mean
        out, _ = attend(q.double() * q.shape[-1] ** -0.5 * LOG2_E, k.double(), v.double(), None, is_causal, 0)
        return out.to(q.dtype)
