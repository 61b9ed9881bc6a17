"""A backend of your own: two plain functions, its limits, one call. Run it: python examples/backend.py"""

import torch

import compiled_attn
from compiled_attn.operators import Kernels
from compiled_attn.spec import Limits


def scores(q, k, scale):  # (B, S, H, D) -> (B, H, Sq, Sk)
    return torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)


def forward(q, k, v, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse):
    s = scores(q, k, scale)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v), s.logsumexp(-1), None


def backward(grad, q, k, v, mask, key_padding, out, lse, state, dropout_p, causal, scale, *rest):
    p, dp = scores(q, k, scale).softmax(-1), torch.einsum("bqhd,bkhd->bhqk", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    dq, dk = torch.einsum("bhqk,bkhd->bqhd", ds, k), torch.einsum("bhqk,bqhd->bkhd", ds, q)
    return dq, dk, torch.einsum("bhqk,bqhd->bkhd", p, grad), None


# What the functions do not handle is said here, and refused: masks and windows (the default), causal, grouped heads.
limits = Limits(("cpu", "cuda"), (torch.float32, torch.float64), causal=False, gqa=False)
kernels = Kernels(forward, backward)
compiled_attn.register_backend(compiled_attn.Backend("einsum", "plain einsum", limits=(limits,), dense=kernels))

if __name__ == "__main__":
    x = torch.randn(2, 32, 4, 16, dtype=torch.float64, requires_grad=True)
    attend = torch.compile(lambda x: compiled_attn.attention(x, x, x, backend="einsum"), fullgraph=True)
    (gradient,) = torch.autograd.grad(attend(x).square().sum(), x)
    (expected,) = torch.autograd.grad(compiled_attn.attention(x, x, x).square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    print("backend 'einsum', compiled in one graph, agrees with PyTorch: forward and backward")
