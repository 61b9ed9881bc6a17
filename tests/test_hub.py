"""Kernels of the Hub, offline: local folders instead of downloads, refusals, and nothing fetched behind one's back."""

from __future__ import annotations

import socket
import subprocess
import sys
import types

import flash_checks
import pytest
import recorded
import torch
from graphs import Counter
from matrix import NAMES, Case, assert_as_good, expectations, largest, measured, plain
from stand_ins import hub as folders

import compiled_attn
from compiled_attn import cli_verify, reference, registry
from compiled_attn.ops import _hub_kernel, hub

kernels = pytest.importorskip("kernels", reason="needs the package kernels (pip install kernels)")

HUB = [name for name in compiled_attn.list_backends() if name.endswith("_hub")]
REPOSITORIES = {
    "flash_hub": ("kernels-community/flash-attn2", 3),
    "flash_varlen_hub": ("kernels-community/flash-attn2", 3),
    "_flash_3_hub": ("kernels-community/flash-attn3", 1),
    "_flash_3_varlen_hub": ("kernels-community/flash-attn3", 1),
    "flash_4_hub": ("kernels-community/flash-attn4", 0),
    "sage_hub": ("SageAttention/sage-attention", 3),
    "sage_blackwell_hub": ("SageAttention/sage-blackwell", 1),
    "aiter_fa2_hub": ("kernels-community/aiter-flash-attn-ck", 1),
}
SAGE = "SageAttention/sage-attention"


def package(name):
    (found,) = registry.backend_info(name).packages
    return found


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no cache, none of the user's settings; every kernel is forgotten before and afterwards."""

    def refuse(*args, **kwargs):
        raise AssertionError("somebody asked for a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("LOCAL_KERNELS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", _hub_kernel.TRUST):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path / "cache"))
    for name in HUB:
        package(name).forget()
    yield
    for name in HUB:
        package(name).forget()
    hub._facts.__init__()


@pytest.fixture
def local(monkeypatch, tmp_path):
    """``local(sage_hub="sage")``: LOCAL_KERNELS with a folder for that backend's repository."""

    def set_up(**kinds):
        entries = [
            f"{REPOSITORIES[name][0]}={folders.folder(tmp_path, kind, REPOSITORIES[name][1])}"
            for name, kind in kinds.items()
        ]
        monkeypatch.setenv("LOCAL_KERNELS", ":".join(entries))

    return set_up


def tensors(q_length=17, k_length=33, heads=4, key_heads=4, width=64):
    shapes = ((q_length, heads), (k_length, key_heads), (k_length, key_heads))
    return [torch.randn(2, length, of, width).bfloat16() for length, of in shapes]


def run(name, q, k, v, key_padding=None, is_causal=False, scale=None, return_lse=False):
    """The kernel itself, past the rules, which want a GPU."""
    forward = registry.find(name).backend.dense.forward
    return forward(
        q, k, v, None, key_padding, 0.0, int(is_causal), scale, q.shape[2] != k.shape[2], None, False, return_lse
    )[:2]


def hold(name, q, k, v, **asked):
    out, lse = run(name, q, k, v, **asked)
    asked.pop("return_lse", None)
    key_padding = asked.pop("key_padding", None)
    right, right_lse = reference.attention(q, k, v, key_padding_mask=key_padding, **asked)
    plain_out, plain_lse = plain(q, k, v, key_padding_mask=key_padding, **asked)
    assert_as_good("out", out.contiguous(), right, plain_out)
    if lse is not None:
        assert_as_good("lse", lse, right_lse, plain_lse)


def test_repositories_and_versions():
    assert {name: (package(name).repo, package(name).pinned) for name in HUB} == {
        name: REPOSITORIES[name] for name in HUB
    }
    assert set(HUB) == set(REPOSITORIES)


def test_sage_from_a_local_folder(local):
    local(sage_hub="sage")
    compiled_attn.set_default_backend("sage_hub")
    q, k, v = tensors(key_heads=2, width=40)
    hold("sage_hub", q, k, v)
    hold("sage_hub", q, k, v, return_lse=True, scale=0.2)
    hold("sage_hub", *tensors(33, 33), is_causal=True)
    call = {"mask": "key_padding"}
    assert "takes key_padding masks" not in "".join(refused("sage_hub"))
    assert any("so not a key_padding mask" in reason for reason in refused("sage_hub", **call))


FLASH = [
    ("flash_hub", "flash_varlen_hub", "flash2"),
    ("_flash_3_hub", "_flash_3_varlen_hub", "flash3"),
    ("flash_4_hub", None, "flash4"),
    ("aiter_fa2_hub", None, "aiter"),
]


@pytest.mark.parametrize(("name", "packed_name", "kind"), FLASH)
def test_flash_from_a_local_folder(local, name, packed_name, kind):
    local(**{name: kind})
    package(name).load()
    q, k, v = tensors(key_heads=2)
    keep = torch.rand(2, 33) > 0.4
    hold(name, q, k, v, return_lse=True)
    hold(name, q, k, v, key_padding=keep)
    if packed_name is not None:
        assert package(packed_name) is package(name)  # one kernel, loaded once
        hold(packed_name, q, k, v)
    starts = torch.tensor([0, 5, 5, 17], dtype=torch.int32)
    q, k, v = (x[0, :17].contiguous() for x in (q, k, v))
    forward = registry.find(name).backend.varlen.forward
    out, *_ = forward(q, k, v, starts, starts, 12, 12, 0.0, 0, None, True, None, False, False)
    right, _ = reference.varlen_attention(q, k, v, starts, starts)
    yardstick = torch.cat([plain(q[None, a:b], k[None, a:b], v[None, a:b])[0][0] for a, b in ((0, 5), (5, 17))])
    assert_as_good("out", out, right, yardstick)


@pytest.mark.parametrize(
    ("name", "record", "interface"),
    [
        ("flash_hub", "flash-attn2-hub", "flash_attn_interface"),
        ("_flash_3_hub", "flash-attn3-hub", "flash_attn_interface"),
        ("flash_4_hub", "flash-attn4-hub", "interface"),
        ("aiter_fa2_hub", "aiter-flash-attn-ck-hub", None),
        ("sage_hub", "sage-attention-hub", None),
        ("sage_blackwell_hub", "sage-attention-hub", None),
    ],
)
def test_the_sources_of_the_hub_have_what_we_bind(name, record, interface):
    """By the signatures in github.com/huggingface/kernels-community, which the Hub's builds are made of."""
    module = types.SimpleNamespace()
    for path in recorded.record(record)["functions"]:

        def stand_in(**given):
            raise AssertionError("only its signature counts")

        setattr(module, path.split(":")[1], recorded.as_recorded(record, path)(stand_in))
    package(name).bind(module if interface is None else types.SimpleNamespace(**{interface: module}))
    hub._facts.__init__()


@pytest.mark.parametrize("width", [40, 64, 100, 128])
@pytest.mark.parametrize("shape", [(17, 33, 4), (1, 1, 1), (1, 33, 1)])  # with one head, transposing copies nothing
def test_sage_blackwell_leaves_the_callers_keys_alone(local, width, shape):
    local(sage_blackwell_hub="blackwell")
    registry.usable("sage_blackwell_hub")
    q_length, k_length, heads = shape
    q, k, v = tensors(q_length, k_length, heads, heads, width)
    k += 3
    before = k.clone()
    hold("sage_blackwell_hub", q, k, v)
    hold("sage_blackwell_hub", q, k, v, scale=0.05)
    torch.testing.assert_close(k, before, rtol=0, atol=0)
    if q_length == k_length:
        hold("sage_blackwell_hub", q, k, v, is_causal=True)


WIDE = (2, 64, 4, 256)


def refused(name, **facts):
    from test_sage import cuda_call

    return registry.refusal(registry.find(name), cuda_call(**facts))


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("sage_hub", {"capability": (8, 6)}, "has kernels for compute capability 8.0, 8.9, 9.0, 12.0, not 8.6"),
        ("sage_hub", {"gradient": True}, "inference-only"),
        ("sage_hub", {"mask": "key_padding"}, "so not a key_padding mask"),
        ("flash_4_hub", {"capability": (10, 0), **dict.fromkeys(("query", "key", "value"), WIDE)}, "up to 128"),
        ("sage_blackwell_hub", {"capability": (9, 0)}, "has kernels for compute capability 12.x, not 9.0"),
        ("sage_blackwell_hub", {"capability": (12, 0), "mask": "bool"}, "takes no masks"),
        ("sage_blackwell_hub", {"capability": (12, 0), "lse": True}, "returns no lse"),
        ("sage_blackwell_hub", {"capability": (12, 0), "key": (2, 64, 2, 64)}, "has no grouped-query attention"),
    ],
)
def test_limits(name, facts, reason):
    assert any(reason in found for found in refused(name, **facts))


def test_looking_fetches_nothing():
    """list, explain and every question: the network of this test raises."""
    for name in HUB:
        registry.unavailable(name)
    x = torch.randn(1, 8, 2, 64)
    compiled_attn.explain(x, x, x)
    for name in HUB:
        compiled_attn.why_not(name, x, x, x)
        assert "loaded" not in package(name).__dict__


def test_kernels_is_not_imported_by_looking():
    code = (
        "import sys, compiled_attn; from compiled_attn import registry\n"
        "for name in compiled_attn.list_backends(): registry.find(name).backend.packages\n"
        "registry.unavailable('sage_hub'); print('kernels' in sys.modules, 'huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_call_fetches_nothing(local):
    local(sage_hub="sage")
    with pytest.raises(NotImplementedError, match="'SageAttention/sage-attention' is not loaded: kernels of the Hub"):
        run("sage_hub", *tensors())
    assert "loaded" not in package("sage_hub").__dict__
    with compiled_attn.attention_backend("sage_hub"):
        assert "loaded" in package("sage_hub").__dict__


@pytest.mark.parametrize("value", ["1", "on", "True"])
def test_offline_and_not_cached(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    (reason,) = registry.unavailable("sage_hub")
    assert reason.startswith(f"{SAGE} version 3 is not in the cache, and HF_HUB_OFFLINE is set")
    with pytest.raises(NotImplementedError, match="backend 'sage_hub' cannot run here"):
        compiled_attn.set_default_backend("sage_hub")
    with pytest.raises(NotImplementedError, match="HF_HUB_OFFLINE is set"):
        package("sage_hub").load()


@pytest.mark.parametrize("layout", ["kernels--", "models--"])
def test_offline_and_cached(monkeypatch, tmp_path, layout):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refs = tmp_path / "cache" / (layout + SAGE.replace("/", "--")) / "refs"
    refs.mkdir(parents=True)
    (refs / "v2").write_text("0" * 40)
    assert registry.unavailable("sage_hub") != []  # another version
    (refs / "v3").write_text("0" * 40)
    assert registry.unavailable("sage_hub") == []
    monkeypatch.delenv("KERNELS_CACHE")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert registry.unavailable("sage_hub") == []


def test_where_kernels_looks_for_its_cache(monkeypatch, tmp_path):
    """Our look at the cache goes by the files that `kernels` itself reads."""
    from kernels import _versions

    refs = tmp_path / "cache" / f"kernels--{SAGE.replace('/', '--')}" / "refs"
    refs.mkdir(parents=True)
    (refs / "v3").write_text("0" * 40)
    assert list(_versions._get_available_versions_from_cache(SAGE)) == [3]
    assert package("sage_hub")._cached()


def get_kernel_raising(monkeypatch, error):
    def get_kernel(
        repo_id, *, revision=None, version=None, backend=None, user_agent=None, trust_remote_code=False, check_arch=True
    ):
        asked.append((repo_id, version, trust_remote_code))
        raise error

    asked = []
    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    return asked


def test_untrusted_publishers_are_refused(monkeypatch):
    text = f"Kernel repository '{SAGE}' is not from a trusted publisher. Set trust_remote_code=True or add it."
    asked = get_kernel_raising(monkeypatch, ValueError(text))
    with pytest.raises(NotImplementedError, match="not one that the Hub calls trusted") as refusal:
        compiled_attn.set_default_backend("sage_hub")
    assert f"set COMPILED_ATTN_TRUST_REMOTE_CODE={SAGE}" in str(refusal.value)
    monkeypatch.setenv(_hub_kernel.TRUST, f"somebody/else, {SAGE}")
    with pytest.raises(NotImplementedError):
        compiled_attn.set_default_backend("sage_hub")
    assert asked == [(SAGE, 3, False), (SAGE, 3, ["somebody/else", SAGE])]
    assert compiled_attn.active_backend() == "native"


def test_the_real_check_of_publishers_needs_an_answer():
    """Without a network `kernels` cannot ask who the publisher is: a refusal, and no code of theirs runs."""
    with pytest.raises(NotImplementedError, match="COMPILED_ATTN_TRUST_REMOTE_CODE=SageAttention/sage-attention"):
        compiled_attn.set_default_backend("sage_hub")


def test_a_failed_download_may_be_tried_again(monkeypatch, local):
    with monkeypatch.context() as patch:
        get_kernel_raising(patch, ConnectionError("no route to host"))
        with pytest.raises(NotImplementedError, match="ConnectionError: no route to host"):
            compiled_attn.set_default_backend("sage_hub")
    local(sage_hub="sage")
    compiled_attn.set_default_backend("sage_hub")


def test_folders_that_do_not_serve(monkeypatch, local, tmp_path):
    monkeypatch.setenv("LOCAL_KERNELS", f"{SAGE}=/nowhere/at/all")
    assert registry.unavailable("sage_hub") == [f"LOCAL_KERNELS names '/nowhere/at/all' for {SAGE}, which is no folder"]
    monkeypatch.setenv("LOCAL_KERNELS", "sage")
    (reason,) = registry.unavailable("sage_hub")
    assert reason.startswith("LOCAL_KERNELS has 'sage'; write repository=folder")
    local(sage_hub="broken")
    with pytest.raises(NotImplementedError, match=r"OSError: libcudart\.so\.12"):
        compiled_attn.set_default_backend("sage_hub")
    local(sage_blackwell_hub="empty")
    with pytest.raises(NotImplementedError, match="has no sageattn3_blackwell"):
        compiled_attn.set_default_backend("sage_blackwell_hub")
    assert registry.unavailable("sage_blackwell_hub") == ["has no sageattn3_blackwell"]  # it will stay so
    monkeypatch.setenv("LOCAL_KERNELS", f"{SAGE}={folders.folder(tmp_path / 'other', 'sage', variant='torch99-cpu')}")
    with pytest.raises(NotImplementedError, match="Cannot find a build variant for this system"):
        compiled_attn.set_default_backend("sage_hub")


def test_too_old_and_absent(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.13.0")
    assert registry.unavailable("sage_hub") == ["kernels 0.13.0 is older than 0.14; pip install 'kernels>=0.14'"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    assert registry.unavailable("sage_hub") == ["module 'kernels' is not installed; pip install 'kernels>=0.14'"]


@pytest.mark.parametrize("name", HUB)
def test_graphs_and_exported_programs_name_our_operator(name):
    """The Hub's operators carry a hash of their build; a graph that named one would run with that build alone."""
    from torch._dynamo.testing import CompileCounterWithBackend

    x = torch.randn(2, 64, 4, 64, device="meta", dtype=torch.bfloat16)

    class Model(torch.nn.Module):
        def forward(self, x):
            return compiled_attn.attention(x, x, x, backend=name)

    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        assert torch.compile(Model(), backend=counter, fullgraph=True)(x).shape == x.shape
        program = torch.export.export(Model(), (x,))
    operator, _ = registry.backend_info(name).operator_names()
    for graph in (counter.graphs[0].graph, program.graph):
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert [target for target in targets if "attn" in target] == [f"compiled_attn.{operator}.v1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_opcheck(local, name):
    """With the stand-in of its library behind it."""
    kinds = {"sage_hub": "sage", "sage_blackwell_hub": "blackwell"}
    for dense, packed, kind in FLASH:
        kinds[dense] = kinds[packed] = kind
    local(**{name: kinds[name]})
    package(name).load()
    flash_checks.opcheck(name, torch.bfloat16 if "sage" in name else torch.float32)


# backend, kind of folder, the library it is made of
REAL_FLASH = [
    ("flash_hub", "real_flash2", "flash_attn"),
    ("flash_varlen_hub", "real_flash2", "flash_attn"),
    ("flash_4_hub", "real_flash4", "flash_attn.cute"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind", "library"), [("sage_hub", "real_sage", "sageattention"), *REAL_FLASH])
def test_gpu_real_libraries_in_local_folders(local, name, kind, library):
    """The whole way but the download: set, eager, one graph with our operator, and what ``list --verify`` says."""
    pytest.importorskip(library)
    from torch._dynamo.testing import CompileCounterWithBackend

    local(**{name: kind})
    q, k, v = (x.cuda() for x in tensors(100, 130))
    counter = CompileCounterWithBackend("inductor")
    with torch.no_grad(), compiled_attn.attention_backend(name):
        expected = compiled_attn.attention(q, k, v)
        compiled = torch.compile(lambda q, k, v: compiled_attn.attention(q, k, v) + 1, backend=counter, fullgraph=True)
        actual = compiled(q, k, v)
    torch.testing.assert_close(actual, expected + 1, rtol=0, atol=0)
    targets = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    assert f"compiled_attn.{registry.backend_info(name).operator_names()[0]}.v1" in targets
    found = list(cli_verify.outcomes_of([name]))
    assert [one.wrong for one in found] == [""] * len(found)
    assert found[0].errors[0] is not None


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "kind", "library"), REAL_FLASH)
@pytest.mark.parametrize("mask", ["none", "key_padding"])
def test_gpu_training_with_dynamic_lengths(local, name, kind, library, mask):
    """One graph for two lengths; out, lse and gradients against float64."""
    pytest.importorskip(library)
    local(**{name: kind})
    registry.usable(name)
    torch.compiler.reset()
    counter = Counter("aot_eager")
    compiled = torch.compile(
        lambda **kw: compiled_attn.attention_with_lse(**kw, backend=name), fullgraph=True, dynamic=True, backend=counter
    )
    for q_length, k_length in ((33, 70), (100, 130)):
        case = Case("cuda", torch.bfloat16, q_length=q_length, k_length=k_length, width=64, mask=mask)
        arguments = case.arguments()
        right, yardstick = expectations(arguments)
        for what, *three in zip(NAMES, measured(compiled, arguments), right, yardstick, strict=True):
            assert_as_good(what, *three, largest(*right[2:]))
    assert counter.backends() == [[name]]
