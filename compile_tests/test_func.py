"""torch.func over attention: functional_call, grad, vjp, jacrev and vmap as without it; what cannot be is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import stand_in  # noqa: F401  registers the backend
import torch
from graphs import Counter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_attn
from compiled_attn import attention, attention_with_lse, varlen_attention, varlen_attention_with_lse

# opaque, inlined by compilers, looked up when it runs; and one of aten's operators, which has its own rules
OURS = ("stand_in", "triton", "switch")
ALL = (*OURS, "_native_math")
EXAMPLES, BATCH, LENGTH, HEADS, WIDTH = 3, 2, 5, 4, 8
SHAPE = (BATCH, LENGTH, HEADS, WIDTH)


class Seen(TorchDispatchMode):
    """The shapes of the queries of our operators, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "compiled_attn":
            query = args[1] if func._opname.endswith("_backward") else args[0]
            self.calls.append((func._opname, tuple(query.shape)))
        return func(*args, **(kwargs or {}))


def inputs(*shape: int, gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*shape, requires_grad=gradient) for _ in range(3))  # type: ignore[return-value]


def call(name: str, **options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v, *rest: attention(q, k, v, *rest, backend=name, **options)


def loss(name: str, **options: Any) -> Callable[..., Tensor]:
    return lambda *given: call(name, **options)(*given).sin().sum()


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("name", ALL)
def test_grad_and_vjp_are_autograds(name: str) -> None:
    given = inputs(*SHAPE, gradient=True)
    expected = torch.autograd.grad(loss(name)(*given), given)
    plain = tuple(one.detach() for one in given)
    close(torch.func.grad(loss(name), argnums=(0, 1, 2))(*plain), expected)
    out, pull = torch.func.vjp(call(name), *plain)
    close(pull(out.cos()), expected)


@pytest.mark.parametrize("name", ALL)
def test_grad_of_grad_is_right_or_refused(name: str) -> None:
    """The outer level must see what the inner one did: without grad mode below, it got zeros and said nothing."""
    q, k, v = inputs(*SHAPE)

    def norm(x: Tensor, backend: str) -> Tensor:
        return torch.func.grad(lambda y: loss(backend)(y, k, v))(x).square().sum()

    if name == "_native_math":
        numeric = torch.randn_like(q)
        with torch.no_grad():
            step = 1e-2
            slope = (norm(q + step * numeric, name) - norm(q - step * numeric, name)) / (2 * step)
        torch.testing.assert_close((torch.func.grad(norm)(q, name) * numeric).sum(), slope, rtol=2e-2, atol=2e-2)
        return
    with pytest.raises(NotImplementedError, match=f"{name} has no double backward; use backend '_native_math'"):
        torch.func.grad(norm)(q, name)


@pytest.mark.parametrize("name", OURS)
def test_double_backward_of_autograd_is_refused_as_before(name: str) -> None:
    given = inputs(*SHAPE, gradient=True)
    (first,) = torch.autograd.grad(loss(name)(*given), given[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="has no double backward"):
        first.sum().backward()


@pytest.mark.parametrize("name", ALL)
def test_a_level_outside_of_the_one_that_is_differentiated(name: str) -> None:
    """grad(f) where f takes a gradient with regard to something else: both levels record."""
    q, k, v = inputs(*SHAPE)

    def outer(x: Tensor) -> Tensor:
        inner = torch.func.grad(lambda scale: (scale * call(name)(x, k, v)).sum())(torch.ones(()))
        return inner.sin()

    wanted = q.clone().requires_grad_()
    close(torch.func.grad(outer)(q), torch.autograd.grad(call(name)(wanted, k, v).sum().sin(), wanted)[0])


@pytest.mark.parametrize("name", OURS)
def test_forward_mode_is_refused(name: str) -> None:
    q, k, v = inputs(*SHAPE)
    with pytest.raises(NotImplementedError, match=f"{name} has no forward-mode derivative.*use backend '_native_math'"):
        torch.func.jvp(lambda x: call(name)(x, k, v), (q,), (k,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.hessian(lambda x: loss(name)(x, k, v))(q)


def test_plain_math_has_second_and_forward_derivatives() -> None:
    """What the refusals name."""
    q, k, v = inputs(1, 2, 1, 2)

    def total(x: Tensor) -> Tensor:
        return loss("_native_math")(x, k, v)

    torch.testing.assert_close(
        torch.func.hessian(total)(q), torch.autograd.functional.hessian(total, q), rtol=1e-4, atol=1e-5
    )
    leaf = q.clone().requires_grad_()
    _, slope = torch.func.jvp(total, (q,), (k,))
    close(slope, (torch.autograd.grad(total(leaf), leaf)[0] * k).sum())


@pytest.mark.parametrize("name", OURS)
def test_an_inference_backend_says_so(name: str) -> None:
    limits = compiled_attn.Limits(("cpu",), (torch.float32,), gradient=False)
    backend = f"tmp_inference_{name}"
    if backend not in compiled_attn.list_backends():
        kernels = compiled_attn.Kernels(forward=lambda q, k, v, *rest: (v * 2.0, None, None))
        compiled_attn.register_backend(compiled_attn.Backend(backend, "2 times value", (limits,), kernels))
    with pytest.raises((NotImplementedError, RuntimeError), match="is inference-only"):
        torch.func.grad(loss(backend))(*inputs(*SHAPE))


# ------------------------------------------------------------------------------------------------------ vmap


def looped(function: Callable[..., Any], in_dims: tuple[int | None, ...], given: tuple[Any, ...]) -> Any:
    results = [
        function(*(one if dim is None else one.select(dim, number) for one, dim in zip(given, in_dims, strict=True)))
        for number in range(EXAMPLES)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def mapped(dim: int | None, *shape: int) -> Tensor:
    return torch.randn(shape) if dim is None else torch.randn(EXAMPLES, *shape).movedim(0, dim)


def without_fallback(function: Callable[[], Any]) -> Any:
    """PyTorch warns where it maps by calling once for each example."""
    torch._C._debug_only_display_vmap_fallback_warnings(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (2, 0, 4), (0, None, None), (None, 1, 0), (None, None, 3)], ids=str)
def test_vmap_is_one_call_over_a_larger_batch(name: str, in_dims: tuple[int | None, ...]) -> None:
    given = tuple(mapped(dim, *SHAPE) for dim in in_dims)

    def both(*qkv: Tensor) -> Any:
        return attention_with_lse(*qkv, is_causal=True, scale=0.3, backend=name)

    with Seen() as seen:
        actual = without_fallback(lambda: torch.vmap(both, in_dims)(*given))
    close(actual, looped(both, in_dims, given))
    if name in OURS:
        assert seen.calls == [(name, (EXAMPLES * BATCH, *SHAPE[1:]))]


@pytest.mark.parametrize("name", ["triton", "switch", "_native_math"])
@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_vmap_over_masks(name: str, kind: str, dim: int | None, batch: int) -> None:
    shape = (BATCH, LENGTH) if kind == "padding" else (batch, 1, LENGTH, LENGTH)
    mask = mapped(dim, *shape)
    if kind != "float":
        mask = mask > -0.5
    option = "key_padding_mask" if kind == "padding" else "attn_mask"

    def masked(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return attention(q, k, v, **{option: given}, backend=name)

    given = (*(mapped(0, *SHAPE) for _ in range(3)), mask)
    close(torch.vmap(masked, (0, 0, 0, dim))(*given), looped(masked, (0, 0, 0, dim), given))


@pytest.mark.parametrize("name", OURS)
def test_vmap_over_grouped_heads_and_other_lengths(name: str) -> None:
    given = (mapped(0, *SHAPE), *(mapped(1, BATCH, 7, 2, WIDTH) for _ in range(2)))
    function = call(name, enable_gqa=True)
    close(torch.vmap(function, (0, 1, 1))(*given), looped(function, (0, 1, 1), given))


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_outside_of_vmap(name: str) -> None:
    """Inside, no tensor says that it wants a gradient: the rule asks what vmap wrapped, and saves lse."""
    q, k, v = (mapped(0, *SHAPE) for _ in range(3))

    def total(x: Tensor, y: Tensor) -> Tensor:
        return torch.vmap(call(name), (0, 0, 0))(x, y, v).sin().sum()

    leaves = tuple(one.clone().requires_grad_() for one in (q, k))
    separate = sum(loss(name)(x, y, z) for x, y, z in zip(*leaves, v, strict=True))
    expected = torch.autograd.grad(separate, leaves)
    close(torch.func.grad(total, (0, 1))(q, k), expected)
    close(torch.autograd.grad(total(*leaves), leaves), expected)
    nested = torch.vmap(torch.vmap(call(name)))
    many = tuple(one.unsqueeze(0).expand(2, *one.shape).clone().requires_grad_() for one in (q, k, v))
    grads = torch.autograd.grad(nested(*many).sin().sum(), many[:2])
    close(grads, tuple(one.unsqueeze(0).expand(2, *one.shape) for one in expected))


@pytest.mark.parametrize("name", ALL)
def test_gradients_for_each_example(name: str) -> None:
    """vmap(grad(f)): the backward operator is mapped too, in one call."""
    given = tuple(mapped(0, *SHAPE) for _ in range(3))
    per_example = torch.func.grad(loss(name), (0, 1, 2))
    with Seen() as seen:
        actual = without_fallback(lambda: torch.vmap(per_example)(*given))
    close(actual, looped(per_example, (0, 0, 0), given))
    if name in OURS:
        folded = (EXAMPLES * BATCH, *SHAPE[1:])
        assert seen.calls == [(name, folded), (f"{name}_backward", folded)]


@pytest.mark.parametrize("name", ["switch", "_native_math"])
@pytest.mark.parametrize("dim", [None, 0, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (BATCH, HEADS, LENGTH), (1, HEADS, 1), (BATCH, 1, LENGTH)], ids=str)
def test_gradients_of_a_mask_for_each_example(name: str, dim: int | None, shape: tuple[int, ...]) -> None:
    given = (*(mapped(0, *SHAPE) for _ in range(3)), mapped(dim, *shape, LENGTH))
    per_example = torch.func.grad(loss(name), (0, 3))
    dims = (0, 0, 0, dim)
    close(torch.vmap(per_example, dims)(*given), looped(per_example, dims, given))


@pytest.mark.parametrize("name", ALL)
def test_jacobians(name: str) -> None:
    q, k, v = inputs(*SHAPE)

    def rows(x: Tensor) -> Tensor:
        return call(name)(x, k, v).sum((1, 2, 3))

    wanted = q.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(rows(wanted)[number], wanted)[0] for number in range(BATCH)])
    close(torch.func.jacrev(rows)(q), expected)


LENGTHS = torch.tensor([0, 2, 7], dtype=torch.int32)  # of 9 packed rows: two are behind the last sequence


@pytest.mark.parametrize("name", OURS[1:])
def test_packed_sequences_are_mapped_over_heads(name: str) -> None:
    dims = (0, 2, 0)
    given = (mapped(0, 9, HEADS, WIDTH), mapped(2, 9, 2, WIDTH), mapped(0, 9, 2, WIDTH))

    def packed(*qkv: Tensor) -> Any:
        return varlen_attention_with_lse(*qkv, LENGTHS, LENGTHS, is_causal=True, enable_gqa=True, backend=name)

    with Seen() as seen:
        actual = torch.vmap(packed, dims)(*given)
    close(actual, looped(packed, dims, given))
    assert [shape for _, shape in seen.calls] == [(9, EXAMPLES * HEADS, WIDTH)]

    per_example = torch.func.grad(lambda *qkv: packed(*qkv)[0].sin().sum(), (0, 1, 2))
    close(torch.vmap(per_example, dims)(*given), looped(per_example, dims, given))


def test_what_vmap_cannot_do_is_refused() -> None:
    rows = mapped(0, 9, HEADS, WIDTH)
    with pytest.raises(NotImplementedError, match="cannot map cu_seqlens"):
        torch.vmap(lambda x, starts: varlen_attention(x, x, x, starts, starts, backend="triton"))(
            rows, LENGTHS.expand(EXAMPLES, 3)
        )
    limits = compiled_attn.Limits(("cpu",), (torch.float32,), dropout=True)
    kernels = compiled_attn.Kernels(
        lambda q, k, v, *rest: (v * 2.0, None, None), lambda grad, *rest: (grad, grad, grad, None), random=True
    )
    if "tmp_dropout" not in compiled_attn.list_backends():
        compiled_attn.register_backend(compiled_attn.Backend("tmp_dropout", "2 times value", (limits,), kernels))
    for randomness in ("error", "same", "different"):
        with pytest.raises(NotImplementedError, match=r"tmp_dropout has no dropout under torch.vmap \(dropout_p=0.5\)"):
            torch.vmap(call("tmp_dropout", dropout_p=0.5), randomness=randomness)(*(mapped(0, *SHAPE) for _ in "qkv"))


# ------------------------------------------------------------------------- compiled, functional_call, ensembles


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, WIDTH)) for part in self.qkv(x).chunk(3, -1))
        return attention(q, k, v, is_causal=True).flatten(-2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap of grad", "grad of vmap"])
def test_compiled_transforms(name: str, transform: str) -> None:
    given = tuple(mapped(0, *SHAPE) for _ in range(3))
    function: Callable[..., Any] = {
        "grad": lambda *qkv: torch.func.grad(loss(name), (0, 1, 2))(*(one[0] for one in qkv)),
        "vmap": torch.vmap(call(name)),
        "vmap of grad": torch.vmap(torch.func.grad(loss(name), (0, 1, 2))),
        "grad of vmap": torch.func.grad(lambda *qkv: torch.vmap(call(name))(*qkv).sin().sum(), (0, 1, 2)),
    }[transform]
    counter = Counter("aot_eager")
    close(torch.compile(function, backend=counter, fullgraph=True)(*given), function(*given))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ALL)
def test_functional_call_and_ensembles(name: str, compiled: bool) -> None:
    """functional_call keeps pins; a stack of models is one vmap over their weights."""
    models = [Block() for _ in range(EXAMPLES)]
    for model in models:
        compiled_attn.set_attention_backend(model, name)
    x = torch.randn(BATCH, LENGTH, HEADS * WIDTH)
    stacked, _ = torch.func.stack_module_state(models)

    def one(parameters: Any, given: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], parameters, (given,))

    def run(parameters: Any, given: Tensor) -> Tensor:
        return torch.vmap(one, (0, None))(parameters, given)

    counter = Counter("aot_eager")
    first = {key: value[0].detach() for key, value in stacked.items()}
    call = torch.compile(one, backend=counter, fullgraph=True) if compiled else one
    close(call(first, x), models[0](x))
    if compiled:
        assert counter.backends() == [[name]]
        run = torch.compile(run, backend="aot_eager", fullgraph=True)
    close(run(stacked, x), torch.stack([model(x) for model in models]))
    torch.autograd.grad(run(stacked, x).sum(), list(stacked.values()))
