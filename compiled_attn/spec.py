"""What a call is, what a backend can do, and every rule between the two.

Nothing here touches a tensor or asks the machine anything: a :class:`Call` is made of plain facts, so the
same rules serve the eager dispatcher, the traced one, ``why_not``, ``explain`` and the tests.

Shape legend: B batch, Sq/Sk query/key length, H query heads, Hk key/value heads, D head_dim of query and
key, Dv head_dim of value, Tq/Tk total packed length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

UPPER_LEFT = "upper_left"
LOWER_RIGHT = "lower_right"
ALIGNMENTS = (UPPER_LEFT, LOWER_RIGHT)

# The operators' `causal` argument: bit 0 = causal, bit 1 = positions aligned at the lower right.
CAUSAL = 1
ALIGN_LOWER_RIGHT = 2

# Kinds of mask. "key_padding" is (B, Sk) bool; "bool" and "float" are 4-D and broadcast; "block" is a
# FlexAttention BlockMask, the only one that is not a tensor.
MASK_KINDS = ("none", "key_padding", "bool", "float", "block")

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """The facts of one attention call. Shapes are (B, S, H, D), or (T, H, D) when ``varlen``."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
    devices: tuple[str, str, str]
    capability: tuple[int, int] | None = None
    mask: str = "none"
    mask_gradient: bool = False
    causal: bool = False
    alignment: str = UPPER_LEFT
    gqa: bool = False
    window: tuple[int, int] | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    globally_deterministic: bool = False
    lse: bool = False
    gradient: bool = False
    varlen: bool = False
    same_lengths: bool = False
    compiling: bool = False


@dataclass(frozen=True)
class Limits:
    """What one backend's kernel takes, on the device types named in ``devices``.

    ``deterministic`` speaks of the backward pass: "always"; "global", when only
    ``torch.use_deterministic_algorithms(True)`` makes it so; or "never".
    ``alignments`` are the causal and window alignments served when Sq != Sk; with Sq == Sk both are one. (Packed
    lengths are on the device: there the two are one when cu_seqlens_q and cu_seqlens_k are the same tensor.)
    ``capabilities`` are, instead of ``min_capability``, the only compute capabilities with a kernel: (8, 9), or
    (8, None) for all of 8.x.
    ``verified`` says how the entry is known: "hardware", "contract" (recorded signatures
    only) or "not run".
    ``rounding`` is what kernels that round to int8, fp8 or fp4 may add to the error of out, as a share of its root mean
    square; 0.0 for those that round to the dtype alone. No rule: tests and ``list --verify`` go by it.
    ``also`` holds rules that fit no field: functions from a Call to a reason, or None.

    >>> import torch, compiled_attn
    >>> compiled_attn.Limits(("cuda",), (torch.bfloat16,), max_head_dim=128, head_dim_multiple=8).window
    False
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    min_capability: tuple[int, int] | None = None
    capabilities: tuple[tuple[int, int | None], ...] = ()
    min_head_dim: int = 1
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    value_head_dim: bool = False
    masks: tuple[str, ...] = ("none",)
    mask_gradient: bool = False
    causal: bool = True
    alignments: tuple[str, ...] = ALIGNMENTS
    gqa: bool = True
    window: bool = False
    dropout: bool = False
    lse: bool = True
    gradient: bool = True
    deterministic: str = "always"
    verified: str = "hardware"
    rounding: float = 0.0
    also: tuple[Callable[[Call], str | None], ...] = ()

    def __post_init__(self) -> None:
        if self.capabilities and self.min_capability is not None:
            raise ValueError("Limits takes min_capability or capabilities, not both")


def names(values: object) -> str:
    """``(torch.float16, torch.bfloat16)`` as ``float16/bfloat16``, for messages."""
    return "/".join(str(value).removeprefix("torch.") for value in values) or "nothing"  # type: ignore[attr-defined]


def fits_capability(limits: Limits, capability: tuple[int, int]) -> bool:
    if limits.capabilities:
        return capability in limits.capabilities or (capability[0], None) in limits.capabilities
    # Dynamo of torch 2.11 compares tuples by < alone
    return limits.min_capability is None or not capability < limits.min_capability


def asked_capability(limits: Limits) -> str:
    """What :func:`fits_capability` asks, for messages."""
    if limits.capabilities:
        return f"has kernels for compute capability {capabilities_of(limits)}"
    return f"needs compute capability {dotted(limits.min_capability or (0, 0))} or later"


def capabilities_of(limits: Limits) -> str:
    """The compute capabilities of ``limits``: ``8.0+``, or ``8.x, 9.0``, or ``8.x-12.x``; nothing if any will do."""
    majors = [major for major, minor in limits.capabilities if minor is None]
    if len(majors) == len(limits.capabilities) > 2 and majors == list(range(majors[0], majors[-1] + 1)):
        return f"{majors[0]}.x-{majors[-1]}.x"
    if limits.capabilities:
        return ", ".join(dotted(one) for one in limits.capabilities)
    return "" if limits.min_capability is None else dotted(limits.min_capability) + "+"


def dotted(capability: tuple[int, int | None]) -> str:
    """``(9, 0)`` as ``9.0``, and ``(9, None)`` as ``9.x``."""
    major, minor = capability
    return f"{major}.{'x' if minor is None else minor}"


def mistakes(call: Call) -> list[str]:
    """Every reason why ``call`` makes no sense for any backend (the caller raises ValueError)."""
    found: list[str] = []
    rank, layout = (3, "(T, H, D)") if call.varlen else (4, "(B, S, H, D)")
    for name, shape in (("query", call.query), ("key", call.key), ("value", call.value)):
        if len(shape) != rank:
            found.append(f"{name} has {len(shape)} dimensions, expected {rank}: {layout}")
    if found:
        return found
    if call.dtypes[0] != call.dtypes[1] or call.dtypes[0] != call.dtypes[2]:
        found.append(f"query, key and value have dtypes {names(call.dtypes)}; give all three one dtype")
    if call.devices[0] != call.devices[1] or call.devices[0] != call.devices[2]:
        found.append(f"query, key and value are on {'/'.join(call.devices)}; move them to one device")
    if not call.dtypes[0].is_floating_point:
        found.append(f"query is {names(call.dtypes[:1])}; attention needs a floating point dtype")
    if not call.varlen and (call.query[0] != call.key[0] or call.query[0] != call.value[0]):
        found.append(
            f"batch sizes differ: query {call.query[0]}, key {call.key[0]}, value {call.value[0]}; "
            "expand the smaller ones"
        )
    if call.key[-3] != call.value[-3]:
        found.append(f"key has length {call.key[-3]}, value {call.value[-3]}; they must be equal")
    heads, key_heads = call.query[-2], call.key[-2]
    if key_heads != call.value[-2]:
        found.append(f"key has {key_heads} heads, value {call.value[-2]}; they must be equal")
    if call.query[-1] != call.key[-1]:
        found.append(f"query has head_dim {call.query[-1]}, key {call.key[-1]}; they must be equal")
    if heads != key_heads:
        if not call.gqa:
            found.append(f"query has {heads} heads, key {key_heads}; pass enable_gqa=True for grouped heads")
        elif key_heads == 0 or heads % key_heads != 0:
            found.append(f"enable_gqa needs query heads ({heads}) to be a multiple of key heads ({key_heads})")
    if not 0.0 <= call.dropout_p < 1.0:
        found.append(f"dropout_p={call.dropout_p} is not in [0, 1)")
    if call.alignment not in ALIGNMENTS:
        found.append(f"causal_alignment={call.alignment!r} is none of {ALIGNMENTS}")
    if call.window is not None and (call.window[0] < -1 or call.window[1] < -1):
        found.append(f"window_size={call.window} has an entry below -1 (-1 = unlimited)")
    if call.causal and call.mask not in ("none", "key_padding"):
        found.append(
            f"is_causal=True with a {call.mask} attn_mask has no defined meaning; put the causal part into the "
            "mask, or pass key_padding_mask= (B, Sk), which composes with is_causal"
        )
    return found


def reasons(limits: tuple[Limits, ...], call: Call) -> list[str]:
    """Every reason why a backend with these ``limits`` cannot serve ``call``; empty when it can."""
    device = call.devices[0]
    chosen = None
    for candidate in limits:
        # "meta" has no kernels: every backend traces on it, under its first entry.
        if device in candidate.devices or device == "meta":
            chosen = candidate
            break
    found: list[str] = []
    if chosen is None:
        found.append(f"runs on {'/'.join(d for limit in limits for d in limit.devices)}, not {device}")
        chosen = limits[0]
    dtype, head_dim = call.dtypes[0], call.query[-1]
    if call.capability is not None and not fits_capability(chosen, call.capability):
        found.append(f"{asked_capability(chosen)}, not {dotted(call.capability)}")
    if dtype not in chosen.dtypes:
        found.append(f"takes {names(chosen.dtypes)}, not {names((dtype,))}")
    if head_dim < chosen.min_head_dim:
        found.append(f"head_dim={head_dim} is under {chosen.min_head_dim}")
    if chosen.max_head_dim is not None and max(head_dim, call.value[-1]) > chosen.max_head_dim:
        found.append(f"head_dim={max(head_dim, call.value[-1])} is over {chosen.max_head_dim}")
    if chosen.head_dim_multiple > 1 and head_dim % chosen.head_dim_multiple != 0:
        found.append(f"head_dim={head_dim} is not a multiple of {chosen.head_dim_multiple}")
    if call.value[-1] != head_dim and not chosen.value_head_dim:
        found.append(f"needs one head_dim, not {head_dim} for query/key and {call.value[-1]} for value")
    if call.mask != "none" and call.mask not in chosen.masks:
        kinds = [kind for kind in chosen.masks if kind != "none"]
        found.append(f"takes {names(kinds) if kinds else 'no'} masks, so not a {call.mask} mask")
    if call.mask_gradient and not chosen.mask_gradient:
        found.append("gives no gradient for attn_mask; pass attn_mask.detach()")
    if call.causal and not chosen.causal:
        found.append("has no causal mode")
    positional = call.causal or call.window is not None
    if positional and call.alignment not in chosen.alignments:
        served = names(chosen.alignments)
        if call.varlen and not call.same_lengths and not chosen.alignments:
            found.append(
                "has causal and window masks for equal lengths only; if they are, pass one and the same tensor as "
                "cu_seqlens_q and cu_seqlens_k"
            )
        elif call.varlen and not call.same_lengths:
            found.append(
                f"aligns causal and window masks {served}, not {call.alignment}; pass causal_alignment={served!r}, or "
                "one and the same tensor as cu_seqlens_q and cu_seqlens_k, if the lengths are equal"
            )
        elif not call.varlen and call.query[-3] != call.key[-3] and not chosen.alignments:
            found.append(f"has causal and window masks for Sq == Sk only, not {call.query[-3]} and {call.key[-3]}")
        elif not call.varlen and call.query[-3] != call.key[-3]:
            found.append(
                f"aligns causal and window masks {served} when Sq != Sk "
                f"({call.query[-3]} != {call.key[-3]}), not {call.alignment}"
            )
    if call.query[-2] != call.key[-2] and not chosen.gqa:
        found.append("has no grouped-query attention; repeat the key and value heads")
    if call.window is not None and not chosen.window:
        found.append("has no sliding window")
    if call.dropout_p > 0.0 and not chosen.dropout:
        found.append(f"has no dropout (dropout_p={call.dropout_p})")
    if call.lse and not chosen.lse:
        found.append("returns no lse")
    if call.gradient and not chosen.gradient:
        found.append("is inference-only; use torch.no_grad() or a backend with a backward")
    if call.gradient and call.deterministic and chosen.deterministic == "never":
        found.append("has no deterministic backward")
    if call.gradient and call.deterministic and chosen.deterministic == "global" and not call.globally_deterministic:
        found.append("is deterministic only under torch.use_deterministic_algorithms(True), which is off")
    for rule in chosen.also:
        reason = rule(call)
        if reason is not None:
            found.append(reason)
    return found


def report(head: str, found: list[str]) -> str:
    """One message from all reasons: ``head``, then one indented line each."""
    return head + "".join("\n  " + reason for reason in found)
