"""torch_npu 2.14.0 on a CPU: npu_fusion_attention_v2 and its gradient, by their documentation, in float64.

A masked position is True; the scale defaults to 1; causal and band modes take one triangle of 2048 and align by mode. A
row that is masked whole gets equal weights, forward and backward, as the documentation promises nothing for it.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from recorded import as_recorded
from torch import Tensor

OPEN = 2147483647


def seen(q_length: int, k_length: int, sparse_mode: int, before: int, after: int) -> Tensor:
    rows, columns = torch.arange(q_length)[:, None], torch.arange(k_length)[None]
    if sparse_mode == 2:
        return columns <= rows
    rows = rows + k_length - q_length
    assert q_length <= k_length, "sparse_mode 3 and 4 want Sq <= Skv"
    if sparse_mode == 3:
        return columns <= rows
    assert before >= 0 and after >= 0
    return (columns <= rows + after) & (columns >= rows - before)


class Library:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.asked: dict[str, Any] = {}
        self.module = types.ModuleType("torch_npu")
        for name, function in (("", self.forward), ("_grad", self.backward)):
            name = f"npu_fusion_attention{name}_v2"
            setattr(self.module, name, as_recorded("torch-npu", f"torch_npu:{name}")(self._noted(name, function)))

    def _noted(self, name: str, function: Any) -> Any:
        def call(**arguments: Any) -> Any:
            self.calls.append(name)
            self.asked = arguments
            for unused in ("padding_mask", "query_rope", "key_rope", "prefix", "q_start_idx", "kv_start_idx", "sink"):
                assert arguments[unused] is None
            assert all(one.is_contiguous() for one in arguments.values() if isinstance(one, Tensor))
            return function(**arguments)

        return call

    def _pieces(self, options: dict[str, Any]) -> list[tuple[Any, Any, Any, Any]]:
        """Rows of q and of k, scores (N, Sq, Sk) and the positions masked, of each sequence."""
        q, k, v = options["query"], options["key"], options["value"]
        assert k.shape == v.shape and q.shape[-1] == k.shape[-1] <= 768
        assert q.shape[-2] == options["head_num"] and q.shape[-2] % k.shape[-2] == 0
        ends = options["actual_seq_qlen"], options["actual_seq_kvlen"]
        if options["input_layout"] == "TND":
            assert all(isinstance(one, int) for each in ends for one in each) and options["softmax_layout"] == "TND"
            assert ends[0][-1] == q.shape[0] and ends[1][-1] == k.shape[0]
            starts = [[0, *each] for each in ends]
            spans = [[slice(a, b) for a, b in zip(each, each[1:], strict=False)] for each in starts]
            assert all(one.stop > one.start for each in spans for one in each), "a length of 0"
            assert options["pse"] is None and options["sparse_mode"] in (0, 2, 3)
            rows = list(zip(*spans, strict=True))
        else:
            assert options["input_layout"] == "BSND" and ends == (None, None) and options["softmax_layout"] == ""
            rows = [(number, number) for number in range(q.shape[0])]
        found = []
        for number, (of_q, of_k) in enumerate(rows):
            group = q.shape[-2] // k.shape[-2]
            high_q = q[of_q].double().transpose(0, 1)
            high_k = k[of_k].double().transpose(0, 1).repeat_interleave(group, 0)
            scores = high_q @ high_k.transpose(-1, -2)
            scale = options["scale"] if "scale" in options else options["scale_value"]
            if options["pse"] is None:
                scores = scores * scale
            else:
                pse = options["pse"]
                assert pse.dtype == q.dtype and pse.shape[1:] == scores.shape and pse.shape[0] in (1, q.shape[0])
                bias = pse[number if pse.shape[0] > 1 else 0].double()
                scores = scores * scale + bias if options["pse_type"] == 0 else (scores + bias) * scale
            masked = self._masked(options, number, scores.shape)
            found.append((of_q, of_k, scores.masked_fill(masked, -torch.inf), masked.all(-1)))
        return found

    def _masked(self, options: dict[str, Any], number: int, shape: torch.Size) -> Tensor:
        mask, mode = options["atten_mask"], options["sparse_mode"]
        if mask is None:
            return torch.zeros(shape, dtype=torch.bool)
        assert mask.dtype == torch.bool
        if mode == 1:
            batch, heads = options["query"].shape[0], shape[0]
            assert mask.shape[2:] == shape[1:]
            assert tuple(mask.shape[:2]) in ((1, 1), (batch, 1), (batch, heads))
            return mask[number if mask.shape[0] > 1 else 0].expand(shape)
        assert mask.shape == (2048, 2048) and torch.equal(mask, torch.ones_like(mask).triu(1))
        before, after = options["pre_tokens"], options["next_tokens"]
        assert mode == 4 or (before, after) == (OPEN, OPEN)
        return ~seen(*shape[1:], mode, before, after).expand(shape)

    def _kept(self, options: dict[str, Any], number: int, shape: torch.Size) -> Tensor:
        if options["keep_prob"] == 1.0:
            return torch.ones(shape, dtype=torch.float64)
        generator = torch.Generator().manual_seed(options["seed"] + 7 * options["offset"] + number)
        return (torch.rand(shape, generator=generator) < options["keep_prob"]).double() / options["keep_prob"]

    def forward(self, **options: Any) -> tuple[Any, ...]:
        q, v = options["query"], options["value"]
        if options["keep_prob"] < 1.0:
            options["seed"], options["offset"] = torch.randint(1 << 20, (2,)).tolist()
        out = torch.full_like(q, torch.nan)
        packed = options["input_layout"] == "TND"
        sums_shape = (*q.shape[:2], 8) if packed else (q.shape[0], q.shape[2], q.shape[1], 8)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        highest, total = (torch.full(sums_shape, torch.nan, dtype=dtype) for _ in range(2))
        for number, (rows, keys, scores, empty) in enumerate(self._pieces(options)):
            top = scores.amax(-1, keepdim=True).masked_fill(empty[..., None], 0.0)
            weights = (scores - top).exp().masked_fill(empty[..., None], 1.0)
            sums = weights.sum(-1, keepdim=True)
            group = q.shape[-2] // v.shape[-2]
            high_v = v[keys].double().transpose(0, 1).repeat_interleave(group, 0)
            weights = weights / sums * self._kept(options, number, scores.shape)
            out[rows] = (weights @ high_v).transpose(0, 1).to(q.dtype)
            for stored, one in ((highest, top), (total, sums)):
                stored[rows] = (one.transpose(0, 1) if packed else one).expand_as(stored[rows]).to(dtype)
        return out, highest, total, q.new_empty(0), options["seed"], options["offset"], q.numel()

    def backward(self, **options: Any) -> tuple[Any, ...]:
        q, k, v = options["query"], options["key"], options["value"]
        assert options["keep_prob"] == 1.0 or options["numels"] == q.numel()
        gradients = [torch.full_like(one, torch.nan) for one in (q, k, v)]
        packed = options["input_layout"] == "TND"
        for number, (rows, keys, scores, empty) in enumerate(self._pieces(options)):
            highest, total = (options[name][rows][..., :1].double() for name in ("softmax_max", "softmax_sum"))
            if packed:
                highest, total = highest.transpose(0, 1), total.transpose(0, 1)
            assert highest.isfinite().all()
            weights = ((scores - highest).exp() / total).masked_fill(empty[..., None], 1 / scores.shape[-1])
            group = q.shape[-2] // k.shape[-2]
            upstream, out, high_q = (
                one[rows].double().transpose(0, 1) for one in (options["dy"], options["attention_in"], q)
            )
            high_k, high_v = (one[keys].double().transpose(0, 1).repeat_interleave(group, 0) for one in (k, v))
            kept = self._kept(options, number, scores.shape)
            dweights = upstream @ high_v.transpose(-1, -2) * kept
            dscores = weights * (dweights - (upstream * out).sum(-1, keepdim=True)) * options["scale_value"]
            found = (
                dscores @ high_k,
                dscores.transpose(-1, -2) @ high_q,
                (weights * kept).transpose(-1, -2) @ upstream,
            )
            for gradient, which, one in zip(gradients, (rows, keys, keys), found, strict=True):
                gradient[which] = one.unflatten(0, (gradient.shape[-2], -1)).sum(1).transpose(0, 1).to(q.dtype)
        return (*gradients, None, None, None, None)
