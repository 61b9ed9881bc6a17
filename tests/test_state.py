"""Which backend is active: default, environment, contexts, pins; in every order, thread and accident. All eager."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import stand_in  # noqa: F401  registers a backend with narrow limits
import torch
from probes import PROBES, factor
from torch import nn
from torch.utils.checkpoint import checkpoint

import compiled_attn
from compiled_attn import attention, attention_backend, reset_attention_backend, set_attention_backend, state

ONE, TWO, THREE = PROBES[:3]
X = torch.ones(1, 4, 2, 8)


def ran(x: torch.Tensor = X) -> str:
    """The backend that a call made here and now runs."""
    times = float(attention(x, x, x)[0, 0, 0, 0])
    return "native" if times == 1.0 and compiled_attn.active_backend() == "native" else f"probe_{int(times):02d}"


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attention(x, x, x * self.weight)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = Attend()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x)


class Model(nn.Module):
    """Multiplies by the factors of the backends of its two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def factors(model: nn.Module) -> float:
    return float(model(X)[0, 0, 0, 0].detach())


# ------------------------------------------------------------------------------------------ defaults and contexts


def test_native_is_the_default():
    assert compiled_attn.active_backend() == "native"
    assert ran() == "native"


def test_default_context_and_argument_in_order_of_strength():
    compiled_attn.set_default_backend(TWO)
    assert ran() == TWO
    with attention_backend(THREE):
        assert ran() == THREE
        times = attention(X, X, X, backend=PROBES[4])[0, 0, 0, 0]
        assert times == factor(PROBES[4])
        assert ran() == THREE
    assert ran() == TWO


def test_contexts_nest():
    seen = []
    for depth, name in enumerate((TWO, THREE, "native", TWO)):
        with contextlib.ExitStack() as stack:
            for inner in (TWO, THREE, "native", TWO)[: depth + 1]:
                stack.enter_context(attention_backend(inner))
                seen.append(compiled_attn.active_backend())
            assert compiled_attn.active_backend() == name
        assert compiled_attn.active_backend() == "native"
    assert seen == [TWO, TWO, THREE, TWO, THREE, "native", TWO, THREE, "native", TWO]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_exceptions_undo_contexts(depth):
    with contextlib.suppress(ZeroDivisionError), contextlib.ExitStack() as stack:
        for name in PROBES[1 : 1 + depth]:
            stack.enter_context(attention_backend(name))
        raise ZeroDivisionError
    assert ran() == "native"


def test_a_default_set_inside_a_context_shows_after_it():
    with attention_backend(TWO):
        compiled_attn.set_default_backend(THREE)
        assert ran() == TWO
    assert ran() == THREE


def test_generators_that_hold_a_context():
    """Like torch.no_grad: a context belongs to the thread while the generator is suspended inside it; the innermost
    one left last wins back the default."""

    def calls():
        with attention_backend(TWO):
            yield ran()
            yield ran()

    generator = calls()
    assert next(generator) == TWO
    assert next(generator) == TWO
    generator.close()
    assert ran() == "native"
    assert list(calls()) == [TWO, TWO]
    assert ran() == "native"


def test_a_context_can_be_entered_again():
    context = attention_backend(TWO)
    for _ in range(2):
        with context:
            assert ran() == TWO
        assert ran() == "native"


def test_a_context_is_of_its_thread():
    seen = {}

    def work():
        seen["fresh"] = compiled_attn.active_backend()
        with attention_backend(THREE):
            seen["inside"] = ran()

    with attention_backend(TWO):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert ran() == TWO
    assert seen == {"fresh": "native", "inside": THREE}


def test_running_threads_see_a_new_default():
    """Threads that have called before, not only fresh ones; one inside a context keeps it and sees it afterwards."""
    ready, go, results = threading.Barrier(3), threading.Event(), {}

    def plain():
        before = ran()
        ready.wait()
        go.wait()
        results["plain"] = (before, ran())

    def inside():
        with attention_backend(THREE):
            before = ran()
            ready.wait()
            go.wait()
            during = ran()
        results["inside"] = (before, during, ran())

    threads = [threading.Thread(target=one) for one in (plain, inside)]
    for thread in threads:
        thread.start()
    ready.wait()
    compiled_attn.set_default_backend(TWO)
    go.set()
    for thread in threads:
        thread.join()
    assert results == {"plain": ("native", TWO), "inside": (THREE, THREE, TWO)}


def test_two_threads_100_000_calls_none_wrong():
    """Each thread under its own contexts, while a third one changes the default all the time."""
    wrong, done, calls = [], threading.Event(), 50_000
    x = torch.ones(1, 1, 1, 1)

    def work(mine: str) -> None:
        count = 0
        with torch.inference_mode():
            while count < calls:
                with attention_backend(mine):
                    for _ in range(100):
                        if attention(x, x, x).item() != factor(mine):
                            wrong.append(mine)
                        count += 1

    def disturb() -> None:
        while not done.is_set():
            for name in PROBES[5:8]:
                compiled_attn.set_default_backend(name)
            done.wait(0.001)

    threads = [threading.Thread(target=work, args=(name,)) for name in (TWO, THREE)]
    disturber = threading.Thread(target=disturb)
    for thread in (*threads, disturber):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    disturber.join()
    assert wrong == []


def _run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("COMPILED_ATTN_BACKEND", "DIFFUSERS_ATTN_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "native"),
        ({"COMPILED_ATTN_BACKEND": "_native_math"}, "_native_math"),
        ({"DIFFUSERS_ATTN_BACKEND": "_native_flash"}, "_native_flash"),
        ({"COMPILED_ATTN_BACKEND": "_native_math", "DIFFUSERS_ATTN_BACKEND": "_native_flash"}, "_native_math"),
        ({"COMPILED_ATTN_BACKEND": ""}, "native"),
    ],
    ids=str,
)
def test_environment_variables_name_the_default(variables, expected, monkeypatch):
    for name in ("COMPILED_ATTN_BACKEND", "DIFFUSERS_ATTN_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert state._Process().default == expected


@pytest.mark.parametrize("variable", ["DIFFUSERS_ATTN_BACKEND"])
def test_an_unknown_name_in_the_environment_is_an_error_at_first_use(variable):
    code = (
        "import torch, compiled_attn; print('imported'); x = torch.ones(1, 4, 2, 8)\ncompiled_attn.attention(x, x, x)"
    )
    done = _run(code, **{variable: "_native_mth"})
    assert done.stdout.strip() == "imported"
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ValueError")]
    for text in ("'_native_mth'", f"(from {variable})", "did you mean '_native_math'?"):
        assert text in line


def test_contexts_and_the_default_win_over_the_environment():
    code = (
        "import compiled_attn as ca\n"
        "with ca.attention_backend('_native_math'): print(ca.active_backend())\n"
        "print(ca.active_backend())\n"
        "ca.set_default_backend('native'); print(ca.active_backend())"
    )
    done = _run(code, COMPILED_ATTN_BACKEND="_native_flash")
    assert done.stdout.split() == ["_native_math", "_native_flash", "native"], done.stderr


# ------------------------------------------------------------------------------------------------------------ pins


def test_a_pin_holds_until_reset_and_touches_nothing_else():
    model, other = Model(), Model()
    set_attention_backend(model, THREE)
    assert (factors(model), factors(other)) == (9.0, 1.0)
    assert compiled_attn.active_backend() == "native"
    assert ran() == "native"
    set_attention_backend(model, TWO)
    assert factors(model) == 4.0
    reset_attention_backend(model)
    assert factors(model) == 1.0
    assert all("forward" not in one.__dict__ for one in model.modules())


@pytest.mark.parametrize("first", ["parent", "child"])
def test_the_nearest_pin_wins_whichever_came_first(first):
    model = Model()
    pins = {"parent": lambda: set_attention_backend(model, THREE)}
    pins["child"] = lambda: set_attention_backend(model.blocks[0], TWO)
    for which in sorted(pins, key=lambda which: which != first):
        pins[which]()
    assert factors(model) == 2.0 * 3.0
    reset_attention_backend(model.blocks[0])
    assert factors(model) == 9.0, "the parent's pin shows again"
    reset_attention_backend(model.blocks[0])
    assert factors(model) == 9.0
    reset_attention_backend(model)
    assert factors(model) == 1.0


def test_resetting_the_parent_resets_all_of_it():
    model = Model()
    set_attention_backend(model.blocks[0].attend, TWO)
    set_attention_backend(model, THREE)
    reset_attention_backend(model)
    assert factors(model) == 1.0


def test_three_levels():
    model = Model()
    set_attention_backend(model, PROBES[4])
    set_attention_backend(model.blocks[1], THREE)
    set_attention_backend(model.blocks[1].attend, TWO)
    assert factors(model) == 5.0 * 2.0
    reset_attention_backend(model.blocks[1].attend)
    assert factors(model) == 5.0 * 3.0
    set_attention_backend(model, PROBES[6])
    assert factors(model) == 7.0 * 3.0


def test_a_pin_wins_over_contexts_outside_and_loses_to_those_inside():
    class Inside(nn.Module):
        def forward(self, x):
            with attention_backend(TWO):
                return attention(x, x, x)

    attend, inside = Attend(), Inside()
    for module in (attend, inside):
        set_attention_backend(module, THREE)
    with attention_backend(PROBES[4]):
        assert factors(attend) == 3.0
        assert factors(inside) == 2.0
        assert ran() == PROBES[4]


def test_a_pin_changes_nothing_for_defaults_and_contexts():
    model = Model()
    set_attention_backend(model, TWO)
    compiled_attn.set_default_backend(THREE)
    assert factors(model) == 4.0
    assert ran() == THREE


def test_a_default_set_while_a_pin_is_running_holds_afterwards():
    class Sets(nn.Module):
        def forward(self, x):
            compiled_attn.set_default_backend(THREE)
            return attention(x, x, x)

    module = Sets()
    set_attention_backend(module, TWO)
    assert factors(module) == 2.0
    assert ran() == THREE


def test_exceptions_undo_pins():
    class Fails(nn.Module):
        def forward(self, x):
            attention(x, x, x)
            raise ZeroDivisionError

    module = Fails()
    set_attention_backend(module, TWO)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            module(X)
        assert compiled_attn.active_backend() == "native"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_pins_survive_copies(way):
    model = Model()
    set_attention_backend(model, THREE)
    set_attention_backend(model.blocks[1], TWO)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert factors(twin) == 6.0
    set_attention_backend(twin, PROBES[4])  # the twin's pins are its own
    with torch.no_grad():
        twin.blocks[0].attend.weight.fill_(10.0)
    assert factors(twin) == 5.0 * 10.0 * 2.0
    assert factors(model) == 6.0
    reset_attention_backend(twin)
    assert (factors(twin), factors(model)) == (10.0, 6.0)


def test_pins_leave_the_state_dict_alone():
    model = Model()
    keys = list(model.state_dict())
    set_attention_backend(model, TWO)
    assert list(model.state_dict()) == keys
    model.load_state_dict(Model().state_dict())
    assert factors(model) == 4.0


class Wrapper:
    """What other libraries do to modules: an instance ``forward`` that calls the one found before."""

    def __init__(self, module: nn.Module) -> None:
        self.before = module.forward
        self.calls = 0
        module.forward = self  # type: ignore[assignment]

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.before(*args, **kwargs)


def test_a_wrapper_by_others_before_the_pin():
    attend = Attend()
    wrapper = Wrapper(attend)
    set_attention_backend(attend, TWO)
    assert (factors(attend), wrapper.calls) == (2.0, 1)
    set_attention_backend(attend, THREE)
    assert (factors(attend), wrapper.calls) == (3.0, 2)
    reset_attention_backend(attend)
    assert (factors(attend), wrapper.calls) == (1.0, 3)
    assert attend.forward is wrapper


def test_a_wrapper_by_others_after_the_pin():
    attend = Attend()
    set_attention_backend(attend, TWO)
    wrapper = Wrapper(attend)
    assert (factors(attend), wrapper.calls) == (2.0, 1)
    set_attention_backend(attend, THREE)
    assert (factors(attend), wrapper.calls) == (3.0, 2)
    reset_attention_backend(attend)
    assert (factors(attend), wrapper.calls) == (1.0, 3)
    set_attention_backend(attend, TWO)
    assert (factors(attend), wrapper.calls) == (2.0, 4)


def test_a_wrapper_taken_off_again():
    attend = Attend()
    set_attention_backend(attend, TWO)
    wrapper = Wrapper(attend)
    attend.forward = wrapper.before
    assert factors(attend) == 2.0
    reset_attention_backend(attend)
    assert factors(attend) == 1.0


def test_the_warning_when_no_attention_call_is_reached():
    class Plain(nn.Module):
        def forward(self, x):
            return x + 1

    module = Plain()
    set_attention_backend(module, TWO)
    with pytest.warns(UserWarning, match="Plain is pinned to attention backend 'probe_02', but .* no effect") as caught:
        module(X)
        module(X)
    assert len(caught) == 1, "once"
    assert caught[0].filename == __file__ or "torch" in caught[0].filename


def test_no_warning_when_attention_is_reached():
    for module in (Model(), Attend()):
        set_attention_backend(module, TWO)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            module(X)
            module(X)


def test_no_warning_after_a_reset_or_a_failing_forward():
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = Fails()
        set_attention_backend(module, TWO)
        with pytest.raises(ZeroDivisionError):
            module(X)
        linear = nn.Sequential(nn.Linear(8, 8))
        set_attention_backend(linear, TWO)
        reset_attention_backend(linear)
        linear(X)


def test_the_mixin():
    class Mixed(compiled_attn.AttentionBackendMixin, Model):
        pass

    model = Mixed()
    model.set_attention_backend(THREE)
    assert factors(model) == 9.0
    model.reset_attention_backend()
    assert factors(model) == 1.0


def test_pins_in_threads():
    """One module, many threads, each with its own context round it."""
    model, results = Model(), []
    set_attention_backend(model.blocks[0], TWO)

    def work(name: str) -> None:
        for _ in range(200):
            with torch.no_grad(), attention_backend(name):
                results.append(factors(model) == 2.0 * factor(name))

    threads = [threading.Thread(target=work, args=(name,)) for name in PROBES[2:5]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 600
    assert all(results)


def test_shared_submodules_keep_one_pin():
    shared = Attend()
    model = nn.Sequential(shared, shared)
    set_attention_backend(model, THREE)
    assert factors(model) == 9.0
    reset_attention_backend(model)
    assert factors(model) == 1.0


# ---------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("pinned", ["root", "block"])
def test_eager_checkpoints_recompute_under_pins(use_reentrant, pinned):
    """Recomputation calls the block, outside the root's forward and in another thread."""

    class Checkpointed(Model):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return x

    model = Checkpointed()
    for module in [model] if pinned == "root" else model.blocks:
        set_attention_backend(module, THREE)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    # d/dx of 3 * w0 * 3 * w1 * x
    torch.testing.assert_close(x.grad, torch.full_like(X, 9.0))
    torch.testing.assert_close(model.blocks[0].attend.weight.grad, torch.tensor(9.0 * X.numel()))


def test_eager_checkpoints_under_a_context_need_the_context_fn():
    x = X.clone().requires_grad_()

    def block(tensor):
        return attention(tensor, tensor, tensor) * tensor.detach()

    with attention_backend(THREE):
        out = checkpoint(block, x, use_reentrant=False, context_fn=compiled_attn.checkpoint_context_fn)
    with attention_backend(TWO):
        out.sum().backward()
        assert compiled_attn.active_backend() == TWO
    torch.testing.assert_close(x.grad, torch.full_like(X, 3.0))


def test_a_slot_at_rest_holds_the_default_only():
    compiled_attn.set_default_backend(TWO)
    model = Model()
    set_attention_backend(model, THREE)
    with attention_backend(PROBES[4]):
        model(X)
    slot = state.slot()
    assert (slot.name, slot.runtime, slot.context, slot.outer, slot.inner) == (TWO, TWO, None, None, None)


# ------------------------------------------------------------------------------------------------------ eager switch


def test_switch_follows_contexts_and_default():
    assert float(attention(X, X, X, backend="switch")[0, 0, 0, 0]) == 1.0
    with attention_backend(THREE):
        assert float(attention(X, X, X, backend="switch")[0, 0, 0, 0]) == 3.0
        with attention_backend("switch"):
            assert float(attention(X, X, X)[0, 0, 0, 0]) == 3.0
            with attention_backend(TWO):
                assert float(attention(X, X, X, backend="switch")[0, 0, 0, 0]) == 2.0
            assert float(attention(X, X, X)[0, 0, 0, 0]) == 3.0
    compiled_attn.set_default_backend(TWO)
    assert float(attention(X, X, X, backend="switch")[0, 0, 0, 0]) == 2.0
    compiled_attn.set_default_backend("switch")
    assert torch.isfinite(attention(X, X, X)).all()


@pytest.mark.parametrize("where", ["same_thread", "other_thread"])
def test_backward_of_switch_is_that_of_its_forward(where):
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        out = attention(X, X, x, backend="switch")

    def back():
        with attention_backend(TWO):
            out.sum().backward()

    if where == "same_thread":
        back()
    else:
        thread = threading.Thread(target=back)
        thread.start()
        thread.join()
    torch.testing.assert_close(x.grad, torch.full_like(X, 3.0))


def test_switch_reaches_packed_sequences():
    x = torch.ones(4, 2, 8, requires_grad=True)
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    with attention_backend(THREE):
        out = compiled_attn.varlen_attention(x, x, x, lengths, lengths, backend="switch")
    with attention_backend(TWO):
        (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 3.0))


def test_switch_refuses_what_its_backend_cannot():
    with (
        attention_backend("stand_in"),
        pytest.raises(NotImplementedError, match="'stand_in', active when 'switch' ran") as no,
    ):
        attention(X, X, X, window_size=(1, 1), attn_mask=torch.ones(1, 1, 4, 4), backend="switch")
    assert "has no sliding window" in str(no.value)
    assert "not a float mask" in str(no.value)
    with pytest.raises(NotImplementedError, match="has no dropout"):
        attention(X, X, X, dropout_p=0.1, backend="switch")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputing_switch_raises_instead_of_guessing(use_reentrant):
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        out = checkpoint(lambda t: attention(t, t, t, backend="switch") * 1.0, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="checkpoint_context_fn"):
        out.sum().backward()


def test_recomputing_switch_with_the_context_fn():
    x = X.clone().requires_grad_()
    with attention_backend(THREE):
        out = checkpoint(
            lambda t: attention(t, t, t.sin(), backend="switch").cos(),
            x,
            use_reentrant=False,
            context_fn=compiled_attn.checkpoint_context_fn,
        )
    out.sum().backward()
    right = X.clone().requires_grad_()
    (3.0 * right.sin()).cos().sum().backward()
    torch.testing.assert_close(x.grad, right.grad)
