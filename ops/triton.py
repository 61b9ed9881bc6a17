"""`triton` and `triton_varlen`: our portable kernels, forward and backward, for any CUDA or ROCm GPU.

torch.compile and AOTInductor take them in: the graph that Dynamo and torch.export show has our operator, compiled code
and packages have the kernels themselves and no Python. The backward uses no atomics: same inputs, same bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Limits

from ._triton_functions import DENSE, DTYPES, MAX_HEAD_DIM, MIN_CAPABILITY, VARLEN, needs_triton, unavailable

_GPU = Limits(
    ("cuda",), DTYPES, min_capability=MIN_CAPABILITY, max_head_dim=MAX_HEAD_DIM,
    masks=("none", "key_padding", "bool", "float"), window=True, also=(needs_triton,),
)  # fmt: skip
_CPU = replace(_GPU, devices=("cpu",), dtypes=(torch.float32, *DTYPES[:2], torch.float64), min_capability=None, also=())
_VARLEN_GPU, _VARLEN_CPU = (replace(limits, masks=("none",)) for limits in (_GPU, _CPU))

register_backend(
    Backend(
        "triton_varlen",
        "our Triton kernels for packed sequences, any GPU; inlined by compilers; plain PyTorch on a CPU",
        family="ours",
        limits=(_GPU, _CPU),
        dense=DENSE,
        varlen_limits=(_VARLEN_GPU, _VARLEN_CPU),
        varlen=VARLEN,
        available=unavailable,
        packed=True,
    )
)
register_backend(
    Backend(
        "triton",
        "our Triton kernels, any GPU; inlined by compilers; plain PyTorch on a CPU",
        family="ours",
        limits=(_GPU, _CPU),
        dense=DENSE,
        available=unavailable,
        partner="triton_varlen",
    )
)
