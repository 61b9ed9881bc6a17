"""Our operators under ``torch.func``: autograd at its levels, and ``vmap`` as one call with more batches or heads.

Without this ``torch.func.grad`` stops at the ``autograd.Function`` that an operator is made of, and ``vmap`` makes one
call after the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function


def active() -> bool:
    """Whether a transform of ``torch.func`` is in force."""
    return torch._C._are_functorch_transforms_active()


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)`` in an operator's Autograd kernel.

    Under a transform that kernel runs for one level of ``torch.func.grad``, as the formulas of aten do. The ordinary
    ``apply`` would begin at the outermost level again, and refuses functions that were not written for that.
    """
    if not active():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    with enable_single_level_autograd_function():
        return _single_level(function).apply(*args)


@functools.cache
def _single_level(function: type[torch.autograd.Function]) -> Any:
    """The same function as one that torch.func takes at one level; it makes those for its own use."""
    methods = {"forward": staticmethod(function.forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.function._SingleLevelFunction,), methods)


def below_autograd(operator: torch._ops.OpOverload, keyset: Any, args: tuple[Any, ...]) -> Any:
    """``operator`` under its Autograd kernel: the kernel itself, or the next level of a transform."""
    keyset = keyset & torch._C._after_autograd_keyset
    if not active():
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset, *args)
    # Function.forward has grad mode off, and the gradients of outer levels would silently miss what runs here
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset, *args)


class _Fold:
    """A mapped dimension as a part of the batch; packed, of the heads, as cu_seqlens then stay what they are."""

    def __init__(self, base: str, varlen: bool, info: Any) -> None:
        self.base, self.varlen, self.size = base, varlen, info.batch_size
        self.axis = 1 if varlen else 0  # of q, k, v, out and their gradients
        self.batch = 0  # of one example; set by inputs()

    def into(self, tensor: Tensor, dim: int | None, axis: int) -> Tensor:
        """``tensor`` with the mapped dimension ``dim`` (None: the same for all examples) folded into ``axis``."""
        if dim is None:
            tensor = tensor.unsqueeze(axis).expand(*tensor.shape[:axis], self.size, *tensor.shape[axis:])
        else:
            tensor = tensor.movedim(dim, axis)
        return tensor.flatten(axis, axis + 1)

    def out_of(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.unflatten(axis, (self.size, tensor.shape[axis] // self.size))

    def inputs(self, tensors: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> list[Tensor]:
        folded = [self.into(tensor, dim, self.axis) for tensor, dim in zip(tensors, dims, strict=True)]
        self.batch = folded[0].shape[self.axis] // self.size
        return folded

    def structure(self, values: tuple[Any, ...], dims: tuple[int | None, ...], whole: bool = False) -> list[Any]:
        """mask and key_padding folded (``whole``: also where a batch of 1 broadcasts); packed lengths as they are."""
        if self.varlen:
            if any(dim is not None for dim in dims):
                raise NotImplementedError(
                    f"compiled_attn::{self.base} cannot map cu_seqlens with torch.vmap; pack all examples into one call"
                )
            return list(values)
        folded = []
        for value, dim in zip(values, dims, strict=True):
            if value is not None and not (dim is None and value.dim() == 4 and value.shape[0] == 1 and not whole):
                examples = value.expand(self.size, *value.shape) if dim is None else value.movedim(dim, 0)
                value = examples.expand(self.size, self.batch, *examples.shape[2:]).flatten(0, 1)
            folded.append(value)
        return folded

    def refuse_dropout(self, dropout_p: float) -> None:
        if dropout_p > 0.0:
            raise NotImplementedError(
                f"compiled_attn::{self.base} has no dropout under torch.vmap (dropout_p={dropout_p}); "
                "put the mapped dimension into the batch"
            )


def forward_rule(operator: torch._ops.OpOverload, base: str, varlen: bool, structure: int) -> Callable[..., Any]:
    """The ``vmap`` rule of a forward operator with ``structure`` arguments between v and the options."""
    first = 3 + structure

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        fold = _Fold(base, varlen, info)
        # the dispatcher drops trailing arguments that equal their defaults
        dropped = tuple(argument.default_value for argument in operator._schema.arguments[len(args) :])
        args, in_dims = args + dropped, in_dims + (None,) * len(dropped)
        *options, return_lse = args[first:]
        fold.refuse_dropout(options[0])
        inputs = fold.inputs(args[:3], in_dims[:3])
        middle = fold.structure(args[3:first], in_dims[3:first])
        out, lse, state = operator(*inputs, *middle, *options, return_lse)
        if not return_lse:
            return (fold.out_of(out, fold.axis), lse, state), (fold.axis, None, None)
        return (fold.out_of(out, fold.axis), fold.out_of(lse, 0), state), (fold.axis, 0, None)

    return _registered(operator, rule)


def backward_rule(operator: torch._ops.OpOverload, base: str, varlen: bool, structure: int) -> Callable[..., Any]:
    """The ``vmap`` rule of a backward operator, as that of ``torch.func.jacrev`` needs it."""
    first = 4 + structure

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        fold = _Fold(base, varlen, info)
        out, lse, state, *options, mask_gradient = args[first:]
        fold.refuse_dropout(options[0])
        grad_out, q, k, v, out = fold.inputs((*args[:4], out), (*in_dims[:4], in_dims[first]))
        lse = fold.into(lse, in_dims[first + 1], 0)
        middle = fold.structure(args[4:first], in_dims[4:first], whole=mask_gradient)
        *gradients, dmask = operator(grad_out, q, k, v, *middle, out, lse, state, *options, mask_gradient)
        gradients = [fold.out_of(one, fold.axis) for one in gradients]
        if not mask_gradient:
            return (*gradients, dmask), (fold.axis, fold.axis, fold.axis, None)
        dmask = fold.out_of(dmask, 0)
        if args[4].shape[0 if in_dims[4] != 0 else 1] == 1 and fold.batch > 1:  # one mask for the whole batch
            dmask = dmask.sum(1, keepdim=True)
        return (*gradients, dmask), (fold.axis, fold.axis, fold.axis, 0)

    return _registered(operator, rule)


def _registered(operator: torch._ops.OpOverload, rule: Callable[..., Any]) -> Callable[..., Any]:
    # what torch.library.register_vmap makes, which takes no overload of a name that has several
    def kernel(keyset: Any, *args: Any) -> Any:
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        interpreter: Any = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(interpreter, rule, operator, *args)

    return kernel
