"""``switch``: one graph for every backend, the right kernel each time, and never a silent guess."""

from __future__ import annotations

import threading

import pytest
import torch
from graphs import Counter
from probes import PROBES, factor
from torch.utils.checkpoint import checkpoint

import compiled_attn
from compiled_attn import attention, attention_backend

TWO, THREE, FOUR = PROBES[1:4]
X = torch.ones(1, 4, 2, 8)
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def call_switch(x):
    return attention(x, x, x, backend="switch") * 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_graph_for_all(backend, training):
    counter = Counter(backend)
    call = torch.compile(call_switch, fullgraph=True, backend=counter)
    x = X.clone().requires_grad_(training)
    for _ in range(2):
        for name in (*PROBES, "native", "_native_math", "_native_flash", "stand_in"):
            with attention_backend(name):
                out = call(x)
                torch.testing.assert_close(out, call_switch(x))
                torch.testing.assert_close(out.detach(), torch.full_like(X, factor(name) if name in PROBES else 1.0))
            if training and name in PROBES:
                (gradient,) = torch.autograd.grad(out.sum(), x)
                torch.testing.assert_close(gradient, torch.full_like(X, factor(name)))
    assert counter.frame_count == 1
    assert counter.operators() == [["switch"]]


def test_defaults_reach_it_too():
    counter = Counter()
    call = torch.compile(call_switch, fullgraph=True, backend=counter)
    for name in (TWO, THREE, TWO):
        compiled_attn.set_default_backend(name)
        assert float(call(X)[0, 0, 0, 0]) == factor(name)
    compiled_attn.set_default_backend("switch")
    assert float(call(X)[0, 0, 0, 0]) == 1.0
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["context", "pin", "default"])
def test_every_way_to_choose_switch(how):
    class Attend(torch.nn.Module):
        def forward(self, x):
            return attention(x, x, x)

    model, counter = Attend(), Counter()
    call = torch.compile(model, fullgraph=True, backend=counter)
    if how == "pin":
        compiled_attn.set_attention_backend(model, "switch")
    if how == "default":
        compiled_attn.set_default_backend("switch")
    for name in (TWO, THREE, FOUR, TWO):
        if how == "context":
            with attention_backend(name), attention_backend("switch"):
                out = call(X)
        elif how == "pin":
            with attention_backend(name):
                out = call(X)
        else:
            # the operator was compiled under the default; contexts would compile other graphs
            out = call(X)
            assert float(out[0, 0, 0, 0]) == 1.0
            continue
        assert float(out[0, 0, 0, 0]) == factor(name)
    assert counter.operators() == [["switch"]]


@pytest.mark.parametrize("where", ["same_thread", "other_thread"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_is_that_of_the_forward(backend, where):
    """Under another context, and in a thread that never had one."""
    call = torch.compile(call_switch, fullgraph=True, backend=backend)
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        first = call(x)
    with attention_backend(FOUR):
        second = call(x)

    def back():
        with attention_backend(TWO):
            (first.sum() + 10 * second.sum()).backward()

    if where == "same_thread":
        back()
    else:
        thread = threading.Thread(target=back)
        thread.start()
        thread.join()
    torch.testing.assert_close(x.grad, torch.full_like(X, 3.0 + 40.0))


def test_packed_sequences():
    x = torch.ones(4, 2, 8, requires_grad=True)
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    counter = Counter("aot_eager")
    call = torch.compile(
        lambda t: compiled_attn.varlen_attention(t, t, t, lengths, lengths, backend="switch"),
        fullgraph=True,
        backend=counter,
    )
    for name in (TWO, THREE, "native", "_native_math", TWO):
        with attention_backend(name):
            out = call(x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        times = factor(name) if name in PROBES else 1.0
        torch.testing.assert_close(out.detach(), torch.full_like(x, times))
        if name in PROBES:
            torch.testing.assert_close(gradient, torch.full_like(x, times))
    assert counter.frame_count == 1


def test_a_context_inside_the_compiled_function_is_refused():
    """Its Python is gone when switch runs: silently the outer backend would run."""

    def function(x):
        with attention_backend(TWO):
            return attention(x, x, x, backend="switch")

    with pytest.raises(Exception, match="cannot see a context entered inside the compiled"):
        torch.compile(function, fullgraph=True, backend="eager")(X)


def test_refusals_come_at_run_time_with_all_reasons():
    call = torch.compile(
        lambda x, m: attention(x, x, x, m, window_size=(1, 1), backend="switch"), fullgraph=True, backend="aot_eager"
    )
    mask = torch.zeros(1, 1, 4, 4)
    call(X, mask)
    with attention_backend("stand_in"), pytest.raises(NotImplementedError, match="active when 'switch' ran") as refused:
        call(X, mask)
    for reason in ("has no sliding window", "not a float mask"):
        assert reason in str(refused.value)
    call(X, mask)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_recomputation_raises_without_the_context_fn(use_reentrant):
    def function(x):
        return checkpoint(call_switch, x, use_reentrant=use_reentrant)

    call = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        out = call(x)
    with attention_backend(TWO), pytest.raises(RuntimeError, match="checkpoint_context_fn"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_recomputation_is_right_with_the_context_fn(backend):
    def block(x):
        return attention(x, x, x.sin(), backend="switch").cos()

    def function(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=compiled_attn.checkpoint_context_fn)

    call = torch.compile(function, fullgraph=True, backend=backend)
    for name in (THREE, TWO):
        x = X.clone().requires_grad_()
        with attention_backend(name):
            out = call(x)
        out.sum().backward()
        right = X.clone().requires_grad_()
        (factor(name) * right.sin()).cos().sum().backward()
        torch.testing.assert_close(x.grad, right.grad)


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_an_activation_memory_budget_is_right_or_raises(budget):
    """The partitioner may recompute what nobody marked; switch must not guess."""

    def block(x):
        return attention(x, x, x.sin(), backend="switch").cos()

    x = X.clone().requires_grad_()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        call = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
        with attention_backend(THREE):
            out = call(x)
        with attention_backend(TWO):
            try:
                out.sum().backward()
            except RuntimeError as refused:
                assert "checkpoint_context_fn" in str(refused)
                return
    right = X.clone().requires_grad_()
    (3.0 * right.sin()).cos().sum().backward()
    torch.testing.assert_close(x.grad, right.grad)


def test_it_is_tagged_for_cuda_graphs():
    """Untagged, a captured kernel was replayed for every backend (H100): stale, silently."""
    for name in ("switch", "switch_backward", "switch_varlen", "switch_varlen_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.compiled_attn, name).v1.tags


@pytest.mark.gpu
def test_capturing_it_raises():
    x = torch.randn(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
    attention(x, x, x, backend="switch")
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="CUDA graph is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attention(x, x, x, backend="switch")


@pytest.mark.gpu
@pytest.mark.slow
def test_reduce_overhead_runs_the_backend_of_each_call():
    x = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    call = torch.compile(lambda t: attention(t, t, t, backend="switch") * 2, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            for name in (*PROBES[1:4], "_native_cudnn", "_native_flash"):
                with attention_backend(name):
                    torch.testing.assert_close(call(x).clone(), call_switch(x) * 2)


class Packed(torch.nn.Module):
    def forward(self, x, starts, others):
        return compiled_attn.varlen_attention(x, x, x, starts, starts if others is None else others, is_causal=True)


def equal_lengths_only() -> str:
    name = "tmp_equal_lengths"
    if name not in compiled_attn.list_backends():
        limits = (compiled_attn.Limits(("cpu",), (torch.float32,), alignments=()),)
        kernels = compiled_attn.backend_info(TWO).varlen
        compiled_attn.register_backend(
            compiled_attn.Backend(name, "for equal lengths", varlen_limits=limits, varlen=kernels)
        )
    return name


@pytest.mark.parametrize("how", ["eager", "compiled", "retargeted"])
def test_equal_lengths_are_known_by_their_tensor_behind_the_operator_too(how):
    name, x, starts = equal_lengths_only(), X[0], torch.tensor([0, 3, 4], dtype=torch.int32)

    def run(*lengths):
        if how == "retargeted":
            with attention_backend("_native_math"):
                program = torch.export.export(Packed(), (x, *lengths))
            return compiled_attn.export.retarget(program, name).module()(x, *lengths)
        model = Packed()
        compiled_attn.set_attention_backend(model, "switch")
        with attention_backend(name):
            return (torch.compile(model, backend="aot_eager", fullgraph=True) if how == "compiled" else model)(
                x, *lengths
            )

    for _ in range(2):  # what was served says nothing of what was not
        torch.testing.assert_close(run(starts, None), torch.full_like(x, 2.0))
        with pytest.raises(NotImplementedError, match="pass one and the same tensor as cu_seqlens_q and cu_seqlens_k"):
            run(starts, starts.clone())
