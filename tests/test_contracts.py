"""What a backend cannot do is refused with every reason; what makes no sense is a ValueError; nothing is dropped."""

from __future__ import annotations

import inspect

import probes  # noqa: F401  registers cheap backends
import pytest
import stand_in
import torch
from matrix import limits_on

import compiled_attn
from compiled_attn import registry
from compiled_attn.operators import Kernels
from compiled_attn.packages import Package
from compiled_attn.registry import Backend
from compiled_attn.spec import Call, Limits

X = torch.randn(2, 8, 4, 16)

# A backend that can do as little as possible: one call violates nearly every limit.
NARROW = Limits(
    ("cpu",),
    (torch.float16,),
    min_head_dim=32,
    max_head_dim=8,
    head_dim_multiple=3,
    causal=False,
    alignments=("lower_right",),
    gqa=False,
    lse=False,
    gradient=False,
    also=(lambda call: "is closed today" if call.query[0] == 2 else None,),
)
compiled_attn.register_backend(compiled_attn.Backend("tmp_narrow", "refuses", (NARROW,), Kernels(stand_in.forward)))
NEEDY = Package("no_such_module_at_all", "no-such-distribution", install="ask for it")
compiled_attn.register_backend(
    compiled_attn.Backend(
        "tmp_needy",
        "needs what nobody has",
        (stand_in.LIMITS,),
        Kernels(stand_in.forward, stand_in.backward),
        packages=(NEEDY, Package("torch", "torch", minimum="999.0")),
        available=lambda: ["the moon is not full"],
    )
)
INFERENCE = Limits(("cpu",), stand_in.DTYPES, gradient=False)
compiled_attn.register_backend(
    compiled_attn.Backend("tmp_inference", "no backward", (INFERENCE,), Kernels(stand_in.forward))
)

EVERYTHING = {"is_causal": True, "enable_gqa": True, "window_size": (2, 1), "dropout_p": 0.1}
REASONS = (
    "takes float16, not float32",
    "head_dim=16 is under 32",
    "head_dim=24 is over 8",
    "head_dim=16 is not a multiple of 3",
    "needs one head_dim, not 16 for query/key and 24 for value",
    "takes no masks, so not a key_padding mask",
    "has no causal mode",
    "when Sq != Sk (8 != 9), not upper_left",
    "has no grouped-query attention",
    "has no sliding window",
    "has no dropout (dropout_p=0.1)",
    "returns no lse",
    "is inference-only",
    "is closed today",
)


def everything():
    return (
        X.clone().requires_grad_(),
        torch.randn(2, 9, 2, 16),
        torch.randn(2, 9, 2, 24),
        torch.ones(2, 9, dtype=torch.bool),
    )


def test_a_refusal_has_every_reason_and_says_what_to_do():
    with pytest.raises(NotImplementedError) as refused:
        compiled_attn.attention_with_lse(*everything(), **EVERYTHING, backend="tmp_narrow")
    lines = str(refused.value).splitlines()
    assert lines[0] == "backend 'tmp_narrow' cannot run this call:"
    for reason in REASONS:
        assert sum(reason in line for line in lines) == 1, reason
    assert len(lines) == len(REASONS) + 2
    assert "explain" in lines[-1]


def test_why_not_and_explain_give_the_same_reasons():
    why = compiled_attn.why_not("tmp_narrow", *everything(), **EVERYTHING, return_lse=True)
    assert len(why) == len(REASONS)
    table = compiled_attn.explain(*everything(), **EVERYTHING, return_lse=True)
    assert table["tmp_narrow"] == why
    assert list(table) == compiled_attn.list_backends()
    assert table["_native_math"] == []


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_code_refuses_with_every_reason(fullgraph):
    """PyTorch wraps the exception under fullgraph; the text is whole."""

    def call(*tensors):
        return compiled_attn.attention_with_lse(*tensors, **EVERYTHING, backend="tmp_narrow")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=fullgraph, backend="eager")
    with pytest.raises(Exception, match="tmp_narrow") as refused:
        compiled(*everything())
    for reason in REASONS:
        assert reason in str(refused.value), reason
    if not fullgraph:
        assert type(refused.value) is NotImplementedError


def test_compiled_mistakes_have_every_reason():
    torch._dynamo.reset()
    compiled = torch.compile(compiled_attn.attention, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="makes no sense") as refused:
        compiled(X, X[:, :, :3], X.double(), dropout_p=2.0)
    for text in ("float32/float32/float64", "query has 4 heads, key 3", "dropout_p=2.0"):
        assert text in str(refused.value)


@pytest.mark.parametrize("checked_before", [False, True])
def test_a_call_is_refused_every_time(checked_before):
    """Served calls are remembered, refused ones are not; the memory knows every argument."""
    if checked_before:
        compiled_attn.attention(X, X, X, backend="stand_in")
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="has no dropout"):
            compiled_attn.attention(X, X, X, backend="stand_in", dropout_p=0.5)
        with pytest.raises(NotImplementedError, match="has no sliding window"):
            compiled_attn.attention(X, X, X, backend="stand_in", window_size=(1, 1))
        with pytest.raises(NotImplementedError, match="not a bool mask"):
            compiled_attn.attention(X, X, X, torch.ones(2, 1, 8, 8, dtype=torch.bool), backend="stand_in")
        with pytest.raises(ValueError, match="enable_gqa"):
            compiled_attn.attention(X, X[:, :, :2], X[:, :, :2], backend="stand_in")
        with pytest.raises(ValueError, match=r"dropout_p=1\.5"):
            compiled_attn.attention(X, X, X, backend="stand_in", dropout_p=1.5)
        with pytest.raises(ValueError, match="dtypes"):
            compiled_attn.attention(X, X, X.double(), backend="stand_in")
        with pytest.raises(ValueError, match="cpu/cpu/meta"):
            compiled_attn.attention(X, X, X.to("meta"), backend="stand_in")


def test_an_unlimited_window_is_no_window():
    expected = compiled_attn.attention(X, X, X, backend="stand_in")
    actual = compiled_attn.attention(X, X, X, backend="stand_in", window_size=(-1, -1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("window", [(1,), (1, 2, 3), ()], ids=str)
def test_windows_of_a_wrong_length(window):
    with pytest.raises(ValueError, match="left, right"):
        compiled_attn.attention(X, X, X, window_size=window)


NEAREST = [
    ("_native_mth", "_native_math"),
    ("NATIVE", "native"),
    ("native_flash", "_native_flash"),
    ("swich", "switch"),
    ("stand-in", "stand_in"),
]


@pytest.mark.parametrize(("given", "nearest"), NEAREST)
def test_unknown_names_come_with_the_nearest_and_all_known_ones(given, nearest):
    uses = (
        lambda: compiled_attn.attention(X, X, X, backend=given),
        lambda: compiled_attn.attention_backend(given),
        lambda: compiled_attn.set_default_backend(given),
        lambda: compiled_attn.set_attention_backend(torch.nn.Linear(1, 1), given),
        lambda: compiled_attn.backend_info(given),
        lambda: compiled_attn.why_not(given, X, X, X),
        lambda: compiled_attn.precompile(lambda: None, [given]),
        lambda: compiled_attn.dispatch_attention_fn(X, X, X, backend=given),
    )
    for use in uses:
        with pytest.raises(ValueError, match=f"{given!r}.*did you mean {nearest!r}") as refused:
            use()
        for name in compiled_attn.list_backends():
            assert name in str(refused.value)


def test_a_name_like_no_other_has_no_nearest():
    with pytest.raises(ValueError, match="unknown attention backend 'zzzzzzzz'; known"):
        compiled_attn.attention_backend("zzzzzzzz")


def test_unknown_arguments():
    for function in (compiled_attn.attention, compiled_attn.attention_with_lse):
        with pytest.raises(TypeError, match="softmax_scale"):
            function(X, X, X, softmax_scale=1.0)
    lengths = torch.tensor([0, 8], dtype=torch.int32)
    with pytest.raises(TypeError, match="key_padding_mask"):
        compiled_attn.varlen_attention(X[0], X[0], X[0], lengths, lengths, key_padding_mask=None)
    with pytest.raises(TypeError, match="colour"):
        compiled_attn.why_not("native", X, X, X, colour=1)
    with pytest.raises(ValueError, match=r"unknown attention_kwargs \['colour'\]; known: window_size"):
        compiled_attn.dispatch_attention_fn(X, X, X, attention_kwargs={"colour": 1, "window_size": None})


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_arguments_that_are_no_tensors(which):
    arguments = {"query": X, "key": X, "value": X, which: X.tolist()}
    with pytest.raises((TypeError, AttributeError), match=r"list"):
        compiled_attn.attention(**arguments)


def test_options_cannot_be_given_by_position():
    """A fifth positional argument would be dropout_p for one library and a flag for another."""
    with pytest.raises(TypeError, match="positional"):
        compiled_attn.attention(X, X, X, None, 0.1)


SETTERS = {
    "context": lambda name: compiled_attn.attention_backend(name),
    "default": lambda name: compiled_attn.set_default_backend(name),
    "pin": lambda name: compiled_attn.set_attention_backend(torch.nn.Linear(1, 1), name),
    "precompile": lambda name: compiled_attn.precompile(lambda: None, [name]),
}


@pytest.mark.parametrize("setter", SETTERS)
def test_a_backend_without_its_packages_is_refused_where_it_is_set(setter):
    with pytest.raises(NotImplementedError, match="'tmp_needy' cannot run here") as refused:
        SETTERS[setter]("tmp_needy")
    for text in (
        "module 'no_such_module_at_all' is not installed; ask for it",
        "is older than 999.0; pip install torch",
        "the moon is not full",
    ):
        assert text in str(refused.value)
    assert compiled_attn.active_backend() == "native"


def test_why_not_knows_the_missing_packages():
    assert len(compiled_attn.why_not("tmp_needy", X, X, X)) == 3
    assert len(compiled_attn.why_not("tmp_needy", X, X, X, dropout_p=0.1)) == 4


def test_an_inference_only_backend_refuses_gradients():
    leaf = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=r"is inference-only; use torch\.no_grad"):
        compiled_attn.attention(leaf, X, X, backend="tmp_inference")
    with torch.no_grad():
        actual = compiled_attn.attention(leaf, X, X, backend="tmp_inference")
    torch.testing.assert_close(actual, compiled_attn.attention(X, X, X), atol=2e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="'tmp_inference' is inference-only"):
        torch.ops.compiled_attn.tmp_inference.v1(leaf, X, X, return_lse=True)[0].sum().backward()


def test_gradients_under_switch_are_refused_by_an_inference_only_backend():
    leaf = X.clone().requires_grad_()
    with compiled_attn.attention_backend("tmp_inference"):
        with torch.no_grad():
            compiled_attn.attention(leaf, X, X, backend="switch")
        with pytest.raises((NotImplementedError, RuntimeError), match="inference-only"):
            compiled_attn.attention(leaf, X, X, backend="switch").sum().backward()


def _register(**changes):
    record = {
        "name": "tmp_new",
        "summary": "",
        "limits": (stand_in.LIMITS,),
        "dense": Kernels(stand_in.forward, stand_in.backward),
        **changes,
    }
    compiled_attn.register_backend(compiled_attn.Backend(**record))


BAD_RECORDS = {
    "taken": ({"name": "native"}, "the name is taken"),
    "no_identifier": ({"name": "my-backend"}, "the name is not an identifier"),
    "reserved": ({"name": "tmp_backward"}, "ends like an operator"),
    "no_kernels": ({"dense": None, "limits": ()}, "neither dense nor varlen kernels"),
    "no_limits": ({"limits": ()}, "dense kernels and dense limits must be given together"),
    "no_dense": ({"dense": None, "varlen": Kernels(stand_in.forward)}, "must be given together"),
    "varlen_limits": ({"varlen_limits": (stand_in.LIMITS,)}, "varlen kernels and varlen limits must be given together"),
    "gradient": ({"dense": Kernels(stand_in.forward)}, "promise a gradient, the kernels have no backward"),
}


@pytest.mark.parametrize("which", BAD_RECORDS)
def test_records_that_cannot_be_registered(which):
    changes, text = BAD_RECORDS[which]
    before = compiled_attn.list_backends()
    with pytest.raises(ValueError, match="cannot register backend") as refused:
        _register(**changes)
    assert text in str(refused.value)
    assert compiled_attn.list_backends() == before


def test_records_give_all_their_faults_at_once():
    with pytest.raises(ValueError, match="cannot register") as refused:
        _register(name="a-b", dense=None)
    assert len(str(refused.value).splitlines()) == 4


def test_a_new_backend_is_one_small_file():
    lines = inspect.getsource(stand_in).splitlines()
    assert len(lines) < 60
    assert compiled_attn.backend_info("stand_in").limits == (stand_in.LIMITS,)


@pytest.mark.parametrize("name", ["native", "_native_math", "stand_in", "switch"])
def test_determinism_is_promised_or_refused(name):
    leaf = X.clone().requires_grad_()
    limits = limits_on(name, "cpu")
    assert limits is not None
    if limits.deterministic == "global":
        with pytest.raises(NotImplementedError, match="use_deterministic_algorithms"):
            compiled_attn.attention(leaf, X, X, deterministic=True, backend=name)
        torch.use_deterministic_algorithms(True)
    first, second = (
        torch.autograd.grad(compiled_attn.attention(leaf, X, X, deterministic=True, backend=name).sum(), leaf)[0]
        for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_dispatch_attention_fn_has_every_option():
    query, key = torch.randn(2, 8, 4, 16), torch.randn(2, 9, 2, 16)
    padding = torch.rand(2, 9) > 0.3
    out, lse = compiled_attn.dispatch_attention_fn(
        query, key, key, None, 0.0, True, 0.2, True,
        {
            "return_lse": True, "key_padding_mask": padding, "causal_alignment": "lower_right", "window_size": (3, 0),
            "deterministic": False,
        },
        backend="_native_math",
    )  # fmt: skip
    expected = compiled_attn.reference.attention(
        query, key, key, key_padding_mask=padding, is_causal=True, causal_alignment="lower_right", scale=0.2,
        window_size=(3, 0),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=2e-6, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="context parallelism"):
        compiled_attn.dispatch_attention_fn(query, query, query, parallel_config=object())


@pytest.mark.parametrize(
    ("window", "lengths", "served"),
    [
        ((3, -1), (33, 17), False), ((3, 17), (33, 17), False), ((3, 16), (33, 17), True), ((-1, 2), (33, 17), True),
        ((3, -1), (17, 33), True), ((3, 40), (17, 33), True), ((3, -1), (17, 17), True),
    ],
    ids=str,
)  # fmt: skip
def test_flash_attention_2_has_no_open_window_for_more_queries_than_keys(window, lengths, served):
    """It would take an open right part for one of Sk keys, counted from the lower right: wrong without a word."""
    q_length, k_length = lengths
    shapes = ((1, q_length, 4, 64), (1, k_length, 4, 64), (1, k_length, 4, 64))
    call = Call(*shapes, (torch.float16,) * 3, ("cuda",) * 3, (9, 0), window=window, alignment="lower_right")
    found = registry.refusal(registry.find("_native_flash"), call)
    assert bool(found) != served
    if found:
        assert "right part is open or >= Sk" in found[0]


def _plain_kernels() -> Kernels:
    return Kernels(lambda q, k, v, *rest: (q.clone(), None, None))


def test_a_partner_serves_packed_calls_and_a_packed_name_is_its_operator():
    limits = (Limits(("cpu",), (torch.float32,), gradient=False),)
    wide = (Limits(("cpu",), (torch.float32,), gradient=False, window=True),)
    packed = Backend(
        "tmp_pair_varlen", "", limits, _plain_kernels(), varlen_limits=wide, varlen=_plain_kernels(), packed=True
    )
    compiled_attn.register_backend(packed)
    compiled_attn.register_backend(Backend("tmp_pair", "", limits, _plain_kernels(), partner="tmp_pair_varlen"))
    first, second = registry.find("tmp_pair_varlen"), registry.find("tmp_pair")
    assert [str(first.op), str(first.varlen_op)] == [
        "compiled_attn.tmp_pair_varlen_dense.v1",
        "compiled_attn.tmp_pair_varlen.v1",
    ]
    assert str(second.op) == "compiled_attn.tmp_pair.v1"
    assert second.varlen_op is first.varlen_op
    x, lengths = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    torch.testing.assert_close(compiled_attn.varlen_attention(x, x, x, lengths, lengths, backend="tmp_pair"), x)
    assert compiled_attn.why_not("tmp_pair", x, x, x, window_size=(1, 1)) == []


def test_a_partner_must_be_there_and_alone():
    limits = (Limits(("cpu",), (torch.float32,), gradient=False),)
    lost = Backend(
        "tmp_lost", "", limits, _plain_kernels(), varlen_limits=limits, varlen=_plain_kernels(), partner="no"
    )
    with pytest.raises(ValueError, match="'no' has no varlen kernels, or is not registered yet") as refused:
        compiled_attn.register_backend(lost)
    assert "varlen kernels or limits of its own" in str(refused.value)
