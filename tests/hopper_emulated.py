"""Runs the source of the Hopper kernel on a CPU, launcher included; prints, as JSON, what was wrong with each case.

A program of its own, started with TRITON_INTERPRET=1 by ``test_triton_hopper.py``. Triton's interpreter runs the
kernels that plan; the Gluon kernel, for which there is none, runs as Python with what it needs of Gluon done here: a
warpgroup is a thread, a TMA load happens some time after it was asked for and a store when it is waited for, mbarriers
count. Programs in pairs run at the same time, and find each other's memory where the kernel's PTX would. A product
takes what its operands hold when it is issued and fails if they hold something else when it is waited for. So this
finds wrong places, phases and orders, waits and fences that are missing, and deadlocks; not what the compiler makes of
the source.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import queue
import random
import sys
import threading
import time
import types
from typing import Any

import torch
from torch import Tensor

from compiled_attn import reference

PATIENCE = 30.0  # seconds before a wait is called a deadlock
PROCESSORS = 4
change = threading.Condition()


class Tile(torch.Tensor):
    """A tensor of Gluon: of one element for a scalar."""

    type = types.SimpleNamespace(layout=None)  # type: ignore[assignment]

    def split(self) -> Any:  # type: ignore[override]
        return self[..., 0], self[..., 1]


def tile(value: Any) -> Tile:
    return torch.as_tensor(value).as_subclass(Tile)


class Pointer:
    def __init__(self, items: Tensor, place: Any = 0) -> None:
        self.items, self.place = items.flatten(), place

    def __add__(self, places: Any) -> Pointer:
        return Pointer(self.items, self.place + places)


class Shared:
    """One allocation in shared memory; ``partner`` is that of the other program of a pair."""

    place: int
    partner: Shared

    def __init__(self, dtype: Any, shape: list[int], layout: Any) -> None:
        barriers = len(shape) == 2
        self.slots: list[Any] = [
            Barrier(self, index) if barriers else Slot(self, index, shape[1:], dtype) for index in range(shape[0])
        ]
        self.nbytes = shape[0] * (8 if barriers else self.slots[0].data.nbytes)
        of_thread("allocations").append(self)

    def index(self, place: Any) -> Any:
        return self.slots[int(place)]


class Inside:
    """What an allocation consists of."""

    def __init__(self, owner: Shared, index: int) -> None:
        self.owner, self.index = owner, index

    @property
    def partner(self) -> Any:
        return self.owner.partner.slots[self.index]

    @property
    def place(self) -> int:
        """Its byte, if Triton puts the larger allocation in front of the smaller."""
        return self.owner.place + self.index * (self.owner.nbytes // len(self.owner.slots))


class Barrier(Inside):
    count = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def step(self, arrivals: int = 0, expected: int = 0, copied: int = 0) -> None:
        with change:
            assert self.count, "an mbarrier that was not made"
            self.missing -= arrivals
            self.bytes += expected - copied
            assert self.missing >= 0, "more arrivals than the barrier counts"
            if self.missing == 0 and self.bytes == 0:
                self.phase += 1
                self.missing = self.count
                change.notify_all()

    def wait(self, parity: int) -> None:
        with change:
            if not change.wait_for(lambda: self.phase & 1 != parity, PATIENCE):
                raise TimeoutError("deadlock")


class Slot(Inside):
    """A tile in shared memory."""

    def __init__(self, owner: Shared, index: int, shape: list[int], dtype: torch.dtype) -> None:
        super().__init__(owner, index)
        self.data = torch.full(shape, math.nan, dtype=dtype)
        self.unfenced: set[int] = set()  # threads that read or wrote it, and that TMA may not have seen do so

    def permute(self, order: Any) -> Turned:
        return Turned(self)

    def _reinterpret(self, *_: Any) -> Slot:
        return self

    def store(self, value: Tensor) -> None:
        self._touch()
        self.data.copy_(value)

    def load(self, layout: Any) -> Tile:
        self._touch()
        return tile(self.data.clone())

    def _touch(self) -> None:
        self.unfenced.add(threading.get_ident())
        of_thread("touched").append(self)

    def read(self) -> Tensor:
        return self.data


class Turned:
    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def read(self) -> Tensor:
        return self.slot.data.t()


class Descriptor:
    """What the tensor map of a TensorDescriptor does: bounds for each dimension, addresses that wrap at 2^64 bytes."""

    def __init__(self, made: Any) -> None:
        self.made, self.dtype, self.layout = made, made.base.dtype, made.layout
        rows, width = made.block_shape[-2:]
        self.block_type = types.SimpleNamespace(nbytes=rows * width * 2)
        storage = made.base.untyped_storage()
        self.memory = torch.tensor([], dtype=self.dtype).set_(storage)
        self.start = made.base.storage_offset()

    def places(self, at: list[Any]) -> tuple[range, range, int]:
        """Rows and columns of a block that are inside, and the address of the first element."""
        at = [int(one) for one in at]
        rows, width = self.made.block_shape[-2:]
        *outer, row_limit, columns = self.made.shape
        inside = all(0 <= one < size for one, size in zip(at, outer, strict=False))
        address = sum(one * step for one, step in zip(at, self.made.strides, strict=True)) % (1 << 63)
        count = min(max(row_limit - at[3], 0), rows) if inside else 0
        return range(count), range(min(columns - at[4], width)), self.start + address

    def view(self, at: list[Any]) -> Tensor | None:
        rows, columns, address = self.places(at)
        if not len(rows):
            return None
        return self.memory.as_strided((len(rows), len(columns)), (self.made.strides[3], 1), address)


class Engine(threading.Thread):
    """Copies, one after the other, each some time after it was asked for."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.jobs: queue.Queue[Any] = queue.Queue()
        self.errors: list[BaseException] = []
        self.start()

    def run(self) -> None:
        while True:
            job = self.jobs.get()
            time.sleep(random.random() * 3e-4)
            try:
                job()
            except BaseException as error:
                self.errors.append(error)


loads = Engine()
mine = threading.local()


def of_thread(name: str) -> list[Any]:
    """A list of the warpgroup that asks."""
    if not hasattr(mine, name):
        setattr(mine, name, [])
    return getattr(mine, name)  # type: ignore[no-any-return]


def program() -> int:
    return of_thread("program")[0]  # type: ignore[no-any-return]


def fence() -> None:
    for slot in of_thread("touched"):
        slot.unfenced.discard(threading.get_ident())
    of_thread("touched").clear()


def copy_in(rows: Descriptor, at: Any, full: Barrier, slot: Slot, pred: Any = True) -> None:
    if not pred:
        return
    assert not slot.unfenced, "a load by TMA into a tile without a fence behind who read it"
    at = list(at)
    slot.data.fill_(math.nan)

    def job() -> None:
        source = rows.view(at)
        slot.data.zero_()
        if source is not None:
            slot.data[: source.shape[0], : source.shape[1]] = source
        full.step(copied=rows.block_type.nbytes)

    loads.jobs.put(job)


def copy_to_both(
    rows: Descriptor, copies: Descriptor, at: Any, full: Barrier, slot: Slot, packed: Any, tile: Any, barrier: Any,
    keys: bool, listed: bool,
) -> None:  # fmt: skip
    """Half the columns of a block, to both programs of a pair."""
    if listed and packed:
        rows = copies
    place = int(tile) * slot.data.nbytes
    assert (slot.place, full.place) == (place, int(barrier)), "a copy to another place than is counted there"
    width = slot.data.shape[1] // 2
    begin = program() % 2 * width
    columns = slice(begin, begin + width)
    at = [*list(at)[:4], begin]
    for one in (slot, slot.partner):
        assert not one.unfenced, "a load by TMA into a tile without a fence behind who read it"
        one.data[:, columns] = math.nan

    def job() -> None:
        source = rows.view(at) if begin < rows.made.shape[4] else None
        for one, counted in ((slot, full), (slot.partner, full.partner)):
            one.data[:, columns] = 0
            if source is not None:
                part = source[:, :width]
                one.data[: part.shape[0], begin : begin + part.shape[1]] = part
            counted.step(copied=rows.block_type.nbytes // 2)

    loads.jobs.put(job)


def tell_partner(empty: Shared, slot: Any, keys: bool, behind: int) -> None:
    from compiled_attn.ops import _hopper_pairs

    barrier = empty.index(slot)
    place = behind + int(slot) * 8 + _hopper_pairs._PLACES[0 if keys else 1]
    assert barrier.place == place, "another mbarrier than the slot's"
    barrier.partner.step(arrivals=1)


def copy_out(rows: Descriptor, at: Any, slot: Slot) -> None:
    assert not slot.unfenced, "a store by TMA of a tile without a fence behind who wrote it"
    at = list(at)

    def job() -> None:
        target = rows.view(at)
        if target is not None:
            target.copy_(slot.data[: target.shape[0], : target.shape[1]])

    of_thread("pending").append(job)  # as late as may be: until somebody waits


def store_wait(pendings: int) -> None:
    pending = of_thread("pending")
    while len(pending) > pendings:
        pending.pop(0)()


class Named:
    """The named barriers: each opens when as many threads have arrived as those who come say."""

    def __init__(self) -> None:
        self.arrived: dict[tuple[int, int], int] = {}
        self.opened: dict[tuple[int, int], int] = {}

    def clear(self) -> None:
        self.arrived.clear()
        self.opened.clear()

    def arrive(self, number: Any, threads: int, warps: int) -> int:
        """How often the barrier had opened before."""
        assert 5 <= int(number) < 16, "one of Triton's own barriers, or none at all"
        key = (program(), int(number))
        with change:
            opened = self.opened.setdefault(key, 0)
            arrived = self.arrived.get(key, 0) + 32 * warps
            assert arrived <= threads, "more arrive than the barrier counts: it would open for nobody"
            if arrived == threads:
                arrived = 0
                self.opened[key] += 1
                change.notify_all()
            self.arrived[key] = arrived
            return opened

    def wait(self, number: Any, threads: int, warps: int) -> None:
        opened = self.arrive(number, threads, warps)
        key = (program(), int(number))
        with change:
            if not change.wait_for(lambda: self.opened[key] > opened, PATIENCE):
                raise TimeoutError("deadlock")


named = Named()


class Product:
    def __init__(self, operands: list[Any], acc: Tensor | None) -> None:
        self.operands = operands
        self.held = [one.read().clone() if hasattr(one, "read") else one for one in operands]
        left, right = (one.float() for one in self.held)
        self.result = tile(left @ right if acc is None else acc + left @ right)
        self.running = True
        of_thread("products").append(self)

    def finish(self) -> None:
        for one, held in zip(self.operands, self.held, strict=True):
            if hasattr(one, "read"):
                assert torch.equal(one.read(), held), "an operand was overwritten while the product ran"
        self.running = False


def product_wait(outstanding: int, deps: tuple[Product]) -> Tile:
    products = of_thread("products")
    while len(products) > outstanding:
        products.pop(0).finish()
    assert not deps[0].running, "a result was taken while the product ran"
    return deps[0].result


class Cluster:
    """Programs that run at the same time: one, or the two of a pair."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.allocations: list[list[Shared]] = []
        self.started = threading.Barrier(size)
        self.met: dict[int, int] = {}

    def enter(self, allocations: list[Shared]) -> None:
        """Find where everything is; for a pair, the other's too."""
        place = 0
        for one in sorted(allocations, key=lambda one: -one.nbytes):
            one.place = place
            place += one.nbytes
        with change:
            self.allocations.append(allocations)
        self.started.wait(PATIENCE)
        if self.size == 2:
            other = self.allocations[self.allocations[0] is allocations]
            for one, partner in zip(allocations, other, strict=True):
                one.partner = partner


def meet(warps: int) -> None:
    """All warps of both programs wait for one another, those too that Triton would add to fill a warpgroup."""
    cluster, asked = of_thread("cluster")
    assert warps == asked, "some warps of a partition do not come"
    times = of_thread("met")
    times.append(warps)
    with change:
        cluster.met[len(times)] = cluster.met.get(len(times), 0) + warps
        change.notify_all()
        # 12 warps each: what is no multiple of 4 Triton fills up
        if not change.wait_for(lambda: cluster.met[len(times)] == 24, PATIENCE):
            raise TimeoutError("deadlock")


def at_once(run: Any, calls: list[tuple[Any, ...]], patience: float) -> list[BaseException]:
    """``run`` with each of ``calls``, each in a thread of its own; what they raised."""
    errors: list[BaseException] = []

    def one(*arguments: Any) -> None:
        try:
            run(*arguments)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=arguments, daemon=True) for arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
    return errors


def warp_specialize(functions: list[Any], warps: list[int], registers: list[int]) -> None:
    (cluster,) = of_thread("alone")
    number = program()
    cluster.enter(of_thread("allocations"))

    def run(function: Any, arguments: Any, asked: int) -> None:
        mine.program, mine.cluster = [number], (cluster, asked)
        function(*arguments)
        assert not of_thread("pending") and not of_thread("products"), "a warpgroup ended before its work did"

    calls = [(*one, asked) for one, asked in zip(functions, [4, *warps], strict=True)]
    errors = at_once(run, calls, 2 * PATIENCE) + loads.errors
    if errors:
        raise errors[0]
    from compiled_attn.ops import _hopper_tiles

    left = {one[1] for one, arrived in named.arrived.items() if arrived and one[1] >= _hopper_tiles.FREE}
    assert not left, f"barriers {left} of slots are left half full"


def run_cluster(kernel: Any, arguments: list[Any], constants: dict[str, Any], programs: list[int]) -> None:
    """``programs`` of ``kernel`` at the same time."""
    cluster = Cluster(len(programs))
    named.clear()

    def run(number: int) -> None:
        mine.program, mine.alone = [number], [cluster]
        kernel(*arguments, **constants)

    errors = at_once(run, [(number,) for number in programs], 3 * PATIENCE)
    if errors:
        raise errors[0]


def load(pointer: Pointer) -> Tile:
    return tile(pointer.items[int(pointer.place)].long())


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.items[pointer.place[mask].long()] = value[mask]


def either(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(condition, bool):
        return one if condition else other
    return tile(torch.where(condition, one, other))


def asserted(condition: bool, message: str = "") -> None:
    assert condition, message


def gluon() -> tuple[types.SimpleNamespace, dict[str, Any]]:
    layouts = types.SimpleNamespace(get_default_for=lambda *_: None)
    language = types.SimpleNamespace(
        load=load, store=store, where=either, static_range=range, warp_specialize=warp_specialize,
        minimum=lambda one, other: tile(torch.minimum(tile(one), tile(other))),
        maximum=lambda one, other: tile(torch.maximum(tile(one), tile(other))),
        max=lambda one, axis: one.amax(axis), sum=lambda one, axis: one.sum(axis), exp2=torch.exp2, log2=torch.log2,
        zeros=lambda shape, dtype, layout: tile(torch.zeros(shape)), convert_layout=lambda one, layout: one,
        full=lambda shape, value, dtype, layout: tile(torch.full(shape, value)),
        arange=lambda begin, end, layout: tile(torch.arange(begin, end)), NVMMASharedLayout=layouts,
        SliceLayout=lambda *_: None, DotOperandLayout=lambda *_: None, NVMMADistributedLayout=lambda **_: None,
        allocate_shared_memory=Shared, float32=torch.float32, int64=torch.int64, static_assert=asserted,
        program_id=lambda axis: tile(program()),
    )  # fmt: skip
    others = {
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, size: barrier.step(arrivals=1, expected=size),
            arrive=lambda barrier, count: barrier.step(arrivals=count),
            wait=lambda barrier, phase: barrier.wait(int(phase)),
        ),
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait
        ),
        "fence_async_shared": fence,
        "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=True: Product([a, b], acc if use_acc else None),
        "warpgroup_mma_wait": product_wait,
        "arrive_at": named.arrive,
        "wait_at": named.wait,
        "meet": meet,
        "announce": lambda: None,
        "copy_to_both": copy_to_both,
        "tell_partner": tell_partner,
    }
    return language, others


def installed() -> Any:
    """The launcher, with the Gluon kernel run here."""
    from compiled_attn.ops import _hopper_forward, _hopper_launch, _hopper_pairs, _hopper_tiles

    kernel = _hopper_launch.hopper_forward
    language, others = gluon()
    for module in (_hopper_pairs, _hopper_tiles, _hopper_forward):
        for name, item in list(vars(module).items()):
            if name in others:
                setattr(module, name, others[name])
            elif type(item).__name__ == "GluonJITFunction":
                setattr(module, name, item.fn)
            elif type(item).__name__ == "constexpr":
                setattr(module, name, item.value)
        module.gl = language  # type: ignore[attr-defined]

    def launch(
        asked: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int,
        index: Any, paired: Any = None,
    ) -> bool:  # fmt: skip
        if asked is not kernel:
            asked[grid](*arguments, **constants)
            return True
        if paired is not None and unfit:
            return False
        made = [
            Pointer(one) if isinstance(one, Tensor) else Descriptor(one) if hasattr(one, "base") else one
            for one in arguments
        ]
        # scalars as tensors of one element, but for the scale
        made = [tile(one) if type(one) is int else one for one in made]
        size = 1 if paired is None else 2
        sizes.append(size)
        language.num_programs = lambda axis: size * grid[0]
        for first in range(0, size * grid[0], size):
            run_cluster(kernel.fn, made, constants, list(range(first, first + size)))
        return True

    _hopper_launch.launch = launch
    _hopper_launch._processors = lambda index: PROCESSORS
    return _hopper_launch


DENSE = {  # batch, queries, keys, heads, key heads, head_dim, causal, window
    "short": (2, 33, 17, 2, 1, 64, 0, None),
    "blocks": (1, 200, 700, 2, 2, 64, 0, None),
    "turns": (2, 300, 260, 4, 2, 128, 0, None),
    "wide": (2, 300, 200, 2, 1, 256, 0, None),
    "wide_causal": (1, 400, 300, 2, 2, 256, 3, None),
    "padded": (1, 65, 129, 2, 2, 40, 0, None),
    "pairs": (2, 400, 260, 4, 2, 128, 0, None),
    "pairs_one_idle": (1, 33, 500, 1, 1, 72, 0, None),
    "causal": (1, 400, 400, 2, 2, 128, 1, None),
    "causal_lower": (1, 150, 500, 2, 2, 64, 3, None),
    "more_queries": (1, 400, 130, 2, 2, 64, 3, None),
    "window": (1, 500, 500, 1, 1, 128, 0, (150, 20)),
    "window_lower": (2, 130, 600, 1, 1, 64, 2, (300, 5)),
    "causal_window": (1, 500, 450, 1, 1, 64, 3, (100, -1)),
}
PACKED = {  # starts of queries and keys, rows behind, causal
    "uneven": ([0, 300, 317, 700], [0, 70, 400, 1000], 0, 0),
    "empty": ([0, 0, 150, 150, 151], [0, 40, 40, 300, 301], 70, 0),
    "causal": ([0, 290, 300], [0, 290, 600], 0, 3),
    "nothing": ([0, 0, 0], [0, 5, 5], 9, 0),
}
# programs at a time of the kernels that ran, whether a kernel for pairs is found laid out otherwise, the cases of pairs
sizes: list[int] = []
unfit: list[bool] = []
IN_PAIRS = {"dense pairs", "dense pairs_one_idle", *(f"masked {name} 128" for name in ("hole", "random", "mixed"))}
MASKED = ("hole", "random", "mixed")
CASES = [f"dense {name}" for name in DENSE] + [f"packed {name} {width}" for name in PACKED for width in (64, 128)]
CASES += [f"masked {name} {width}" for name in MASKED for width in (64, 128)]
CASES += ["dense pairs unfit", "masked mixed 128 unfit"]


def compare(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> str:
    for what, one, other, most in zip(("out", "lse"), found, right, (2e-3, 1e-3), strict=True):
        error = (one.double() - other).abs().nan_to_num(0.0).max()  # equal infinities
        if not torch.equal(one.isfinite(), other.isfinite()) or error > most:
            return f"{what} is off by {error:.1e}"
    return ""


def run(launch: Any, case: str) -> str:
    torch.manual_seed(0)
    random.seed(0)
    what, name, *width = case.split()
    half = {"dtype": torch.float16}
    if what == "dense":
        batch, q_length, k_length, heads, key_heads, head_dim, causal, window = DENSE[name]
        query = torch.randn(batch, q_length, heads, head_dim, **half)
        key, value = (torch.randn(batch, k_length, key_heads, head_dim, **half) for _ in range(2))
        found = launch.forward(query, key, value, None, None, causal, None, window, True)
        options = {"is_causal": bool(causal & 1), "window_size": window}
        if causal & 2:
            options["causal_alignment"] = "lower_right"
        return compare(found, reference.attention(query.double(), key.double(), value.double(), **options))
    head_dim = int(width[0])
    if what == "packed":
        starts_q, starts_k, rest, causal = PACKED[name]
        query = torch.randn(starts_q[-1] + rest, 2, head_dim, **half)
        key, value = (torch.randn(starts_k[-1] + rest, 1, head_dim, **half) for _ in range(2))
        starts = [torch.tensor(one, dtype=torch.int32) for one in (starts_q, starts_k)]
        options = {"is_causal": True, "causal_alignment": "lower_right"} if causal else {}
        right = reference.varlen_attention(query.double(), key.double(), value.double(), *starts, **options)
        # what lies behind, and a sequence beside the first one, reach nobody
        key[starts_k[-1] :], value[starts_k[-1] :] = math.nan, math.inf
        return compare(launch.forward(query, key, value, None, starts, causal, None, None, True), right)
    keep = torch.ones(2, 500, dtype=torch.bool)
    if name != "random":
        keep[0, 100:211] = False
        keep[1, :5] = keep[1, 450:] = False
    if name != "hole":
        keep[1] = torch.rand(500) > 0.4
    query, key, value = (torch.randn(2, length, 2, head_dim, **half) for length in (130, 500, 500))
    right = reference.attention(query.double(), key.double(), value.double(), key_padding_mask=keep)
    key[~keep], value[~keep] = math.nan, math.nan
    return compare(launch.forward(query, key, value, keep, None, 0, None, None, True), right)


def main() -> None:
    torch.set_num_threads(1)
    importlib.import_module("triton.experimental.gluon")
    launch = installed()
    found = {}
    for case in itertools.chain(sys.argv[1:] or CASES):
        try:
            sizes.clear()
            unfit[:] = [True] if case.endswith(" unfit") else []
            found[case] = run(launch, case)
            assert set(sizes) <= {2 if case in IN_PAIRS else 1}, f"run {sizes} at a time"
        except (AssertionError, TimeoutError) as error:
            found[case] = f"{type(error).__name__}: {error}"
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
