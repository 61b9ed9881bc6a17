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


class Rounding:
    """_sage_rounding in plain PyTorch, for a CPU. ``exact`` has Q and K before they were rounded, by address."""

    def __init__(self) -> None:
        self.exact: dict[int, Tensor] = {}

    def _round(self, rows: Tensor, block: int, width: int) -> tuple[Tensor, Tensor]:
        """int8 of (..., S, H, D), and scales (..., H, blocks, 1)."""
        rows = F.pad(rows, (0, width - rows.shape[-1]))
        whole, scale = rounded(rows.transpose(-3, -2), block)
        whole = whole.transpose(-3, -2).to(torch.int8).contiguous()
        self.exact[whole.data_ptr()] = rows
        return whole, scale[..., ::block, :].float()

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor, scale: float, width: int) -> tuple[Tensor, ...]:
        q8, q_scale = self._round(q.double() * scale, 128, width)
        k8, k_scale = self._round(k.double() - mean.double(), 64, width)
        memory = torch.zeros(k_scale.numel() + 1)
        memory[:-1] = k_scale.flatten()
        v16 = F.pad(v, (0, width - v.shape[-1])).to(torch.float16)
        return q8, k8, v16, q_scale.contiguous(), memory[:-1].view_as(k_scale)

    def packed(
        self, q: Tensor, k: Tensor, v: Tensor, mean: Tensor, source: Tensor | None, starts: tuple[Tensor, Tensor],
        blocks: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float, width: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if source is not None:
            k, v = (rows.flatten(0, 1)[source] for rows in (k, v))
        found = []
        for rows, block, cuts, firsts, most in zip((q, k), (128, 64), starts, blocks, longest, strict=True):
            sequences = cuts.shape[0] - 1
            whole = torch.full((*rows.shape[:-1], width), -7, dtype=torch.int8)
            exact = torch.full((*rows.shape[:-1], width), math.nan, dtype=torch.float64)
            scales = torch.zeros(rows.shape[0] // block + 2 * sequences, rows.shape[1])
            ends = cuts.tolist()
            assert sequences == 0 or most >= max(b - a for a, b in itertools.pairwise(ends))
            for number, (a, b) in enumerate(itertools.pairwise(ends)):
                part = rows[a:b].double()
                part = part * scale if rows is q else part - mean[number].double()
                one, of = self._round(part, block, width)
                whole[a:b], exact[a:b] = one, self.exact.pop(one.data_ptr())
                scales[int(firsts[number]) : int(firsts[number]) + of.shape[-2]] = of[..., 0].T
            self.exact[whole.data_ptr()] = exact
            found.append((whole, scales))
        v16 = F.pad(v, (0, width - v.shape[-1])).to(torch.float16)
        return found[0][0], found[1][0], v16, found[0][1], found[1][1]

    def mean_of_real(self, k: Tensor, key_padding: Tensor) -> Tensor:
        real = k.float().masked_fill(~key_padding[:, :, None, None], 0.0)
        return real.sum(1) / key_padding.sum(1).clamp(min=1)[:, None, None]


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


class Library:
    """``module`` is what ``import sageattention`` gives. ``asked`` holds (entry, its options) of each call."""

    def __init__(self, release: str = "2.2.0", quantised: bool = False, hopper_fault: bool = False) -> None:
        self.release, self.quantised = release, quantised
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.rounding = Rounding()
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
        name = "per_block_int8_varlen" if self.first else "per_block_int8_varlen_triton"
        self._add(self.module.core, name, f"{packed}.quant_per_block_varlen:per_block_int8", self._varlen)

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
            exact = self.rounding.exact[whole.data_ptr()]
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
                    part = self.rounding.exact[rounds.data_ptr()][start:stop]
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
