"""A whole opaque backend of a third party, as small as it can be: importing this file registers ``stand_in``."""

import math

import torch

from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import CAUSAL, UPPER_LEFT, Limits


def _heads_first(q, k, v):
    group = q.shape[2] // k.shape[2]
    return q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))


def _scores(q, k, key_padding, causal, scale):
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal & CAUSAL:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores if key_padding is None else scores.masked_fill(~key_padding[:, None, None], -math.inf)


def forward(q, k, v, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse):
    high_q, high_k, high_v = (x if x.dtype == torch.float64 else x.float() for x in _heads_first(q, k, v))
    scores = _scores(high_q, high_k, key_padding, causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp() @ high_v
    return out.transpose(1, 2).to(q.dtype), lse, None


def backward(
    grad, q, k, v, mask, key_padding, out, lse, state, dropout_p, causal, scale, gqa, window, deterministic, mask_grad
):
    heads = (k.shape[2], q.shape[2] // k.shape[2])
    high = (x if x.dtype == torch.float64 else x.float() for x in (*_heads_first(q, k, v), grad, out))
    high_q, high_k, high_v, grad, out = high
    scores = _scores(high_q, high_k, key_padding, causal, scale)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    d_scores = weights * (grad @ high_v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True))
    d_scores = d_scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    dk, dv = (
        (left.transpose(-1, -2) @ right).unflatten(1, heads).sum(2).transpose(1, 2).to(q.dtype)
        for left, right in ((d_scores, high_q), (weights, grad))
    )
    return (d_scores @ high_k).transpose(1, 2).to(q.dtype), dk, dv, None


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIMITS = Limits(("cpu", "cuda"), DTYPES, value_head_dim=True, masks=("none", "key_padding"), alignments=(UPPER_LEFT,))
register_backend(Backend("stand_in", "plain products behind an opaque operator", (LIMITS,), Kernels(forward, backward)))
