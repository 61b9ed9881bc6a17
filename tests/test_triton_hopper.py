"""`triton_hopper`: what it refuses, its plans, its arithmetic of places, its operators; on a GPU the kernel.

Gluon has no interpreter. ``hopper_emulated.py`` runs the kernel's source on a CPU, which finds wrong places and orders;
what the compiler makes of it, compile_tests/test_triton_compile.py looks at; the kernel itself needs an H100 or H200
(test_numerics.py and test_varlen.py have most of what it must do there).
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import itertools
import json
import pathlib
import re
import subprocess
import sys
import types

import hopper_emulated
import hopper_plans
import pytest
import torch
from graphs import Counter
from triton_here import HAS_GLUON, needs_gluon, needs_interpreter, needs_triton, run_interpreted

import compiled_attn
from compiled_attn import cli_explain, registry
from compiled_attn.ops import triton_hopper
from compiled_attn.packages import Unfit
from compiled_attn.spec import Call, reasons

ROOT = pathlib.Path(__file__).parent.parent
NAMES = ("triton_hopper", "triton_hopper_varlen")

CALL = Call(
    query=(2, 100, 4, 64), key=(2, 90, 2, 64), value=(2, 90, 2, 64), dtypes=(torch.bfloat16,) * 3,
    devices=("cuda",) * 3, capability=(9, 0), gqa=True, gradient=True, lse=True, deterministic=True,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ refusals
def test_what_it_takes():
    for change in (
        {},
        {"dtypes": (torch.float16,) * 3},
        {"mask": "key_padding"},
        {"causal": True, "window": (3, -1), "alignment": "lower_right"},
        {"query": (2, 100, 4, 8), "key": (2, 90, 2, 8), "value": (2, 90, 2, 8)},
    ):
        assert reasons((triton_hopper.LIMITS,), _call(**change)) == []


def _call(**change: object) -> Call:
    return dataclasses.replace(CALL, **change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (8, 0)}, "has kernels for compute capability 9.0, not 8.0"),
        ({"capability": (10, 0)}, "has kernels for compute capability 9.0, not 10.0"),
        ({"devices": ("cpu",) * 3, "capability": None}, "runs on cuda, not cpu"),
        ({"dtypes": (torch.float32,) * 3}, "takes bfloat16/float16, not float32"),
        ({"query": (2, 9, 4, 20), "key": (2, 9, 2, 20), "value": (2, 9, 2, 20)}, "head_dim=20 is not a multiple of 8"),
        ({"query": (2, 9, 4, 264), "key": (2, 9, 2, 264), "value": (2, 9, 2, 264)}, "head_dim=264 is over 256"),
        ({"value": (2, 90, 2, 32)}, "needs one head_dim"),
        ({"mask": "bool"}, "takes key_padding masks, so not a bool mask"),
        ({"mask": "key_padding", "causal": True}, "cannot place a causal mask or a window over a key-padding mask"),
        ({"mask": "key_padding", "window": (3, 3)}, "cannot place a causal mask or a window over a key-padding mask"),
        ({"dropout_p": 0.1}, "has no dropout"),
    ],
)
def test_what_it_refuses(change, reason):
    found = reasons((triton_hopper.LIMITS,), _call(**change))
    assert len(found) == 1
    assert reason in found[0]


def test_rocm_is_refused(monkeypatch):
    """A gfx90a says that its capability is (9, 0)."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "not for ROCm" in reasons((triton_hopper.LIMITS,), CALL)[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "ROCm" in triton_hopper.unavailable()[0]


@pytest.mark.parametrize(
    ("seen", "reason"),
    [([(8, 0), (12, 0)], "needs a GPU of compute capability (9, 0) (H100, H200), there are [(8, 0), (12, 0)]"),
     ([(8, 0), (9, 0)], None), ([], None)],
)  # fmt: skip
def test_a_process_without_such_a_gpu(monkeypatch, seen, reason):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: seen[index])
    assert triton_hopper.unavailable() == ([] if reason is None else [reason])


@needs_triton
@pytest.mark.skipif(HAS_GLUON, reason="this triton has the Gluon of the kernel")
def test_another_gluon_is_refused_with_what_it_lacks():
    (reason,) = triton_hopper.PACKAGE.missing()
    assert re.search(r"(has|takes) no ", reason)
    assert "written for triton 3.6 to 3.8" in reason


@needs_triton
@needs_gluon
def test_the_gluon_that_is_installed_is_taken_and_one_that_lacks_something_refused():
    module = importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    assert triton_hopper.bind(module).__name__ == "compiled_attn.ops._hopper_launch"
    poorer = types.SimpleNamespace(**{name: item for name, item in vars(module).items() if name != "warpgroup_mma"})
    with pytest.raises(Unfit, match="has no warpgroup_mma"):
        triton_hopper.bind(poorer)
    poorer.warpgroup_mma = lambda a, b, acc: None
    with pytest.raises(Unfit, match="warpgroup_mma takes no use_acc, is_async"):
        triton_hopper.bind(poorer)


def test_importing_the_package_imports_no_triton():
    code = "import sys, compiled_attn; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------------- explain
@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--query", "1,4608,24,128"], "triton_hopper"),
        (["--query", "1,4608,24,128", "--mask", "key_padding"], "triton_hopper"),
        (["--query", "9000,24,128"], "triton_hopper_varlen"),
        (["--query", "1,4608,24,128", "--gradient"], None),
        (["--query", "1,4608,24,128", "--causal"], None),
        (["--query", "1,4608,24,96"], "triton_hopper"),
        (["--query", "1,4608,24,160"], None),  # computed as 256 columns
        (["--query", "1,4608,24,128", "--mask", "bool"], None),
        (["--query", "1,4608,24,128", "--dtype", "float32"], None),
    ],
)
def test_explain_names_it_where_it_was_the_fastest(capsys, monkeypatch, options, name):
    monkeypatch.setattr(cli_explain, "_proven", lambda backend: True)
    from compiled_attn.__main__ import main

    assert main(["explain", *options, "--device", "cuda", "--capability", "9.0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fastest"] == name
    main(["explain", *options, "--device", "cuda", "--capability", "9.0"])
    assert ("measured fastest" in capsys.readouterr().out) == (name is not None)
    main(["explain", *options, "--device", "cuda", "--capability", "10.0", "--json"])
    assert json.loads(capsys.readouterr().out)["fastest"] is None


def test_a_kernel_that_no_gpu_ran_is_not_recommended():
    backend = registry.backend_info("triton_hopper")
    assert cli_explain._proven(backend) == (backend.limits[0].verified == "hardware")
    assert not cli_explain._proven(
        dataclasses.replace(backend, limits=(dataclasses.replace(triton_hopper.LIMITS, verified="not run"),))
    )


def test_a_backend_that_cannot_run_the_call_is_not_named_fastest(monkeypatch):
    monkeypatch.setattr(cli_explain, "_proven", lambda backend: True)
    verdict = {"name": "triton_hopper", "reasons": ["any"]}
    assert cli_explain._fastest(_call(gradient=False), [verdict]) is None
    assert cli_explain._fastest(_call(gradient=False), [{**verdict, "reasons": []}]) == "triton_hopper"


# ---------------------------------------------------------------------------------------------- plans, interpreted
@pytest.fixture(scope="module")
def plans() -> dict[str, str]:
    return run_interpreted("hopper_plans.py")


@pytest.fixture(scope="module")
def emulated() -> dict[str, str]:
    return run_interpreted("hopper_emulated.py")


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("case", hopper_plans.CASES)
def test_plans(plans, case):
    assert plans[case] == ""


@needs_triton
@needs_interpreter
@pytest.mark.parametrize("case", hopper_emulated.CASES)
def test_the_source_of_the_kernel(emulated, case):
    assert emulated[case] == ""


# ----------------------------------------------------------------------------- arithmetic of places, run by Python
class Pointer:
    """A list with pointer arithmetic."""

    def __init__(self, items, place=0):
        self.items, self.place = items, place

    def __add__(self, places):
        return Pointer(self.items, self.place + places)


@pytest.fixture
def tiles(monkeypatch):
    """The module of Gluon functions, with what they need of Gluon done on Python's integers."""
    pytest.importorskip("triton")
    module = importlib.import_module("compiled_attn.ops._hopper_tiles")
    gluon = types.SimpleNamespace(
        load=lambda pointer: pointer.items[pointer.place], minimum=min, maximum=max, program_id=lambda axis: 0,
        num_programs=lambda axis: 1, where=lambda condition, one, other: one if condition else other,
    )  # fmt: skip
    monkeypatch.setattr(module, "gl", gluon)
    monkeypatch.setattr(module, "FAR", 1 << 30)
    return module


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("programs", [2, 10, 14])
def test_every_turn_is_taken_once(tiles, programs, together):
    """``together``: how many programs take each."""
    taken = []
    for program in range(programs):
        tiles.gl.program_id, tiles.gl.num_programs = lambda axis, it=program: it, lambda axis: programs
        rounds = tiles.rounds_of.fn(4 * programs // together, together == 2)
        taken += [tiles.turn_of.fn(number, together == 2) for number in range(rounds)]
    assert sorted(taken) == sorted(list(range(4 * programs // together)) * together)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("together", [1, 2, 4, 6])
def test_turns_of_a_dense_call_cover_every_tile(tiles, together, right):
    batch, heads, q_length, k_length = 2, 3, 300, 200
    sizes = (3, heads, batch, q_length, k_length, together)
    seen = []
    for program in range(3 * heads * batch):
        number, head, first, start, rows, keys, *corners = tiles.place_of.fn(program, None, sizes, right, False, 128)
        assert (start, rows, keys, corners) == (0, q_length, k_length, [number, 0, number, 0])
        seen.append((number, head, first))
    assert sorted(seen) == list(itertools.product(range(batch), range(heads), (0, 128, 256)))
    if right and together == 6:
        assert [first for *_, first in seen] == sorted((first for *_, first in seen), reverse=True)


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("together", [1, 3])
def test_turns_of_a_packed_call_cover_every_tile(tiles, together, right):
    heads, records = 3, []
    sequences = [(300, 400, 90, 500), (0, 300, 0, 90), (400, 1, 590, 2)]  # rows and keys: begin, number
    for q_begin, rows, k_begin, keys in sequences:
        number = -(-rows // 128)
        records += [[len(records), number, q_begin, rows, k_begin, keys, 0, 0]] * number
    records.append([len(records), 1, 0, 0, 0, 0, 0, 0])
    plan = Pointer(list(itertools.chain(*records)))
    seen = []
    for program in range(len(records) * heads):
        number, head, first, start, rows, keys, *corners = tiles.place_of.fn(
            program, plan, (99, heads, 99, 99, 99, together), right, True, 128
        )
        assert number == 0
        if first < rows:
            seen.append((start, head, first, rows, keys))
            far = 1 << 30
            # row r of the sequence is at corners[1] + r: in front of FAR as long as r < rows
            assert corners[0] - far + corners[1] == start
            assert corners[1] + rows == far
            assert corners[3] + keys == far
    expected = [
        (q_begin, head, first, rows, keys)
        for q_begin, rows, _, keys in sequences
        for head in range(heads)
        for first in range(0, rows, 128)
    ]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("lower_right", [False, True])
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (-1, 37), (50, -1), (70, 5), (0, 0), (200, 200)])
@pytest.mark.parametrize(("q_length", "k_length"), [(300, 300), (300, 130), (130, 700), (1, 65), (65, 1)])
def test_blocks_hold_the_keys_that_a_tile_sees(tiles, q_length, k_length, left, right, lower_right):
    """Against each row's keys, counted: nothing is left out, and blocks without tests are seen whole by every row."""
    block = 64
    for first in range(0, q_length, 128):
        begin, end, shift, blocks, plain_begin, plain_end = tiles.keys_of.fn(
            first, q_length, k_length, left, right, left >= 0, right >= 0, lower_right, 128, block
        )
        seen = []
        for row in range(first, min(first + 128, q_length)):
            low = row + shift - left if left >= 0 else 0
            high = row + shift + right if right >= 0 else k_length
            seen.append(set(range(max(low, 0), min(high + 1, k_length))))
        assert shift == (k_length - q_length if lower_right else 0)
        walked = set(range(begin, min(begin + blocks * block, end)))
        assert set().union(*seen) <= walked
        assert 0 <= plain_begin <= plain_end <= blocks
        for step in range(plain_begin, plain_end):
            start = begin + (blocks - 1 - step) * block
            whole = set(range(start, start + block))
            assert all(whole <= one for one in seen)
        if left < 0 and right < 0:
            assert (plain_begin, plain_end) == (1 if k_length % block else 0, blocks)


# ----------------------------------------------------------------------------------------------------------- host side
@needs_triton
def test_tensors_that_tma_cannot_read_are_copied():
    from compiled_attn.ops import _hopper_launch as launch

    plain = torch.randn(2, 5, 3, 16, dtype=torch.bfloat16)
    qkv = torch.randn(2, 5, 3, 3, 16, dtype=torch.bfloat16)[:, :, 1]
    assert launch.readable(plain) is plain
    assert launch.readable(qkv) is qkv
    for odd in (
        plain[..., ::2],
        plain[:, :, :1].expand(-1, -1, 3, -1),
        torch.randn(481)[1:].view(2, 5, 3, 16),
        torch.randn(2, 5, 3, 20, dtype=torch.bfloat16)[..., :16],
    ):
        copy = launch.readable(odd)
        assert copy is not odd
        assert copy.is_contiguous()
        torch.testing.assert_close(copy, odd, rtol=0, atol=0)
    assert launch.folded(plain) is plain
    assert launch.folded(qkv) is qkv
    heads_first = plain.transpose(1, 2).contiguous().transpose(1, 2)
    assert launch.readable(heads_first) is heads_first
    assert launch.folded(heads_first).is_contiguous()


@needs_triton
def test_descriptors():
    from compiled_attn.ops import _hopper_launch as launch

    dense = launch._descriptor(torch.randn(2, 5, 3, 40, dtype=torch.bfloat16), 64, 64)
    assert (dense.shape, dense.strides[1:]) == ([1, 2, 3, 5, 40], [600, 40, 120, 1])
    packed = launch._descriptor(torch.randn(5, 3, 40, dtype=torch.bfloat16), 128, 64)
    assert packed.block_shape == [1, 1, 1, 128, 64]
    far, length, start = 1 << 30, 3, 1
    for row in range(length):  # addresses wrap at 2^64 bytes, 2^63 elements
        at = (far, start + length, 0, far - length + row, 0)
        address = sum(one * step for one, step in zip(at, packed.strides, strict=True))
        assert address % (1 << 63) == (start + row) * 120
        assert at[3] < packed.shape[3]
    assert far - length + length == packed.shape[3]  # the row behind is outside


@needs_triton
def test_every_head_dim_has_a_configuration_that_fits():
    from compiled_attn.ops import _hopper_launch as launch
    from compiled_attn.ops import _hopper_pairs

    for head_dim, positional, alone in itertools.product(range(8, 257, 8), (False, True), (False, True)):
        config, width = launch.choose(head_dim, positional, alone), launch.width_of(head_dim)
        assert head_dim <= width < max(2 * head_dim, 65)
        tiles = config.q_slots * config.consumers * 64 + (config.k_slots + config.v_slots) * config.block_k
        assert tiles * width * 2 + 8 * sum(_hopper_pairs.ROOM.value) <= 227 * 1024 - 512
        # programs in pairs walk over the same keys, and share a block out by halves of its columns
        assert not config.paired or (width == 128 and not positional and not alone)
        # 64 K registers: those of the computing warpgroups, and at least 24 a thread for the one that loads
        assert config.consumers * config.registers + 24 <= 512
        assert config.consumers in (2, 3)


@needs_triton
@pytest.mark.parametrize(
    ("q_length", "heads", "alone"),
    [
        (4608, 24, False),  # 7 rounds either way
        (32760, 40, False),  # 78
        (32800, 40, False),  # 78, and 79 where one tile of each head is idle
        (1, 1, False),  # one round, whoever is idle in it
        (128, 64 * 24, True),  # 12 rounds, but 24 where half of each pair is idle
        (1300, 24, True),  # 2 and 3
    ],
)
def test_pairs_only_where_they_leave_hardly_more_idle(q_length, heads, alone):
    from compiled_attn.ops import _hopper_launch as launch

    assert launch.better_alone(q_length, heads, 132) == alone


@needs_triton
def test_a_kernel_for_pairs_that_is_laid_out_otherwise_does_not_run(monkeypatch):
    """Its inline PTX would write anywhere."""
    from compiled_attn.ops import _hopper_launch as launch
    from compiled_attn.ops import _hopper_pairs as pairs

    config = launch.TABLE[128][0]
    slots, parts = (config.k_slots, config.v_slots), config.q_slots * config.consumers
    rows = 2 * sum(slots) * 128 * 128
    behind = rows + 2 * parts * 64 * 128
    used = (*slots, *slots, parts, parts)
    lines = [f".param .align 64 .b8 hopper_forward_param_{11 * number}[128]," for number in range(3)]
    at = [behind + place + 8 * one for place, count in zip(pairs._PLACES, used, strict=True) for one in range(count)]
    for number, place in enumerate((*at, rows + 16384, rows)):
        lines.append(f"add.s32 \t%r{number}, %r99, {place};")
        lines.append(f"mbarrier.init.shared::cta.b64 [%r{number}], 1;")
    lines[-3] = f"cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%rd1, {{%r5, %r6}}], [%r{len(at)}];"
    lines[-1] = f"cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%rd1, {{%r5, %r6}}], [%r{len(at) + 1}];"
    ptx = "\n".join(lines)
    found: list[str] = []
    monkeypatch.setattr(launch, "_misplaced", found)
    assert launch.check_pairs(config, 128, False, ptx)
    assert not found
    for old, new, what in (
        ("_11[128]", "_12[128]", "tensor map of K is not parameter hopper_forward_param_11"),
        (f"%r99, {at[3]};", f"%r99, {at[3] + 8};", "mbarriers are at bytes"),
        (f"%r99, {rows};", "%r99, 0;", f"rows of Q are at bytes [0, {rows + 16384}] of shared memory"),
        ("bulk_group", "bulk", "rows of Q are at bytes [] of shared memory"),
    ):
        assert old in ptx
        with pytest.warns(UserWarning, match="programs work alone.*\\n.*" + re.escape(what)):
            assert not launch.check_pairs(config, 128, False, ptx.replace(old, new))
        assert any(what in one for one in found)
    with pytest.warns(UserWarning, match="tensor map of copies of K"):
        assert not launch.check_pairs(config, 128, True, ptx)


Metadata = collections.namedtuple("Metadata", ["target", "num_warps", "num_ctas", "shared"])


class Kernel:
    """Of Triton's kernels what a launch in pairs asks for; compiling gives itself."""

    asm = types.MappingProxyType({"ptx": "its ptx"})
    packed_metadata = None

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.metadata = Metadata(GPUTarget("cuda", 90, 32), 4, 1, 1000)
        self.compiled = 0
        self.ran: list = []

    def warmup(self, *arguments, grid, num_warps, **constants):
        self.compiled += 1
        return self

    def __getitem__(self, grid):
        return lambda *arguments: self.ran.append((grid, arguments, self.packed_metadata))


@needs_gluon
def test_a_launch_in_pairs_asks_first_and_for_clusters_of_two(monkeypatch):
    from compiled_attn.ops import _quick_launch

    monkeypatch.setattr(_quick_launch, "_compiled", {})
    kernel, asked = Kernel(), []

    def launch(says):
        def paired(ptx):
            asked.append(ptx)
            return says

        return _quick_launch.launch(kernel, (66, 1, 1), (3, 0.5), {"WIDTH": 128}, 4, 0, paired)

    assert not launch(False)
    assert (kernel.ran, asked) == ([], ["its ptx"])
    assert launch(True)
    assert launch(True)
    assert kernel.ran == [((66, 1, 1), (3, 0.5, 128), (4, 2, 1000))] * 2
    assert (kernel.compiled, len(asked)) == (2, 2)  # once for the refusal, once for all launches


# ----------------------------------------------------------------------------------------------------------- operators
def meta(*shapes, dtype=torch.bfloat16):
    return [torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_code_calls_the_operator(name):
    """Opaque: one node, in the graph and in what is traced of it."""
    counter = Counter("aot_eager")
    inputs = meta((2, 5, 4, 16), (2, 7, 4, 16), (2, 7, 4, 16))
    starts = torch.empty(3, device="meta", dtype=torch.int32)

    def call(query, key, value):
        dense = compiled_attn.attention(query, key, value, backend=name)
        packed = compiled_attn.varlen_attention(query[0], key[0], value[0], starts, starts, 5, 7, backend=name)
        return dense, packed

    dense, packed = torch.compile(call, fullgraph=True, backend=counter)(*inputs)
    assert (dense.shape, packed.shape) == ((2, 5, 4, 16), (5, 4, 16))
    assert counter.operators() == [[registry.backend_info(name).operator_names()[0], "triton_hopper_varlen"]]
    (dense.sum() + packed.sum()).backward()
    assert inputs[0].grad.shape == (2, 5, 4, 16)
