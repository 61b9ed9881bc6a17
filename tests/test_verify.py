"""``list --verify``: right backends pass, wrong ones are named and set the exit status, nothing is downloaded."""

from __future__ import annotations

import dataclasses

import pytest
import stand_in
import torch

import compiled_attn
from compiled_attn import cli_verify, registry
from compiled_attn.__main__ import main
from compiled_attn.operators import Kernels
from compiled_attn.registry import Backend, register_backend
from compiled_attn.spec import Limits

LIMITS = Limits(("cpu",), (torch.bfloat16,), alignments=("upper_left",))


def spoilt(**faults):
    """The stand-in with a fault: ``out``, ``lse`` or ``dk`` times a factor, or an exception."""

    def forward(*args):
        if "raises" in faults:
            raise RuntimeError("illegal memory access")
        out, lse, state = stand_in.forward(*args)
        return out * faults.get("out", 1.0), lse * faults.get("lse", 1.0), state

    def backward(*args):
        dq, dk, dv, dmask = stand_in.backward(*args)
        return dq, dk * faults.get("dk", 1.0), dv, dmask

    return Kernels(forward, backward)


def outcome(name, limits=LIMITS, **faults):
    """What is found out about a backend of this fault, registered once."""
    if name not in registry.BACKENDS:
        register_backend(Backend(name, "for this test", (limits,), spoilt(**faults)))
    (found,) = cli_verify.outcomes_of([name])
    return found


def test_everything_here_is_right():
    found = [one for one in cli_verify.outcomes_of([]) if not one.backend.startswith(("tmp_", "probe_"))]
    ran = {(one.backend, one.varlen) for one in found if not one.note}
    assert {("native", False), ("native", True), ("_native_math", True), ("stand_in", False)} <= ran
    assert {one.backend: one.wrong for one in found if one.wrong} == {}
    for one in found:
        if not one.note:
            assert one.errors[0] > 0.0 and one.plain[0] > 0.0


@pytest.mark.parametrize(
    ("name", "faults", "wrong"),
    [
        ("tmp_verify_right", {}, ""),
        ("tmp_verify_out", {"out": 1.1}, "out wrong, gradients wrong"),  # its backward needs out
        ("tmp_verify_dk", {"dk": 1.1}, "gradients wrong"),
        ("tmp_verify_raises", {"raises": True}, "RuntimeError: illegal memory access"),
    ],
)
def test_faults(name, faults, wrong, capsys):
    assert outcome(name, **faults).wrong == wrong
    assert main(["list", "--verify", name]) == (1 if wrong else 0)
    printed = capsys.readouterr().out
    assert (wrong or "right") in printed
    assert f"1 runs, {1 if wrong else 0} wrong" in printed


def test_a_wrong_lse_is_found_where_there_is_no_gradient():
    limits = dataclasses.replace(LIMITS, gradient=False)
    found = outcome("tmp_verify_lse", limits, lse=1.1)
    assert (found.wrong, found.errors[2]) == ("lse wrong", None)


def test_what_a_quantised_kernel_may_be_off_by():
    limits = dataclasses.replace(LIMITS, gradient=False, lse=False)
    allowed = dataclasses.replace(limits, rounding=0.25)
    assert outcome("tmp_verify_coarse", limits, out=1.2).wrong == "out wrong"
    assert outcome("tmp_verify_rounds", allowed, out=1.2).wrong == ""
    assert outcome("tmp_verify_rounds_too_much", allowed, out=1.3).wrong == "out wrong"


def test_a_refusal_is_no_fault():
    def refuse(call):
        return "is on strike"

    found = outcome("tmp_verify_strike", dataclasses.replace(LIMITS, also=(refuse,)))
    assert (found.wrong, found.note) == ("", "refuses this call: is on strike")


def test_a_named_backend_that_is_not_here_is_a_failure(capsys):
    assert main(["list", "--verify", "_native_npu"]) == 1
    assert "cannot run here" in capsys.readouterr().out


def test_packed_kernels_for_a_device_that_is_not_here_are_not_run():
    elsewhere = (dataclasses.replace(LIMITS, devices=("xla",)),)
    register_backend(
        Backend(
            "tmp_verify_far",
            "",
            (LIMITS,),
            spoilt(),
            varlen_limits=elsewhere,
            varlen=Kernels(stand_in.forward, stand_in.backward),
        )
    )
    (found,) = cli_verify.outcomes_of(["tmp_verify_far"])
    assert (found.varlen, found.wrong) == (False, "")


def test_an_unknown_name(capsys):
    assert main(["list", "--verify", "natve"]) == 2
    assert "did you mean 'native'?" in capsys.readouterr().err


def test_nothing_is_fetched_unless_it_is_named(monkeypatch):
    class Remote:
        def missing(self):
            return []

        def at_hand(self):
            return False

        def load(self):
            loads.append(1)

    loads: list[int] = []
    backend = compiled_attn.backend_info("stand_in")
    entry = registry.find("stand_in")
    remote = dataclasses.replace(backend, packages=(Remote(),))
    monkeypatch.setitem(registry.BACKENDS, "stand_in", dataclasses.replace(entry, backend=remote))
    (found,) = (one for one in cli_verify.outcomes_of([]) if one.backend == "stand_in")
    assert (found.note, loads) == ("not fetched yet; list --verify stand_in fetches and runs it", [])
    (found,) = cli_verify.outcomes_of(["stand_in"])
    assert (found.note, found.wrong, loads) == ("", "", [1])
