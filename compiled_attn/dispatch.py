"""The attention calls. One way: arguments -> Call -> Entry -> operator -> kernel. Eager calls leave the operator out
where nobody needs it: see direct.py, and _dense for composite backends.

All of it is traced by Dynamo, so nothing here logs, warns, imports or caches behind the tracer's back; checked calls
are remembered in eager mode only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks, direct, masks, registry
from .compilation import mark_caches
from .operators import Kernels
from .registry import BACKENDS, Entry, served
from .spec import ALIGN_LOWER_RIGHT, CAUSAL, LOWER_RIGHT, UPPER_LEFT, Call
from .state import SWITCH, _local, origin

_any_autocast = torch._C._is_any_autocast_enabled  # 0.4 us less than asking for one device type

Alignment = Literal["upper_left", "lower_right"]


# An int: with dynamic=True Dynamo makes a symbol of a default that is a float, finds that it must be constant, and
# compiles every graph a second time (torch 2.13).
NO_DROPOUT = 0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = NO_DROPOUT,
    is_causal: bool = False,
    causal_alignment: Alignment = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V by the active backend (Vaswani et al. 2017, eq. 1).

    Args:
        query: (B, Sq, H, D), floating point.
        key: (B, Sk, Hk, D), same dtype and device as ``query``; Hk == H, or a divisor of H with ``enable_gqa``.
        value: (B, Sk, Hk, Dv).
        attn_mask: bool (True = attend) or additive float: (B|1, H|1, Sq|1, Sk), (B, Sq, Sk), or (B, Sk) as a
            key-padding mask; or a FlexAttention ``BlockMask`` for backend ``flex``.
        key_padding_mask: bool (B, Sk), True = a real key; holes are allowed; composes with ``is_causal``.
        dropout_p: probability of dropping a weight, in [0, 1).
        is_causal: query i attends to keys up to i (``upper_left``) or up to i + Sk - Sq (``lower_right``).
        causal_alignment: "upper_left", as in PyTorch, or "lower_right", as in flash-attn; also places the window.
        scale: factor on Q K^T; None means 1/sqrt(D).
        enable_gqa: allow fewer key/value heads than query heads.
        window_size: (left, right) keys beside the query's own position, -1 = unlimited.
        deterministic: True asks for a deterministic backward; None follows
            ``torch.are_deterministic_algorithms_enabled()``.
        backend: a name of ``list_backends()``; None uses ``active_backend()``.

    Returns:
        (B, Sq, H, Dv), contiguous, dtype of ``query``. A row with nothing to attend to gives 0.

    Raises:
        ValueError: the call makes no sense, or the backend is unknown.
        NotImplementedError: the backend cannot serve the call; the text has every reason.

    Under ``torch.autocast`` the inputs are cast to the autocast dtype first.

    >>> import torch, compiled_attn
    >>> q, k, v = (torch.randn(2, 17, 4, 16) for _ in range(3))
    >>> compiled_attn.attention(q, k, v, is_causal=True).shape
    torch.Size([2, 17, 4, 16])
    """
    return _dense(
        query, key, value, attn_mask, key_padding_mask, dropout_p, is_causal, causal_alignment, scale, enable_gqa,
        window_size, deterministic, backend, False,
    )[0]  # fmt: skip


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    *,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = NO_DROPOUT,
    is_causal: bool = False,
    causal_alignment: Alignment = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and the log-sum-exp of the masked scores.

    ``lse`` is (B, H, Sq), natural log, float32 (float64 for float64 inputs), -inf for a row with nothing to attend
    to. It carries no gradient. Arguments and errors are those of :func:`attention`.

    >>> import torch, compiled_attn
    >>> x = torch.randn(2, 17, 4, 16)
    >>> out, lse = compiled_attn.attention_with_lse(x, x, x)
    >>> lse.shape, lse.dtype
    (torch.Size([2, 4, 17]), torch.float32)
    """
    return _dense(
        query, key, value, attn_mask, key_padding_mask, dropout_p, is_causal, causal_alignment, scale, enable_gqa,
        window_size, deterministic, backend, True,
    )  # fmt: skip


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = NO_DROPOUT,
    is_causal: bool = False,
    causal_alignment: Alignment = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`attention` inside each of B sequences packed behind one another.

    Args:
        query: (Tq, H, D); key: (Tk, Hk, D); value: (Tk, Hk, Dv).
        cu_seqlens_q: int32 (B + 1,), on the device of ``query``: sequence b is rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1]. Empty sequences are allowed. Rows behind the last one give 0.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q: the longest query sequence, or a bound of it; None takes Tq. Never read from the device.
        max_seqlen_k: the same for key and value; None takes Tk.

    The other arguments and the errors are those of :func:`attention`; positions (causal, window) count inside each
    sequence.

    Returns:
        (Tq, H, Dv), contiguous.

    >>> import torch, compiled_attn
    >>> x = torch.randn(10, 2, 16)
    >>> lengths = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    >>> compiled_attn.varlen_attention(x, x, x, lengths, lengths, 7, 7).shape
    torch.Size([10, 2, 16])
    """
    return _varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal,
        causal_alignment, scale, enable_gqa, window_size, deterministic, backend, False,
    )[0]  # fmt: skip


def varlen_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = NO_DROPOUT,
    is_causal: bool = False,
    causal_alignment: Alignment = "upper_left",
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`varlen_attention`, and lse (H, Tq) as in :func:`attention_with_lse`.

    >>> import torch, compiled_attn
    >>> x = torch.randn(10, 2, 16)
    >>> lengths = torch.tensor([0, 3, 10], dtype=torch.int32)
    >>> out, lse = compiled_attn.varlen_attention_with_lse(x, x, x, lengths, lengths)
    >>> lse.shape
    torch.Size([2, 10])
    """
    return _varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal,
        causal_alignment, scale, enable_gqa, window_size, deterministic, backend, True,
    )  # fmt: skip


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = NO_DROPOUT,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: str | None = None,
    parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` under Diffusers' signature.

    ``attention_kwargs`` may hold ``window_size``, ``deterministic``, ``causal_alignment``, ``key_padding_mask`` and
    ``return_lse`` (then the result is ``(out, lse)``). Any other key, or one that contradicts a named argument, is a
    ValueError: nothing is dropped. ``backend`` also takes a member of Diffusers' ``AttentionBackendName``.
    ``parallel_config`` (context parallelism) raises NotImplementedError unless it is None.

    >>> import torch, compiled_attn
    >>> x = torch.randn(1, 8, 2, 16)
    >>> out, lse = compiled_attn.dispatch_attention_fn(x, x, x, attention_kwargs={"return_lse": True})
    """
    if parallel_config is not None:
        raise NotImplementedError("compiled_attn has no context parallelism; pass parallel_config=None")
    if backend is not None:
        backend = getattr(backend, "value", backend)
    if not attention_kwargs:  # 0.4 us less than looking five keys up
        return _dense(
            query, key, value, attn_mask, None, dropout_p, is_causal, UPPER_LEFT, scale, enable_gqa, None, None,
            backend, False,
        )[0]  # fmt: skip
    extra = attention_kwargs
    unknown = [name for name in extra if name not in _ATTENTION_KWARGS]
    if unknown:
        raise ValueError(f"unknown attention_kwargs {unknown}; known: {', '.join(_ATTENTION_KWARGS)}")
    return_lse = bool(extra.get("return_lse", False))
    result = _dense(
        query, key, value, attn_mask, extra.get("key_padding_mask"), dropout_p, is_causal,
        extra.get("causal_alignment", UPPER_LEFT), scale, enable_gqa, extra.get("window_size"),
        extra.get("deterministic"), backend, return_lse,
    )  # fmt: skip
    return result if return_lse else result[0]


_ATTENTION_KWARGS = ("window_size", "deterministic", "causal_alignment", "key_padding_mask", "return_lse")


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    alignment: str,
    scale: float | None,
    gqa: bool,
    window_size: Any,
    deterministic: bool | None,
    backend: str | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if type(query) is not Tensor and type(query).__name__ == "DTensor":
        return _on_dtensors(0)(
            query, key, value, attn_mask, key_padding_mask, dropout_p, is_causal, alignment, scale, gqa, window_size,
            deterministic, backend, return_lse,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    entry = _entry(backend, compiling)
    if dropout_p == NO_DROPOUT:
        dropout_p = 0.0
    mask, key_padding, kind = None, None, "none"
    if attn_mask is not None or key_padding_mask is not None:
        mask, key_padding, kind = prepared_masks(query, key, attn_mask, key_padding_mask)
    under_autocast = not compiling and _any_autocast()
    if compiling or under_autocast:
        query, key, value = autocast(query, key, value)
    window = None if window_size is None else limited_window(window_size)
    if scale is not None and scale <= 0.0 and query.is_floating_point():
        query, scale = positive_scale(query, scale)
    process = torch.are_deterministic_algorithms_enabled()
    if deterministic is None:
        deterministic = process
    mask_gradient = kind == "float" and wants_mask_gradient(mask)
    gradient = mask_gradient or wants_gradient(query, key, value)
    options = (
        kind, mask_gradient, dropout_p, is_causal, alignment, gqa, window, deterministic, return_lse, gradient, process,
        False,
    )  # fmt: skip
    if compiling:
        mark_caches()
        registry.check(entry, facts(query, key, value, options, False))
    else:
        seen = (
            entry.number, query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device,
            key.device, value.device, options,
        )  # fmt: skip
        if seen not in served:
            _check_new(seen, entry, query, key, value, options, False)

    causal = 0 if not is_causal and window is None else _position_bits(is_causal, alignment)
    if registry.checks_enabled:
        checks.dense(query, key, value, None if kind == "block" else mask)
    if entry.backend.traced is not None and entry.backend.takes_traced(facts(query, key, value, options, False)):  # type: ignore[misc]
        return entry.backend.traced(
            query, key, value, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse
        )
    # Arguments are spelled out each time: one tuple of them for all costs 0.7 of a native call's 8 us over plain SDPA.
    kernels: Kernels = entry.backend.dense  # type: ignore[assignment]
    # (under autocast the operator, which switches it off round the kernel's own matrix products)
    if not compiling and not under_autocast:
        if kernels.composite:
            # The operator would dissolve into the same aten calls, with their gradients, after 4 us of boxing and three
            # outputs where one is wanted (15.7 against 9.8 us for SDPA with transposes).
            out, lse, _ = kernels.forward(
                query, key, value, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, return_lse
            )
            out = out.contiguous()
            return out, lse.detach().contiguous() if return_lse else out  # type: ignore[union-attr]
        if (
            not gradient
            and direct.plain(dropout_p, scale, gqa, window, deterministic)
            and direct.unseen(query, key, value, mask, key_padding)
        ):
            return direct.run(
                kernels.forward, query, key, value, mask, key_padding, dropout_p, causal, scale, gqa, window,
                deterministic, return_lse,
            )  # fmt: skip
    # Opaque operators need lse for their backward and cannot see requires_grad once they are in a graph.
    save = return_lse or (gradient and not kernels.composite)
    out, lse, _ = entry.op(  # type: ignore[misc]
        query, key, value, mask, key_padding, dropout_p, causal, scale, gqa, window, deterministic, save
    )
    return out, lse


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    is_causal: bool,
    alignment: str,
    scale: float | None,
    gqa: bool,
    window_size: Any,
    deterministic: bool | None,
    backend: str | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    if type(query) is not Tensor and type(query).__name__ == "DTensor":
        return _on_dtensors(1)(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, alignment,
            scale, gqa, window_size, deterministic, backend, return_lse,
        )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    entry = _entry(backend, compiling)
    if dropout_p == NO_DROPOUT:
        dropout_p = 0.0
    under_autocast = not compiling and _any_autocast()
    if compiling or under_autocast:
        query, key, value = autocast(query, key, value)
    window = None if window_size is None else limited_window(window_size)
    if scale is not None and scale <= 0.0 and query.is_floating_point():
        query, scale = positive_scale(query, scale)
    process = torch.are_deterministic_algorithms_enabled()
    if deterministic is None:
        deterministic = process
    gradient = wants_gradient(query, key, value)
    same_lengths = cu_seqlens_q is cu_seqlens_k
    options = (
        "none", False, dropout_p, is_causal, alignment, gqa, window, deterministic, return_lse, gradient, process,
        same_lengths,
    )  # fmt: skip
    if compiling:
        mark_caches()
        registry.check(entry, facts(query, key, value, options, True))
    else:
        seen = (
            entry.number, query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device,
            key.device, value.device, options, "varlen",
        )  # fmt: skip
        if seen not in served:
            _check_new(seen, entry, query, key, value, options, True)
    masks.require_lengths(query, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if not (cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous()):
        # kernels take a pointer, and would read the column of a table row by row
        cu_seqlens_q = cu_seqlens_q.contiguous()
        cu_seqlens_k = cu_seqlens_q if same_lengths else cu_seqlens_k.contiguous()

    causal = (
        0 if not is_causal and window is None else _position_bits(is_causal, LOWER_RIGHT if same_lengths else alignment)
    )
    max_q = query.shape[0] if max_seqlen_q is None else max_seqlen_q
    max_k = key.shape[0] if max_seqlen_k is None else max_seqlen_k
    if registry.checks_enabled:
        checks.varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    kernels: Kernels = entry.backend.varlen  # type: ignore[assignment]
    if (
        not (compiling or under_autocast or gradient)
        and direct.plain(dropout_p, scale, gqa, window, deterministic)
        and type(max_q) is type(max_k) is int
        and direct.unseen(query, key, value, cu_seqlens_q, cu_seqlens_k)
    ):
        return direct.run(
            kernels.forward, query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, causal, scale, gqa,
            window, deterministic, return_lse,
        )  # fmt: skip
    save = return_lse or (gradient and not kernels.composite)
    out, lse, _ = entry.varlen_op(  # type: ignore[misc]
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, causal, scale, gqa, window,
        deterministic, save,
    )  # fmt: skip
    return out, lse


def positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a positive scale.

    Flash kernels and cuDNN's scale the maximum of a row after they found it: NaN for a scale of 0 or -1 (H200).
    """
    return (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)


def _on_dtensors(packed: int) -> Callable[..., tuple[Tensor, Tensor]]:
    if registry.distributed is None:
        raise NotImplementedError(
            "query is a DTensor; call compiled_attn.integrations.dtensor.install() once, or pass query.to_local()"
        )
    return registry.distributed[packed]


def _entry(backend: str | None, compiling: bool) -> Entry:
    slot = _local.slot
    name = backend
    if name is None:
        name = slot.name if slot.inner is None else slot.inner
    entry = BACKENDS.get(name)
    if entry is None:
        raise registry.unknown(name, origin(name))
    if not compiling:
        slot.reached = True
    elif slot.traced and name == SWITCH:
        raise NotImplementedError(
            "backend 'switch' looks its backend up when it runs and cannot see a context entered inside the compiled "
            "function; enter attention_backend(...) outside, or name the backend itself"
        )
    return entry


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast does for PyTorch's SDPA: everything floating but float64."""
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return _cast(query, dtype), _cast(key, dtype), _cast(value, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def _position_bits(is_causal: bool, alignment: str) -> int:
    return (CAUSAL if is_causal else 0) | (ALIGN_LOWER_RIGHT if alignment == LOWER_RIGHT else 0)


def limited_window(window_size: Any) -> tuple[int, int] | None:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2 or None in window_size:
        raise ValueError(f"window_size={window_size!r} must be (left, right), -1 = unlimited")
    left, right = window_size
    return None if left == -1 and right == -1 else (left, right)


def wants_gradient(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def wants_mask_gradient(mask: Any) -> bool:
    return torch.is_grad_enabled() and mask.requires_grad


def prepared_masks(query: Tensor, key: Tensor, attn_mask: Any, key_padding_mask: Any) -> tuple[Any, Any, str]:
    """``(mask, key_padding, kind)`` of what the caller gave; a BlockMask stays what it is."""
    if hasattr(attn_mask, "mask_mod") and hasattr(attn_mask, "kv_indices"):
        if key_padding_mask is not None:
            raise ValueError("a BlockMask and key_padding_mask were given; put the padding into the mask_mod")
        return attn_mask, None, "block"
    if not (attn_mask is None or isinstance(attn_mask, Tensor)):
        raise TypeError(f"attn_mask must be a tensor or a FlexAttention BlockMask, not {type(attn_mask).__name__}")
    if not (key_padding_mask is None or isinstance(key_padding_mask, Tensor)):
        raise TypeError(f"key_padding_mask must be a tensor, not {type(key_padding_mask).__name__}")
    if query.dim() != 4 or key.dim() != 4:
        return None, None, "none"  # the call is refused for these shapes
    mask, key_padding = masks.canonical(attn_mask, key_padding_mask, query, key)
    if mask is None:
        return None, key_padding, "key_padding"
    return mask, key_padding, "bool" if mask.dtype == torch.bool else "float"


def facts(query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...], varlen: bool) -> Call:
    """The facts of a call, from its tensors, its options and the machine."""
    kind, mask_gradient, dropout_p, is_causal, alignment, gqa, window, deterministic, lse, gradient, process, same = (
        options
    )
    return Call(
        query=tuple(query.shape),
        key=tuple(key.shape),
        value=tuple(value.shape),
        dtypes=(query.dtype, key.dtype, value.dtype),
        devices=(query.device.type, key.device.type, value.device.type),
        capability=_capability(query.device.index) if query.device.type == "cuda" else None,
        mask=kind,
        mask_gradient=mask_gradient,
        causal=is_causal,
        alignment=alignment,
        gqa=gqa,
        window=window,
        dropout_p=dropout_p,
        deterministic=deterministic,
        globally_deterministic=process,
        lse=lse,
        gradient=gradient,
        varlen=varlen,
        same_lengths=same,
        compiling=torch.compiler.is_compiling(),
    )


def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# What torch.compiler.assume_constant_result sets, which would import torch._dynamo (1 s). A device does not change.
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_new(
    seen: Hashable, entry: Entry, query: Tensor, key: Tensor, value: Tensor, options: tuple[Any, ...], varlen: bool
) -> None:
    """Check an eager call that was not ``served`` before, and remember it."""
    for name, given in (("query", query), ("key", key), ("value", value)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(given).__name__}")
    registry.check(entry, facts(query, key, value, options, varlen))
    registry.remember(seen)
