"""What is silently stale or wrong elsewhere: each found in a trial of torch.compile, each right or an error here."""

from __future__ import annotations

import threading

import pytest
import torch
from graphs import Counter
from probes import PROBES
from torch._inductor.utils import run_and_get_code

import compiled_attn
from compiled_attn import attention, attention_backend, registry
from compiled_attn.operators import Kernels
from compiled_attn.spec import Limits

TWO, THREE = PROBES[1:3]
X = torch.randn(1, 16, 2, 16)


def test_gradients_of_a_backend_registered_after_others_were_traced():
    """A formula registered after an operator was traced once is ignored: ours are part of the definition."""
    torch.compile(lambda x: attention(x, x, x, backend=TWO), fullgraph=True, backend="aot_eager")(X)

    def forward(q, k, v, *rest):
        return v * 7.0, q.new_zeros(q.shape[0], q.shape[2], q.shape[1]), None

    def backward(grad, q, k, v, *rest):
        return torch.zeros_like(q), torch.zeros_like(k), grad * 7.0, None

    limits = (Limits(("cpu",), (torch.float32,)),)
    compiled_attn.register_backend(
        compiled_attn.Backend("tmp_after_tracing", "7 times value", limits, Kernels(forward, backward))
    )
    x = X.clone().requires_grad_()
    call = torch.compile(lambda v: attention(X, X, v, backend="tmp_after_tracing"), fullgraph=True, backend="aot_eager")
    call(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(X, 7.0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["switch", "stand_in", "triton"])
def test_a_raw_operator_without_lse_has_its_gradient(name, compiled):
    """Backward needs lse, which nobody asked for: the formula does, and the caller still gets an empty one."""
    op = getattr(torch.ops.compiled_attn, name).v1
    x = X.clone().requires_grad_()

    def call(t):
        out, lse, _ = op(t, t, t)
        assert lse.shape == (0,)
        return out

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    (actual,) = torch.autograd.grad(run(x).sin().sum(), x)
    (expected,) = torch.autograd.grad(attention(x, x, x, backend="_native_math").sin().sum(), x)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["inference", "training"])
@pytest.mark.parametrize("mask", ["none", pytest.param("float", marks=pytest.mark.slow)])
def test_inductor_leaves_native_math_alone(training, mask):
    """Inductor rewrites matmul-softmax-matmul into the flash kernel, and a pin on math would be lost without a word."""
    bias = torch.randn(1, 1, 16, 16) if mask == "float" else None
    x = torch.randn(1, 16, 2, 16, requires_grad=training)

    def run(name):
        torch._dynamo.reset()
        call = torch.compile(lambda t: attention(t, t, t, bias, backend=name), fullgraph=True)

        def both():
            out = call(x)
            return torch.autograd.grad(out.sum(), x)[0] if training else out

        return run_and_get_code(both)

    result, codes = run("_native_math")
    assert codes
    assert not any("flash" in code for code in codes)
    _, flash_codes = run("_native_flash")
    assert any("flash" in code for code in flash_codes), "the test would not notice flash"
    expected = attention(x, x, x, bias, backend="_native_math")
    if training:
        (expected,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "stand_in", "switch"])
def test_compiled_function_transforms_are_right_or_refused(name, transform):
    tangent = torch.randn_like(X)

    def call(backend):
        def loss(x):
            return attention(x, x, x, backend=backend).sin().sum()

        if transform == "grad":
            return lambda x: torch.func.grad(loss)(x)
        return lambda x: torch.func.jvp(loss, (x,), (tangent,))[1]

    expected = call("_native_math")(X)
    try:
        actual = torch.compile(call(name), backend="aot_eager")(X)
    except (RuntimeError, NotImplementedError) as refused:
        assert str(refused)
        return
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_backward_outside_the_context_and_in_another_thread():
    """A static binding keeps its backward, wherever it runs."""
    call = torch.compile(lambda x: attention(X, X, x) * 1.0, fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        out = call(x)

    def back():
        with attention_backend(TWO):
            out.sum().backward()

    thread = threading.Thread(target=back)
    thread.start()
    thread.join()
    torch.testing.assert_close(x.grad, torch.full_like(X, 3.0))


def test_determinism_is_part_of_the_guards():
    counter = Counter()
    call = torch.compile(lambda x: attention(x, x, x, backend="stand_in"), fullgraph=True, backend=counter)
    call(X)
    torch.use_deterministic_algorithms(True)
    call(X)
    (node,) = [one for one in counter.graphs[-1].graph.nodes if "stand_in" in str(one.target)]
    assert True in node.args, "deterministic=True reaches the operator"


def test_the_fingerprint_is_in_the_key_of_the_compile_caches():
    config = torch.compiler.config
    assert "compiled_attn=" in config.cache_key_tag
    before = config.cache_key_tag
    try:
        config.cache_key_tag = "mine"
        compiled_attn.compile(lambda x: x)
        assert config.cache_key_tag == ";".join(
            ["mine", *[one for one in before.split(";") if "compiled_attn=" in one]]
        )
        compiled_attn.compile(lambda x: x)
        assert config.cache_key_tag.count("compiled_attn=") == 1
    finally:
        config.cache_key_tag = before


def test_served_calls_are_forgotten_before_they_fill_the_memory():
    for length in range(registry._SERVED_AT_MOST // 100):
        x = torch.empty(1, length + 1, 1, 1)
        attention(x, x, x, backend=TWO)
    assert len(registry.served) <= registry._SERVED_AT_MOST
