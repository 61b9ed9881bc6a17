"""N backends are N graphs in the first round and none in the second; nothing else ever recompiles."""

from __future__ import annotations

import contextlib
import inspect
import threading

import pytest
import torch
from graphs import Counter
from matrix import names_on
from probes import PROBES, factor
from torch import nn

import compiled_attn
from compiled_attn import attention, attention_backend, reset_attention_backend, set_attention_backend

ONE, TWO, THREE = PROBES[:3]
X = torch.ones(1, 4, 2, 16)
OWN = [name for name in names_on("cpu") if name != "flex"]
MANY = [*OWN, *PROBES]


class Attend(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attend(), Attend()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compiled(model, counter, **options):
    return compiled_attn.compile(model, fullgraph=True, backend=counter, **options)


def factors(call) -> float:
    return float(call(X)[0, 0, 0, 0])


def test_there_are_more_backends_here_than_torch_compiles_by_default():
    # 8; where torch.compile has no keyword for it, compiled_attn.compile has raised the process's
    assert len(MANY) > min(8, torch._dynamo.config.recompile_limit)


def test_contexts_and_defaults_share_their_graphs():
    counter = Counter()
    call = compiled(Model(), counter)
    for round_number in range(2):
        for name in MANY:
            with attention_backend(name):
                call(X)
            if round_number == 0:
                assert counter.backends()[-1] == [name, name]
        assert counter.frame_count == len(MANY)
        for name in MANY:
            compiled_attn.set_default_backend(name)
            call(X)
        compiled_attn.set_default_backend("native")
        assert counter.frame_count == len(MANY)
    assert [names[0] for names in counter.backends()] == MANY


def test_defaults_first():
    counter = Counter()
    call = compiled(Model(), counter)
    for _ in range(2):
        for name in MANY:
            compiled_attn.set_default_backend(name)
            call(X)
        compiled_attn.set_default_backend("native")
        for name in MANY:
            with attention_backend(name), attention_backend(name):  # depth is no guard
                call(X)
        assert counter.frame_count == len(MANY)


def test_pins():
    counter, model = Counter(), Model()
    call = compiled(model, counter)
    for _ in range(2):
        for name in MANY:
            set_attention_backend(model, name)
            call(X)
        assert counter.frame_count == len(MANY)
    assert [names[0] for names in counter.backends()] == MANY
    set_attention_backend(model, TWO)
    for name in OWN:
        compiled_attn.set_default_backend(name)
        assert factors(call) == 4.0
        with attention_backend(THREE):
            assert factors(call) == 4.0
    assert counter.frame_count == len(MANY), "a pinned model does not see defaults and contexts"
    other = Model()
    set_attention_backend(other, THREE)
    call(X)
    assert counter.frame_count == len(MANY), "nor the pins of another model"


def test_pins_of_another_model_do_not_recompile_an_unpinned_one():
    counter, model, other = Counter(), Model(), Model()
    call = compiled(model, counter)
    call(X)
    for name in (TWO, THREE):
        set_attention_backend(other, name)
        other(X)
        call(X)
    reset_attention_backend(other)
    call(X)
    assert counter.frame_count == 1


def test_a_reset_goes_back_to_the_graphs_from_before():
    counter, model = Counter(), Model()
    call = compiled(model, counter)
    assert factors(call) == 1.0
    set_attention_backend(model, TWO)
    assert factors(call) == 4.0
    reset_attention_backend(model)
    assert factors(call) == 1.0
    frames = counter.frame_count
    set_attention_backend(model, TWO)
    assert factors(call) == 4.0
    reset_attention_backend(model)
    assert factors(call) == 1.0
    assert counter.frame_count == frames == 2


def test_pins_of_parts_of_a_compiled_model():
    counter, model = Counter(), Model()
    call = compiled(model, counter)
    set_attention_backend(model, THREE)
    assert factors(call) == 9.0
    set_attention_backend(model.blocks[0], TWO)
    assert factors(call) == 6.0
    reset_attention_backend(model.blocks[0])
    assert factors(call) == 9.0
    assert counter.frame_count == 2
    assert counter.operators() == [[THREE, THREE], [TWO, THREE]]


@pytest.mark.parametrize("way", ["wrapper", "method", "wrapper_pinned", "parts"])
def test_every_way_to_compile_a_module(way):
    model, counter = Model(), Counter()
    if way == "method":
        model.compile(fullgraph=True, backend=counter)
        call = model
    elif way == "parts":
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block, fullgraph=True, backend=counter)
        call = model
    else:
        call = torch.compile(model, fullgraph=True, backend=counter)
    pinned = call if way == "wrapper_pinned" else model
    assert factors(call) == 1.0
    set_attention_backend(pinned, THREE)
    assert factors(call) == 9.0
    set_attention_backend(pinned, TWO)
    assert factors(call) == 4.0
    reset_attention_backend(pinned)
    assert factors(call) == 1.0


def test_pinned_before_it_is_compiled():
    model, counter = Model(), Counter()
    set_attention_backend(model, THREE)
    call = compiled(model, counter)
    assert factors(call) == 9.0
    assert counter.frame_count == 1


def test_contexts_inside_compiled_functions():
    counter = Counter()

    def function(x):
        with attention_backend(TWO):
            with attention_backend(THREE):
                first = attention(x, x, x)
            second = attention(x, x, x)
        return first, second, attention(x, x, x), compiled_attn.active_backend()

    call = compiled(function, counter)
    for outside, expected in (("native", 1.0), (PROBES[4], 5.0), ("native", 1.0)):
        with attention_backend(outside):
            first, second, third, name = call(X)
            assert compiled_attn.active_backend() == outside
        assert [float(one[0, 0, 0, 0]) for one in (first, second, third)] == [3.0, 2.0, expected]
        assert name == outside
    assert counter.frame_count == 2
    assert counter.operators()[0] == [THREE, TWO, "native"]


def test_exceptions_through_a_context_inside_a_compiled_function():
    def function(x):
        try:
            with attention_backend(TWO):
                raise ValueError
        except ValueError:
            pass
        return attention(x, x, x)

    assert factors(compiled(function, Counter())) == 1.0
    assert compiled_attn.active_backend() == "native"


def test_an_exception_out_of_compiled_code_leaves_the_state_alone():
    def function(x):
        with attention_backend(TWO):
            return attention(x, x, x[:, :, :1])

    with attention_backend(THREE):
        with pytest.raises(Exception, match="they must be equal"):
            compiled(function, Counter())(X)
        assert compiled_attn.active_backend() == THREE
    assert compiled_attn.active_backend() == "native"


def test_unknown_names_inside_compiled_code():
    def function(x):
        with attention_backend("_native_mth"):
            return attention(x, x, x)

    for use in (function, lambda x: attention(x, x, x, backend="_native_mth")):
        with pytest.raises(Exception, match="unknown attention backend '_native_mth', did you mean '_native_math'"):
            compiled(use, Counter())(X)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graph_breaks_inside_a_context(backend):
    def function(x):
        with attention_backend(TWO):
            first = attention(x, x, x)
            torch._dynamo.graph_break()
            second = attention(first, first, first)
        torch._dynamo.graph_break()
        return attention(second, second, second), compiled_attn.active_backend()

    counter = Counter(backend)
    call = torch.compile(function, backend=counter)
    for outside, expected in (("native", 4.0), (THREE, 12.0), ("native", 4.0)):
        with attention_backend(outside):
            out, name = call(X)
            assert float(out[0, 0, 0, 0]) == expected
            assert name == outside
        assert compiled_attn.active_backend() == "native"


def test_graph_breaks_inside_a_pinned_module():
    class Breaks(nn.Module):
        def forward(self, x):
            x = attention(x, x, x)
            torch._dynamo.graph_break()
            return attention(x, x, x)

    model = Breaks()
    call = torch.compile(model, backend=Counter())
    for pin, expected in ((TWO, 4.0), (THREE, 9.0), (TWO, 4.0)):
        set_attention_backend(model, pin)
        assert factors(call) == expected
        assert compiled_attn.active_backend() == "native"
    reset_attention_backend(model)
    assert factors(call) == 1.0


def test_the_argument_and_a_new_registration():
    counter = Counter()
    call = compiled(lambda x, name: attention(x, x, x, backend=name), counter)
    for _ in range(2):
        for name in (TWO, THREE):
            assert float(call(X, name)[0, 0, 0, 0]) == factor(name)
    assert counter.frame_count == 2
    record = compiled_attn.backend_info(TWO)
    compiled_attn.register_backend(
        compiled_attn.Backend("tmp_registered_late", "after compilation", record.limits, record.dense)
    )
    call(X, TWO)
    assert counter.frame_count == 2, "registering a backend recompiles nothing"
    assert float(call(X, "tmp_registered_late")[0, 0, 0, 0]) == 2.0


def test_dynamic_lengths_are_one_graph_for_each_backend():
    counter = Counter()
    call = compiled(Attend(), counter, dynamic=True)
    for name in (*OWN, TWO):
        with attention_backend(name):
            for length in (4, 7, 12, 33):
                x = torch.randn(2, length, 2, 16)
                torch.testing.assert_close(call(x), Attend()(x))
    assert counter.frame_count == len(OWN) + 1


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters,
    reason="this torch.compile has no recompile_limit: the limit is the process's, and is raised, never lowered",
)
def test_the_recompile_limit_can_be_chosen():
    call = compiled_attn.compile(Attend(), fullgraph=True, backend=Counter(), recompile_limit=2)
    for name in (ONE, TWO):
        with attention_backend(name):
            call(X)
    with attention_backend(THREE), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        call(X)


def test_compile_as_a_decorator():
    counter = Counter()

    @compiled_attn.compile(fullgraph=True, backend=counter)
    def function(x):
        return attention(x, x, x)

    for name in PROBES:
        with attention_backend(name):
            assert factors(function) == factor(name)
    assert counter.frame_count == len(PROBES)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_nothing_recompiles_after_precompile(training, capsys):
    counter, model = Counter("aot_eager"), Model()
    call = compiled(model, counter)
    x = X.clone().requires_grad_(training)
    with contextlib.nullcontext() if training else torch.no_grad():
        compiled_attn.precompile(call, MANY, x)
        assert "precompile" in capsys.readouterr().err, "a progress bar on stderr"
        assert counter.frame_count == len(MANY)
        assert compiled_attn.active_backend() == "native"
        for name in MANY:
            with attention_backend(name):
                out = call(x)
            compiled_attn.set_default_backend(name)
            out = call(x)
            if training:
                out.sum().backward()
    assert counter.frame_count == len(MANY)


def test_precompile_of_a_pinned_model_puts_its_pin_back():
    counter, model = Counter(), Model()
    set_attention_backend(model, TWO)
    call = compiled(model, counter)
    compiled_attn.precompile(call, MANY, X)
    assert factors(call) == 4.0
    for name in MANY:
        set_attention_backend(model, name)
        call(X)
    assert counter.frame_count == len(MANY)


def test_precompile_refuses_before_it_compiles():
    counter = Counter()
    with pytest.raises(ValueError, match="did you mean '_native_math'"):
        compiled_attn.precompile(compiled(Attend(), counter), ["native", "_native_mth"], X)
    assert counter.frame_count == 0


def test_precompile_leaves_the_context_alone_when_the_model_fails():
    def fails(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        compiled_attn.precompile(fails, [TWO], X)
    assert compiled_attn.active_backend() == "native"


def test_unset_set_unset():
    """A class-level default on threading.local would answer 1, 1, 1."""
    call = compiled(Attend(), Counter())
    seen = [factors(call)]
    with attention_backend(TWO):
        seen.append(factors(call))
    seen.append(factors(call))
    compiled_attn.set_default_backend(THREE)
    seen.append(factors(call))
    compiled_attn.set_default_backend("native")
    seen.append(factors(call))
    assert seen == [1.0, 2.0, 1.0, 3.0, 1.0]


def test_a_fresh_thread_sees_the_default_and_its_own_contexts():
    call, seen = compiled(Attend(), Counter()), []
    with attention_backend(TWO):
        seen.append(factors(call))

        def work():
            seen.append(factors(call))
            with attention_backend(THREE):
                seen.append(factors(call))
            seen.append(factors(call))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        seen.append(factors(call))
    assert seen == [2.0, 1.0, 3.0, 1.0, 2.0]
