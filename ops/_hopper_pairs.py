"""Programs in pairs, on two multiprocessors of one cluster, that share every block of keys and values.

Each loads half the columns of a block, into the memory of both: a block leaves L2 once for 256 rows of Q instead of
once for 128. Long calls run at the card's power limit, and what is not moved is not paid for (docs/triton_hopper.md).

Gluon of triton 3.6 can neither ask for a copy to several multiprocessors nor arrive at another's mbarrier, that of 3.7
can for kernels compiled for clusters. So this is inline PTX. It has to know two things that Gluon does not tell: which
parameter of the kernel is which tensor map, and where the kernel's allocations begin in shared memory.
:func:`misplaced` reads both off the compiled kernel.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import re

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# mbarriers that there is room for: of free slots of K and of V, of full ones, of full and of free tiles of Q
_ROOM = (56, 52, 48, 44, 40, 36)
ROOM = gl.constexpr(_ROOM)
# where they begin, in bytes behind all tiles
_PLACES = tuple(8 * sum(_ROOM[:kind]) for kind in range(len(_ROOM)))
_V_EMPTY, K_FULL, V_FULL = (gl.constexpr(place) for place in _PLACES[1:4])

# Parameters of a descriptor of rank 5: the tensor map, 5 sizes, 5 strides. Q's come first.
_OF_DESCRIPTOR = 11
_DESCRIPTORS = ("Q", "K", "V", "copies of K", "copies of V")


def _map(which: str) -> str:
    return f"hopper_forward_param_{_DESCRIPTORS.index(which) * _OF_DESCRIPTOR}"


def _copy(which: str, listed: bool) -> str:
    """PTX, for one thread: columns $4 on, row $5, head $6, outer $7, leading $8 to byte $2, counted by the mbarrier at
    byte $3. $1: lane, $9: whether of the copies.
    """
    copies = ""
    if listed:
        copies = (
            f"mov.b64 n, {_map('copies of ' + which)}; cvta.param.u64 n, n; setp.ne.b32 p, $9, 0; selp.b64 m, n, m, p; "
        )
    return (
        "{ .reg .pred p; .reg .b64 m, n; .reg .b32 t, d, b; .reg .b16 both; "
        f"mov.b64 m, {_map(which)}; cvta.param.u64 m, m; {copies}"
        "mov.u32 t, global_smem; add.u32 d, t, $2; add.u32 b, t, $3; mov.b16 both, 3; setp.eq.b32 p, $1, 0; "
        "@p cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[d], [m, {$4, $5, $6, $7, $8}], [b], both; mov.b32 $0, $1; }"
    )


_COPIES = gl.constexpr(tuple(_copy(which, listed) for which in "VK" for listed in (False, True)))


@gluon.jit
def half() -> gl.tensor:
    """Which of its pair this program is: clusters are made of neighbours."""
    return gl.program_id(0) % 2


@gluon.jit
def meet(WARPS: gl.constexpr):
    """All warps of both programs wait for one another; every partition has to come, those with nothing else to do too.

    Before the first copy: the other's mbarriers are there. At the end: nobody leaves whose memory is still written to.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    place = gl.zeros([32 * WARPS], gl.int32, layout=layout)
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.b32 $0, $1;",
        "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def announce():
    """The mbarriers that were made until here are there for the other program too, once both :func:`meet`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    place = gl.zeros([128], gl.int32, layout=layout)
    gl.inline_asm_elementwise(
        "fence.mbarrier_init.release.cluster; mov.b32 $0, $1;", "=r,r", [place], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def idle(WARPS: gl.constexpr):
    """A partition that only comes where all have to: Triton would fill up the last warpgroup with ones that do not."""
    meet(WARPS)
    meet(WARPS)


@gluon.jit
def tell_partner(empty, slot, KEYS: gl.constexpr, BEHIND: gl.constexpr):
    """``slot``, of keys or of values, is free in this program: arrives at the other's mbarrier in ``empty``.

    The loading warp says so, once its own warpgroups have told it by a named barrier: nothing of pairs is in their
    steps. Without .release.cluster, as CUTLASS does it: that would be a fence for the whole GPU (0.79 of the speed when
    all warps arrived there themselves). ``BEHIND``: bytes of all tiles.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    place = gl.zeros([32], gl.int32, layout=layout) + (slot * 8 + (BEHIND if KEYS else BEHIND + _V_EMPTY))
    other = gl.zeros([32], gl.int32, layout=layout) + (1 - half())
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 a, b; mov.u32 b, %laneid; setp.eq.b32 p, b, 0; mov.u32 a, global_smem; "
        "add.u32 a, a, $1; mapa.shared::cluster.u32 a, a, $2; "
        "@p mbarrier.arrive.shared::cluster.b64 _, [a]; mov.b32 $0, $1; }",
        "=r,r,r", [place, other], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def copy_to_both(
    tensor, copies, at, full, slot, packed, tile, barrier, KEYS: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """This program's half of a block, of ``tensor`` or of ``copies``, to ``slot``, which is tile ``tile``, of both.

    ``full``, the mbarrier at byte ``barrier``, of both counts it. ``KEYS``: not values.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    bytes: gl.constexpr = tensor.block_type.nbytes
    start = gl.zeros([32], gl.int32, layout=layout)
    lane = gl.arange(0, 32, layout=layout)
    mine = half()
    # a tile is two times the columns that its swizzle has, one behind the other
    columns: gl.constexpr = tensor.block_type.shape[4] // 2
    gl.inline_asm_elementwise(
        _COPIES[2 * KEYS + LISTED], "=r,r,r,r,r,r,r,r,r,r",
        [
            lane, start + tile * bytes + mine * (bytes // 2), start + barrier, start + mine * columns, start + at[3],
            start + at[2], start + at[1], start + at[0], start + packed.to(gl.int32),
        ],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def misplaced(ptx: str, slots: int, behind: int, used: tuple[int, ...], listed: bool) -> list[str]:
    """What of the kernel, compiled for pairs, is not where its inline PTX looks for it.

    In shared memory: ``slots`` bytes for keys and values, then Q, and after ``behind`` bytes mbarriers, of each kind,
    in the order of ROOM, as many as ``used`` says.
    """
    found = []
    for which in _DESCRIPTORS[1 : 5 if listed else 3]:
        if not re.search(rf"\.param \.align 64 \.b8 {_map(which)}\[128\]", ptx):
            found.append(f"the tensor map of {which} is not parameter {_map(which)}")
    places = {one: int(place) for one, place in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    made = {places.get(one, 0) for one in re.findall(r"mbarrier\.init\.\S+ \[(%r\d+)\]", ptx)}
    wanted = {behind + place + 8 * one for place, count in zip(_PLACES, used, strict=True) for one in range(count)}
    if made != wanted:
        found.append(f"mbarriers are at bytes {sorted(made)} of shared memory instead of {sorted(wanted)}")
    results = {places.get(one, 0) for one in re.findall(r"global\.shared::cta\.bulk_group \[.*\], \[(%r\d+)\]", ptx)}
    if min(results, default=None) != slots:
        found.append(f"rows of Q are at bytes {sorted(results)} of shared memory, the first is not at {slots}")
    return found
