"""Which backends can run a call, and every reason why the others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import registry
from .dispatch import autocast, facts, limited_window, prepared_masks, wants_gradient, wants_mask_gradient
from .spec import Call, mistakes, report


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: Any = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Call:
    """The :class:`Call` that :func:`attention` would make of these arguments; packed inputs are (T, H, D)."""
    varlen = query.dim() == 3
    if varlen and (attn_mask is not None or key_padding_mask is not None):
        raise ValueError("varlen_attention takes no attn_mask and no key_padding_mask: cu_seqlens say it all")
    mask, _, kind = (
        prepared_masks(query, key, attn_mask, key_padding_mask)
        if attn_mask is not None or key_padding_mask is not None
        else (None, None, "none")
    )
    mask_gradient = kind == "float" and wants_mask_gradient(mask)
    process = torch.are_deterministic_algorithms_enabled()
    if deterministic is None:
        deterministic = process
    window = None if window_size is None else limited_window(window_size)
    gradient = wants_gradient(query, key, value) or mask_gradient
    query, key, value = autocast(query, key, value)
    return facts(
        query,
        key,
        value,
        (
            kind, mask_gradient, dropout_p, is_causal, causal_alignment, enable_gqa, window, deterministic,
            return_lse, gradient, process, False,
        ),
        varlen,
    )  # fmt: skip


def why_not(name: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> list[str]:
    """Every reason why backend ``name`` cannot run this call; an empty list when it can.

    Takes the arguments of :func:`attention` and ``return_lse``; (T, H, D) tensors ask about
    :func:`varlen_attention`. Raises ValueError for an unknown name and for a call that makes no sense.

    >>> import torch, compiled_attn
    >>> x = torch.randn(1, 8, 2, 16)
    >>> compiled_attn.why_not("_native_math", x, x, x)
    []
    """
    entry = registry.find(name)
    call = call_of(query, key, value, attn_mask, **options)
    wrong = mistakes(call)
    if wrong:
        raise ValueError(report("attention call makes no sense:", wrong))
    return registry.unavailable(name) + registry.refusal(entry, call)


def explain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> dict[str, list[str]]:
    """:func:`why_not` for every backend: name -> reasons, empty where the backend can run the call.

    >>> import torch, compiled_attn
    >>> x = torch.randn(1, 8, 2, 16)
    >>> compiled_attn.explain(x, x, x)["native"]
    []
    """
    return {name: why_not(name, query, key, value, attn_mask, **options) for name in registry.list_backends()}
