"""The two operator schemas, and the one piece of machinery that makes operators from kernel functions.

Every dense backend is ``compiled_attn::<name>.v1`` with one schema, every varlen backend
``compiled_attn::<name>_varlen.v1`` with the other. The overload name is the version: a schema that grows
becomes ``v2`` beside it, so that an exported program never meets arguments it does not know.

A backend brings plain functions (:class:`Kernels`); :func:`define` adds the fake, the autograd formula, the
backward as an operator of its own, the error for double backward and the FLOP formulas. All of it happens at
definition: a formula registered after an operator was traced once is silently ignored by compiled code.

Three sorts of operator:

* opaque (default): compilers see one node with an exact fake and never look inside;
* inlined (``Kernels.inlined``): the same to Dynamo and torch.export; torch.compile and AOTInductor lower what is
  inside, forward and backward;
* composite (``Kernels.composite``): CompositeImplicitAutograd over aten operators. ``torch.export`` and Dynamo
  see our node; torch.compile and AOTInductor lower what is inside, with aten's own backward.

``Library.define/impl`` rather than ``custom_op``: 1.8 us a call against 7.4 us (torch 2.13, CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from . import flops, transforms
from .spec import ALIGN_LOWER_RIGHT, CAUSAL, LOWER_RIGHT, UPPER_LEFT, Call

NAMESPACE = "compiled_attn"
VERSION = "v1"

_OPTIONS = "float dropout_p{}, int causal{}, float? scale{}, bool gqa{}, int[2]? window{}, bool deterministic{}"
_DEFAULTS = ("=0.0", "=0", "=None", "=False", "=None", "=False")
_DENSE = "Tensor? mask{0}, Tensor? key_padding{0}"
_VARLEN = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_RESULT = "(Tensor out, Tensor lse, Tensor state)"

_options, _bare = _OPTIONS.format(*_DEFAULTS), _OPTIONS.format(*[""] * 6)
SCHEMAS = {
    False: f"(Tensor q, Tensor k, Tensor v, {_DENSE.format('=None')}, {_options}, bool return_lse=False) -> {_RESULT}",
    True: f"(Tensor q, Tensor k, Tensor v, {_VARLEN}, {_options}, bool return_lse=False) -> {_RESULT}",
}
BACKWARD_SCHEMAS = {
    varlen: f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, {structure}, Tensor out, Tensor lse, Tensor state, "
    f"{_bare}, bool mask_gradient) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)"
    for varlen, structure in ((False, _DENSE.format("")), (True, _VARLEN))
}

# The arguments between v and the options: (mask, key_padding), or cu_seqlens and max_seqlen of q and k.
_STRUCTURE = {False: 2, True: 4}
_FORWARD_DEFAULTS = {
    False: (None, None, 0.0, 0, None, False, None, False, False),
    True: (0.0, 0, None, False, None, False, False),
}
_LENGTH = {False: 12, True: 14}

_TRACED = (Tensor, FakeTensor, FunctionalTensor)

Result = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Kernels:
    """The functions of one operator.

    ``forward(q, k, v, <structure>, dropout_p, causal, scale, gqa, window, deterministic, return_lse)`` returns
    ``(out, lse, state)``, with the operator's arguments in the operator's order: ``<structure>`` is
    ``mask, key_padding`` (dense) or ``cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k`` (varlen); ``lse``
    may be None unless asked for, ``state`` (int64, 1-d, what backward needs) may be None.

    ``backward(grad_out, q, k, v, <structure>, out, lse, state, dropout_p, causal, scale, gqa, window,
    deterministic, mask_gradient)`` returns ``(dq, dk, dv, dmask)``, ``dmask`` None unless asked for. Without it
    the operator is inference-only.

    ``composite`` operators may leave ``backward`` to aten under autograd; ``switch`` still calls it.
    ``inlined`` operators are opaque to Dynamo and torch.export, but torch.compile and AOTInductor lower what the two
    functions launch: aten operators and Triton kernels (through ``torch.library.wrap_triton``), without Python.
    ``fake_state(q, dropout_p)`` is the empty twin of ``state``. ``random`` says that dropout draws numbers.

    >>> import compiled_attn
    >>> compiled_attn.Kernels(forward=lambda q, k, v, *rest: (v.clone(), None, None)).composite
    False
    """

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None
    composite: bool = False
    inlined: bool = False
    random: bool = False
    fake_state: Callable[[Tensor, float], Tensor] | None = None
    tags: tuple[torch.Tag, ...] = ()


_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(base: str, kernels: Kernels, varlen: bool = False) -> torch._ops.OpOverload:
    """Define ``compiled_attn::<base>.v1``, with the dense or the varlen schema, and return its overload."""
    tags = (torch.Tag.pt2_compliant_tag, *kernels.tags)
    if kernels.random:
        tags += (torch.Tag.nondeterministic_seeded,)
    _library.define(f"{base}.{VERSION}{SCHEMAS[varlen]}", tags=tags)
    if kernels.composite:
        _library.impl(f"{base}.{VERSION}", _without_autocast(_forward_of(kernels, varlen)), "CompositeImplicitAutograd")
    else:
        run = _without_forward_ad(base, _without_autocast(_forward_of(kernels, varlen)))
        _library.impl(f"{base}.{VERSION}", run, "CompositeExplicitAutograd")
        fake = _without_forward_ad(base, _fake_of(kernels, varlen))
        torch.library.register_fake(f"{NAMESPACE}::{base}.{VERSION}", fake, lib=_library)
        if kernels.inlined:
            _inline(f"{NAMESPACE}::{base}.{VERSION}", run)
        _define_backward(base, kernels, varlen)
        flops.register(base, varlen, backward=False)
    return getattr(getattr(torch.ops.compiled_attn, base), VERSION)


def is_defined(base: str) -> bool:
    """Whether ``compiled_attn::<base>`` exists: an operator cannot be defined twice, nor taken back."""
    return hasattr(torch.ops.compiled_attn, base)


def call_of(args: Sequence[Any], varlen: bool, gradient: bool = False) -> Call:
    """The facts of an operator's call, from its arguments (trailing defaults may be left out)."""
    args = _complete(args, varlen)
    q, k, v = args[:3]
    dropout_p, causal, _, gqa, window, deterministic, return_lse = args[3 + _STRUCTURE[varlen] :]
    kind = "none"
    if not varlen:
        mask, key_padding = args[3:5]
        if mask is not None:
            kind = "bool" if mask.dtype == torch.bool else "float"
        elif key_padding is not None:
            kind = "key_padding"
    on_cuda = q.device.type == "cuda" and torch.cuda.is_available()
    return Call(
        query=tuple(q.shape),
        key=tuple(k.shape),
        value=tuple(v.shape),
        dtypes=(q.dtype, k.dtype, v.dtype),
        devices=(q.device.type, k.device.type, v.device.type),
        capability=torch.cuda.get_device_capability(q.device) if on_cuda else None,
        mask=kind,
        causal=bool(causal & CAUSAL),
        alignment=LOWER_RIGHT if causal & ALIGN_LOWER_RIGHT else UPPER_LEFT,
        gqa=gqa,
        window=None if window is None else (window[0], window[1]),
        dropout_p=dropout_p,
        deterministic=deterministic,
        globally_deterministic=torch.are_deterministic_algorithms_enabled(),
        lse=return_lse,
        gradient=gradient,
        varlen=varlen,
        same_lengths=varlen and args[3] is args[4],
    )


def expected_shapes(q: Tensor, v: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of out and lse: (B, Sq, H, Dv) and (B, H, Sq); packed (T, H, Dv) and (H, T)."""
    out = (*q.shape[:-1], v.shape[-1])
    return out, (*q.shape[:-3], q.shape[-2], q.shape[-3])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, and float64 for float64 inputs (gradcheck needs it)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_of(kernels: Kernels, varlen: bool) -> Callable[..., Result]:
    forward = kernels.forward
    length = _LENGTH[varlen]

    def run(*args: Any) -> Result:
        if len(args) < length:
            args = _complete(args, varlen)
        out, lse, state = forward(*args)
        q = args[0]
        if lse is None or not args[-1]:
            lse = q.new_empty(0, dtype=lse_dtype(q.dtype))
        elif lse.requires_grad:
            lse = lse.detach()  # some kernels could differentiate it, most cannot: none does
        if state is None:
            state = q.new_empty(0, dtype=torch.int64)
        return out.contiguous(), lse.contiguous(), state

    return run


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    # A Python kernel body would run with the caller's autocast on and disagree with its fake; the dispatcher
    # has already cast the inputs. Asking first keeps the context manager (5 us) out of ordinary calls.
    def kernel(*args: Any) -> Any:
        device = args[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return run(*args)
        return run(*args)

    return kernel


def _without_forward_ad(base: str, run: Callable[..., Any]) -> Callable[..., Any]:
    # The operators of Library.register_autograd give a zero tangent without a word (torch 2.13).
    def kernel(*args: Any) -> Any:
        if torch.autograd.forward_ad._current_level >= 0:
            raise NotImplementedError(
                f"compiled_attn::{base} has no forward-mode derivative (jvp); use backend '_native_math'"
            )
        return run(*args)

    return kernel


def _fake_of(kernels: Kernels, varlen: bool) -> Callable[..., Result]:
    def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Result:
        options = _complete((q, k, v, *rest), varlen)[3 + _STRUCTURE[varlen] :]
        out_shape, lse_shape = expected_shapes(q, v)
        out = q.new_empty(out_shape)
        lse = q.new_empty(lse_shape if options[-1] else (0,), dtype=lse_dtype(q.dtype))
        if kernels.fake_state is None:
            return out, lse, q.new_empty(0, dtype=torch.int64)
        return out, lse, kernels.fake_state(q, options[0])

    return fake


def _complete(args: Sequence[Any], varlen: bool) -> tuple[Any, ...]:
    """The dispatcher drops trailing arguments that equal their defaults; put them back."""
    missing = _LENGTH[varlen] - len(args)
    return (*args, *_FORWARD_DEFAULTS[varlen][len(_FORWARD_DEFAULTS[varlen]) - missing :])


def _define_backward(base: str, kernels: Kernels, varlen: bool) -> None:
    name = f"{base}_backward"
    backward = kernels.backward
    _library.define(f"{name}.{VERSION}{BACKWARD_SCHEMAS[varlen]}", tags=(torch.Tag.pt2_compliant_tag, *kernels.tags))

    def run(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if backward is None:
            raise NotImplementedError(f"backend '{base}' is inference-only: it has no backward kernel")
        dq, dk, dv, dmask = backward(*args)
        if dmask is None:
            dmask = dq.new_empty(0)
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), dmask.contiguous()

    def fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any) -> tuple[Tensor, ...]:
        dmask = mask.new_empty(mask.shape) if rest[-1] else q.new_empty(0)
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask

    qualified = f"{NAMESPACE}::{name}.{VERSION}"
    _library.impl(f"{name}.{VERSION}", _without_autocast(run), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if kernels.inlined:
        _inline(qualified, _without_autocast(run))
    flops.register(name, varlen, backward=True)

    forward = getattr(getattr(torch.ops.compiled_attn, base), VERSION)
    operator = getattr(getattr(torch.ops.compiled_attn, name), VERSION)
    structure, length = 3 + _STRUCTURE[varlen], _LENGTH[varlen]
    for one, rule in ((forward, transforms.forward_rule), (operator, transforms.backward_rule)):
        mapped = rule(one, base, varlen, _STRUCTURE[varlen])
        _library.impl(f"{one._opname}.{VERSION}", mapped, "FuncTorchBatched", with_keyset=True)

    no_backward = None
    if backward is None:
        no_backward = f"backend '{base}' is inference-only: call it under torch.no_grad()"

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Result:  # type: ignore[override]
            if len(args) < length:
                args = _complete(args, varlen)
            asked = args[-1]
            if not asked and backward is not None:
                args = (*args[:-1], True)  # raw calls, and torch.func, whose tensors do not say what they want
            out, lse, state = transforms.below_autograd(forward, keyset, args)
            given = lse if asked or backward is None else lse.new_empty(0)
            ctx.mark_non_differentiable(given, state)
            ctx.set_materialize_grads(False)
            # the structure is tensors or None, and, packed, the two max_seqlen behind them
            ctx.save_for_backward(*args[:5], out, lse, state)
            ctx.lengths = args[5:structure]
            ctx.options = args[structure:-1]
            return out, given, state

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:  # type: ignore[override]
            if no_backward is not None:
                raise RuntimeError(no_backward)
            wanted = ctx.needs_input_grad  # of the keyset, then of the arguments that were given
            gradients: list[Any] = [None] * (1 + length)
            if grad_out is None:
                return tuple(gradients[: len(wanted)])
            *tensors, out, lse, state = ctx.saved_tensors
            mask_gradient = not varlen and len(wanted) > 4 and wanted[4]
            gradients[1:5] = operator(grad_out, *tensors, *ctx.lengths, out, lse, state, *ctx.options, mask_gradient)
            if not mask_gradient:
                gradients[4] = None
            return tuple(gradients[: len(wanted)])

    class NoDoubleBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *args: Any) -> Any:  # type: ignore[override]
            return transforms.below_autograd(operator, keyset, args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise NotImplementedError(
                f"compiled_attn::{base} has no double backward; use backend '_native_math' for second derivatives"
            )

    for one, function, title in ((forward, Formula, name), (operator, NoDoubleBackward, f"{name}_backward")):
        shown = function._backward_cls  # type: ignore[attr-defined]  # by grad_fn, the profiler and autograd's errors
        shown.__name__ = shown.__qualname__ = title
        _library.impl(f"{one._opname}.{VERSION}", _autograd_kernel(one, function), "Autograd", with_keyset=True)


def _autograd_kernel(operator: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    # torch.library.register_autograd does the same in 60 us a call that wants a gradient, where this takes 25
    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return transforms.apply(function, keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def _inline(qualified: str, run: Callable[..., Any]) -> None:
    """Let AOTAutograd trace ``run`` in place of the operator, as it does for ``torch.library.triton_op``.

    torch.export keeps the operator: it sets the same switch for those. (triton_op itself makes the fake from the
    kernel's own function, launches through a context manager, and takes no schema.)
    """

    def rule(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch._functorch.config.decompose_custom_triton_ops:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        if any(issubclass(kind, Tensor) and kind not in _TRACED for kind in types):
            return NotImplemented  # a subclass with rules of its own
        with mode:
            return run(*args, **kwargs)

    torch.library.register_torch_dispatch(qualified, FunctionalTensorMode, rule, lib=_library)
