"""Attention on DTensors: ``install()``, and each rank computes its own batches or heads.

Attention is independent over batch and heads, so that a call on DTensors is the same call on what each rank has:
forward, backward and lse need no communication. That holds for every backend, in eager and in compiled code. Keys and
values that are replicated where queries are sharded are sliced, partial sums are added up first, and so are the
gradients of a mask that several shards used.

What would need more than that raises: a sharded sequence or head_dim, shards of unequal size, dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_attn import dispatch, masks, registry

if not torch.distributed.is_available():
    raise ImportError("compiled_attn.integrations.dtensor needs a PyTorch that was built with torch.distributed")

from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

_DENSE = {0: "batch", 2: "heads"}
_PACKED = {1: "heads"}


def install() -> None:
    """Let :func:`compiled_attn.attention` and the other calls take DTensors, in this process.

    Query, key and value must be DTensors of one mesh; along each of its dimensions they are Shard(0) (batch), Shard(2)
    (heads; packed: Shard(1)), Replicate() or Partial(). Masks and cu_seqlens are DTensors or plain tensors that are the
    same on all ranks. ``out`` has the placements that query, key and value have in common, lse the same over its own
    dimensions. Calling it again changes nothing.

    >>> from compiled_attn.integrations import dtensor
    >>> dtensor.install()
    >>> dtensor.is_installed()
    True
    >>> dtensor.uninstall()
    """
    registry.distributed = (dense, varlen)


def uninstall() -> None:
    """Refuse DTensors again, as before :func:`install`."""
    registry.distributed = None


def is_installed() -> bool:
    """Whether attention calls take DTensors now."""
    return registry.distributed is not None


def dense(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, key_padding_mask: Any, dropout_p: float, *options: Any
) -> tuple[Tensor, Tensor]:
    """``dispatch._dense`` on the shards; takes what that takes."""
    mesh, placements = _common(query, key, value, _DENSE)
    _refuse_dropout(dropout_p)
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise NotImplementedError("a BlockMask cannot be divided among DTensors; give a tensor mask")
    mask, padding = _on_mesh(attn_mask, mesh), _on_mesh(key_padding_mask, mesh)
    if mask is not None or padding is not None:
        # by the sizes of the whole: on a shard of one sequence a mask may look like another kind
        mask, padding = masks.canonical(mask, padding, query, key)
    out, lse = dispatch._dense(
        _shard(query, mesh, placements),
        _shard(key, mesh, placements),
        _shard(value, mesh, placements),
        _shard_mask(mask, mesh, placements),
        _shard_mask(padding, mesh, placements),
        dropout_p,
        *options,
    )
    return _whole(out, lse, mesh, placements, heads=2, return_lse=options[-1])


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | None,
    max_seqlen_k: int | None, dropout_p: float, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``dispatch._varlen`` on the shards; takes what that takes."""
    mesh, placements = _common(query, key, value, _PACKED)
    _refuse_dropout(dropout_p)
    starts_q = _replicated(cu_seqlens_q, mesh)
    # one tensor for both says that the lengths are equal
    starts_k = starts_q if cu_seqlens_k is cu_seqlens_q else _replicated(cu_seqlens_k, mesh)
    out, lse = dispatch._varlen(
        _shard(query, mesh, placements),
        _shard(key, mesh, placements),
        _shard(value, mesh, placements),
        starts_q,
        starts_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        *options,
    )
    return _whole(out, lse, mesh, placements, heads=1, return_lse=options[-1])


def _whole(
    out: Tensor, lse: Tensor, mesh: Any, placements: list[Any], heads: int, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """The ranks' results as DTensors; lse has its heads one dimension before the ``heads`` of out."""
    whole = DTensor.from_local(out, mesh, placements, run_check=False)
    if not return_lse:
        return whole, whole
    of_lse = [Shard(heads - 1) if _dim(placement) == heads else placement for placement in placements]
    return whole, DTensor.from_local(lse, mesh, of_lse, run_check=False)


def _common(query: Any, key: Any, value: Any, allowed: dict[int, str]) -> tuple[Any, list[Any]]:
    """The mesh, and the placements that all three get: where one is sharded the others are as well."""
    given = (("query", query), ("key", key), ("value", value))
    for name, tensor in given:
        if not isinstance(tensor, DTensor):
            raise ValueError(f"query is a DTensor and {name} is not; distribute all three over one mesh")
        if tensor.device_mesh != query.device_mesh:
            raise ValueError(f"query and {name} are DTensors of different meshes; distribute all three over one")
    mesh = query.device_mesh
    placements: list[Any] = []
    ranks = dict.fromkeys(allowed, 1)
    for number in range(mesh.ndim):
        common = None
        for name, tensor in given:
            placement = tensor.placements[number]
            dim = _dim(placement)
            if dim is None:
                if not (placement.is_replicate() or placement.is_partial()):
                    raise NotImplementedError(f"{name} is placed {placement}; {_help(allowed)}")
                continue
            if dim not in allowed:
                raise NotImplementedError(
                    f"{name} is sharded over dimension {dim}, so over its "
                    f"{'head_dim' if dim == tensor.ndim - 1 else 'sequence'}, which would need communication between "
                    f"the ranks (context parallelism); {_help(allowed)}"
                )
            if common is not None and common != dim:
                raise ValueError(
                    f"query, key and value are sharded over {allowed[common]} and over {allowed[dim]} along one "
                    "dimension of the mesh; redistribute them to the same"
                )
            common = dim
        if common is None:
            placements.append(Replicate())
        else:
            placements.append(Shard(common))
            ranks[common] *= mesh.size(number)
    for dim, count in ranks.items():
        for name, tensor in given:
            if tensor.shape[dim] % count != 0:
                raise NotImplementedError(
                    f"{name} has {allowed[dim]}={tensor.shape[dim]} for {count} ranks; all shards must be of one size"
                )
    return mesh, placements


def _dim(placement: Any) -> int | None:
    """The dimension of a plain Shard; None for all else, also for the strided ones of FSDP with tensor parallelism."""
    # by name: in a trace of torch 2.9 the type of a placement is not the class
    return placement.dim if type(placement).__name__ == "Shard" else None


def _help(allowed: dict[int, str]) -> str:
    return "redistribute to " + " or ".join(f"Shard({dim}) ({what})" for dim, what in allowed.items())


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"attention on DTensors has no dropout (dropout_p={dropout_p}): each rank would draw its own numbers, so "
            "that shards repeat them and replicas differ"
        )


def _shard(tensor: Any, mesh: Any, placements: list[Any]) -> Tensor:
    return tensor.redistribute(mesh, placements).to_local()


def _on_mesh(tensor: Any, mesh: Any) -> Any:
    """A plain tensor as a DTensor that all ranks have."""
    if tensor is None or isinstance(tensor, DTensor):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _replicated(tensor: Any, mesh: Any) -> Tensor:
    return tensor.redistribute(mesh, [Replicate()] * mesh.ndim).to_local() if isinstance(tensor, DTensor) else tensor


def _shard_mask(mask: Any, mesh: Any, placements: list[Any]) -> Any:
    """This rank's part of a canonical mask (B|1, H|1, Sq|1, Sk) or key_padding (B, Sk); what broadcasts stays whole."""
    if mask is None:
        return None
    own: list[Any] = []
    gradient: list[Any] = []
    for placement in placements:
        dim = _dim(placement)
        axis = 1 if dim == 2 else dim
        if axis is None:
            own.append(Replicate())
            gradient.append(Replicate())
        elif (axis == 0 or mask.ndim == 4) and mask.shape[axis] != 1:
            own.append(Shard(axis))
            gradient.append(Shard(axis))
        else:
            own.append(Replicate())
            gradient.append(Partial())  # each rank has the gradient from its own batches or heads
    return mask.redistribute(mesh, own).to_local(grad_placements=gradient)
