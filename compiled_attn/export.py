"""Ship a model with the backend it was tuned with: a ``.pt2`` package, its manifest, and a loader that refuses.

``package`` exports and compiles with AOTInductor, ``manifest`` reads what is in a package without running any of it,
``load`` gives a callable, or every reason why this process cannot run the package.

What a loaded package does more than ``torch._inductor.aoti_load_package`` (all reproduced on torch 2.13): AOTInductor's
code reads its inputs as they were laid out at export, so that a transposed or wrongly shaped tensor gives wrong numbers
or reads beyond its end without a word; arguments that are no tensors are dropped; and two threads in one package whose
operator needs Python stop each other for ever, one waiting for the runner with the GIL held, the other for the GIL.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import json
import os
import sys
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from . import archive, registry
from .archive import manifest as manifest
from .compilation import fingerprint, mark_caches
from .operators import NAMESPACE
from .retarget import nodes
from .retarget import retarget as retarget
from .spec import report
from .state import active_backend, attention_backend, is_pinned, pin_of, unwrapped


def package(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: dict[str, Any] | None = None,
    backend: str | None = None,
    dynamic_shapes: Any = None,
    python_free: bool | None = None,
    strict: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Export ``model`` for inference with its attention backend, compile it ahead of time, write ``path``.

    Args:
        model: what to ship, in the mode (``eval()``) and on the device it is to run in; or what
            ``torch.export.export`` made of it, from contiguous inputs (then ``args`` is ``()``, and ``backend``
            re-points its calls as :func:`retarget` does).
        args: example arguments: any shapes and dtypes; tensors are taken as contiguous.
        path: the file to write, ending in ``.pt2``. It appears when all is done, or not at all.
        kwargs: example keyword arguments.
        backend: a name of ``list_backends()``; None takes what is pinned or active here.
        dynamic_shapes, strict: as in ``torch.export.export``; the dimensions left out are fixed.
        python_free: True refuses, before compiling, a model with operators that need Python when they run;
            None and False take it, and the manifest says which they are.
        options: Inductor's options for the compilation, such as ``{"max_autotune": True}``.

    Returns:
        The manifest: see :func:`manifest`.

    Raises:
        ValueError: ``backend`` is unknown, contradicts a pin or reaches no attention call; the path is no place for a
            package; an input is neither tensor nor constant.
        NotImplementedError: the backend cannot run here, or ``python_free=True`` and something needs Python.

    >>> import torch, compiled_attn
    >>> class Block(torch.nn.Module):
    ...     def forward(self, x):
    ...         return compiled_attn.attention(x, x, x)
    >>> x = torch.randn(1, 8, 2, 16)
    >>> content = compiled_attn.export.package(Block(), (x,), "block.pt2", backend="native")  # doctest: +SKIP
    >>> content["python_free"]  # doctest: +SKIP
    True
    >>> compiled_attn.export.load("block.pt2")(x).shape  # doctest: +SKIP
    torch.Size([1, 8, 2, 16])
    """
    folder, name = _target(path)
    mark_caches()
    if isinstance(model, torch.export.ExportedProgram):
        program, chosen, pinned = _given(model, args, kwargs, backend, dynamic_shapes)
    else:
        model = unwrapped(model)
        chosen, pinned = _chosen(model, backend), pin_of(model) is not None
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.contiguous, (tuple(args), dict(kwargs or {})))
        context = contextlib.nullcontext() if backend is None else attention_backend(backend)
        with torch.no_grad(), context, _named_arguments(model):
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
    counted = _operators(program)
    reached = any(one.namespace == NAMESPACE for one in counted) or _higher_order(program)
    if (backend is not None or pinned) and not reached:
        raise ValueError(
            f"{type(model).__name__} makes no compiled_attn call: backend {chosen!r} would have no effect on the "
            "package. Models of Diffusers reach this library through compiled_attn.integrations.diffusers.install()"
        )
    python = {one.name() for one in counted if _needs_python(one)}
    if python_free:
        _refuse_python(python)
    inputs = _inputs(program)  # may refuse, so before the long compilation
    # A folder, not only a file beside the target: the archive's root is named after the file.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as temporary:
        made = os.path.join(temporary, name)
        with torch._inductor.config.patch(options or {}):
            # Never program.run_decompositions(): its default table turns the fused CPU kernel into softmax math.
            torch._inductor.aoti_compile_and_package(program, package_path=made)
            host = archive.host()
        python |= _proxied(made)
        if python_free:
            _refuse_python(python)
        content = _content(program, counted, python)
        content = archive.seal(made, {**content, "backend": chosen, "host": host, "inputs": inputs})
        os.replace(made, os.path.join(folder, name))
    return content


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> LoadedPackage:
    """The packaged model as a callable, on ``device`` (None: the current one of the type it was compiled for).

    A package with ``switch`` follows the backend of the calling thread's context, else the process default. Loads what
    the package's operators need in Python: for a backend of the Hub (``..._hub``) that downloads the kernel, unless it
    is in the cache or HF_HUB_OFFLINE is set, and runs its code. Calls never do.

    Raises:
        ValueError: as :func:`manifest`; also when a file inside is damaged.
        NotImplementedError: the package cannot run in this process; the text has every reason.

    >>> import compiled_attn
    >>> run = compiled_attn.export.load("block.pt2")  # doctest: +SKIP
    """
    path = os.fspath(path)
    with archive.opened(path) as file:
        content = archive.read(path, file)
        found = archive.misfits(content, None if device is None else torch.device(device))
        if found:
            raise NotImplementedError(report(f"package '{path}' cannot run in this process:", found))
        damaged = file.testzip()  # torch's reader checks no CRC
        if damaged is not None:
            raise ValueError(f"{path}: {damaged} is damaged; package the model again")
    for backend in {one["backend"] for one in content["operators"] if one["python"]} - {None}:
        registry.usable(backend)  # loads what it needs: a kernel of the Hub is never fetched by a call
    kind = content["device"]["type"]
    index = None if device is None else torch.device(device).index
    if index is None and kind != "cpu":
        index = torch.get_device_module(kind).current_device()
    runner = torch._inductor.aoti_load_package(path, device_index=-1 if kind == "cpu" or index is None else index)
    return LoadedPackage(runner, content, index)


class LoadedPackage:
    """A loaded package: call it like the model. ``manifest`` is the package's manifest.

    Inputs are compared with those of the export (structure, dtype, device, sizes, constants): ValueError with every
    difference. Tensors of another layout are copied. Inference only: NotImplementedError where autograd would record.
    """

    def __init__(self, runner: Any, content: dict[str, Any], index: int | None) -> None:
        self.manifest = content
        self._runner = runner
        self._spec = pytree.treespec_loads(content["in_spec"])
        self._inputs = content["inputs"]
        self._kwargs = list(pytree.tree_unflatten(range(len(self._inputs)), self._spec)[1])
        self._index = index
        # See the top of this file: who waits for this lock gives the GIL away.
        self._turn: Any = contextlib.nullcontext() if content["python_free"] else threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.keys() == set(self._kwargs):
            kwargs = {name: kwargs[name] for name in self._kwargs}
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:
            raise ValueError(f"the package is called as ({self._shown()}), as it was exported; got {spec}")
        found = _differences(self._inputs, flat, self._index)
        if found:
            raise ValueError(report("the call does not fit the package:", found))
        if torch.is_grad_enabled() and any(one.requires_grad for one in flat if isinstance(one, Tensor)):
            raise NotImplementedError("packages have no backward; call them under torch.no_grad()")
        flat = [one.contiguous() if isinstance(one, Tensor) else one for one in flat]
        args, kwargs = pytree.tree_unflatten(flat, spec)
        with self._turn:
            return self._runner(*args, **kwargs)

    def _shown(self) -> str:
        args, kwargs = pytree.tree_unflatten([one["name"] for one in self._inputs], self._spec)
        return ", ".join([*map(str, args), *(f"{name}={value}" for name, value in kwargs.items())])


# ------------------------------------------------------------------------------------------------- before compiling


def _target(path: str | os.PathLike[str]) -> tuple[str, str]:
    folder, name = os.path.split(os.path.abspath(os.fspath(path)))
    if not name.endswith(".pt2"):
        raise ValueError(f"{path}: the name of a package must end in .pt2")
    if not os.path.isdir(folder):
        raise ValueError(f"{path}: the folder {folder} does not exist")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder")
    return folder, name


def _given(
    program: torch.export.ExportedProgram, args: Any, kwargs: Any, backend: str | None, dynamic_shapes: Any
) -> tuple[torch.export.ExportedProgram, str, bool]:
    """A program that somebody else exported, its backend by name, and whether it must have attention calls."""
    wrong = []
    if tuple(args) or kwargs or dynamic_shapes is not None:
        wrong.append("its inputs and dynamic shapes are fixed already; pass args=() and no kwargs or dynamic_shapes")
    for node in program.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else None
        if isinstance(value, Tensor) and node.name in program.graph_signature.user_inputs:
            if not value.is_contiguous():
                wrong.append(f"input {node.name!r} was exported with strides {tuple(value.stride())}; contiguous() it")
    if wrong:
        raise ValueError(report("cannot package this exported program:", wrong))
    if backend is not None:
        return retarget(program, backend), backend, True
    names = {name for one in _operators(program) if (name := _backend_of(one)) is not None}
    return program, "/".join(sorted(names)) or "none", False


def _chosen(model: nn.Module, backend: str | None) -> str:
    """The backend for the model as a whole; a name that a pin would silently win against is refused."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if backend is None:
        return pin_of(model) or active_backend()
    registry.usable(backend)
    pins: dict[str, str] = {}
    for name, module in model.named_modules():
        pin = pin_of(module)
        if pin is not None and pin != backend:
            pins.setdefault(pin, name or "the model")
    if pins:
        found = [f"{name} is pinned to {pin!r}" for pin, name in pins.items()]
        found.append("a pin wins: reset_attention_backend(model) first, or leave backend= out to package the pins")
        raise ValueError(report(f"package(..., backend={backend!r}) contradicts the model:", found))
    return backend


@contextlib.contextmanager
def _named_arguments(model: nn.Module) -> Iterator[None]:
    """A pinned ``forward`` shows (*args, **kwargs), but dynamic_shapes and inputs go by the names it hides."""
    forward = vars(model).get("forward")
    if forward is None or not is_pinned(forward) or pin_of(model) is None:
        yield
        return

    # A function also because Dynamo of torch 2.9 cannot enter a partial (strict=True).
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    named.__signature__ = inspect.signature(functools.partial(type(model).forward, model))  # type: ignore[attr-defined]
    vars(model)["forward"] = named
    try:
        yield
    finally:
        vars(model)["forward"] = forward


def _operators(program: torch.export.ExportedProgram) -> Counter[torch._ops.OpOverload]:
    """Operators by number of calls; those handed to a higher-order operator count too."""
    return Counter(
        target
        for node in nodes(program.graph_module)
        for target in (node.target, *node.args)
        if isinstance(target, torch._ops.OpOverload)
    )


def _higher_order(program: torch.export.ExportedProgram) -> dict[str, int]:
    return dict(
        Counter(
            n.target.name() for n in nodes(program.graph_module) if isinstance(n.target, torch._ops.HigherOrderOperator)
        )
    )


def _needs_python(operator: torch._ops.OpOverload) -> bool:
    """Defined in Python, and nothing that AOTInductor would look into or lower."""
    from torch._inductor import decomposition, lowering
    from torch._library.simple_registry import singleton
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    name = operator.name()
    if name not in torch.library._defs:
        return False
    if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
        return False
    if singleton.find(name).torch_dispatch_rules.find(FunctionalTensorMode) is not None:  # triton_op
        return False
    if operator in decomposition.select_decomp_table():
        return False
    # an operator without a lowering gets a fallback the first time it is met
    return operator not in lowering.lowerings or operator in lowering.fallbacks


def _refuse_python(names: set[str]) -> None:
    if names:
        raise NotImplementedError(
            report("python_free=True, but these operators run Python:", sorted(names))
            + "\n  choose a backend that compilers look into (backend='native', say), or allow Python"
        )


def _inputs(program: torch.export.ExportedProgram) -> list[dict[str, Any]]:
    """The flat inputs: name, shape, dtype and device type of tensors, the value of constants."""
    from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument  # 2 s, not at import

    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found: list[dict[str, Any]] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        name = spec.arg.name
        if isinstance(spec.arg, TensorArgument):
            tensor = values[name]
            shape = [_dimension(size, program.range_constraints) for size in tensor.shape]
            dtype = str(tensor.dtype).removeprefix("torch.")
            found.append({"name": name, "shape": shape, "dtype": dtype, "device": tensor.device.type})
        elif isinstance(spec.arg, ConstantArgument):
            found.append({"name": name, "constant": repr(spec.arg.value)})
        else:
            raise ValueError(
                f"input {name!r} is a number that may vary; AOTInductor takes tensors only: fix it (no dynamic_shapes) "
                "or pass a tensor"
            )
    return found


def _dimension(size: Any, ranges: Any) -> int | dict[str, Any]:
    """A fixed size, or ``factor * symbol + offset`` with the symbol's bounds (None: none known)."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    symbols = list(expression.free_symbols)
    known: dict[str, Any] = {"symbol": str(expression), "factor": 1, "offset": 0, "min": None, "max": None}
    if len(symbols) != 1 or not expression.is_polynomial(symbols[0]) or expression.as_poly(symbols[0]).degree() > 1:
        return known
    factor, offset = expression.as_poly(symbols[0]).all_coeffs()
    if not (factor.is_Integer and offset.is_Integer):
        return known
    bounds = ranges.get(symbols[0])
    known.update(symbol=str(symbols[0]), factor=int(factor), offset=int(offset))
    if bounds is not None:
        known["min"] = int(bounds.lower)
        known["max"] = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < sys.maxsize - 1 else None
    return known


# -------------------------------------------------------------------------------------------------- what it was made of


def _content(
    program: torch.export.ExportedProgram, counted: Counter[torch._ops.OpOverload], python: set[str]
) -> dict[str, Any]:
    """The part of the manifest that program and process tell."""
    device = _device_type(program)
    listed = [one for one in counted if one.namespace == NAMESPACE or one.name() in python]
    backends = {name for name in map(_backend_of, listed) if name is not None}
    return {
        "format": archive.FORMAT,
        "compiled_attn": _version(__package__) or "not installed",
        "sources": fingerprint(),
        "torch": str(torch.__version__),
        "triton": _version("triton") if device != "cpu" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "operators": [_described(one, counted[one], python) for one in listed],
        "higher_order": _higher_order(program),
        "python_free": not python,
        "packages": _packages(backends),
        "device": {"type": device, "architecture": archive.architecture(device)},
        "in_spec": pytree.treespec_dumps(program.call_spec.in_spec),
    }


def _device_type(program: torch.export.ExportedProgram) -> str:
    tensors = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    types = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)} - {"cpu", "meta"}
    return min(types, default="cpu")


def _version(distribution: str | None) -> str | None:
    try:
        return importlib.metadata.version(distribution or "")
    except importlib.metadata.PackageNotFoundError:
        return None


def _backend_of(operator: torch._ops.OpOverload) -> str | None:
    for name, entry in registry.BACKENDS.items():
        if operator in (entry.op, entry.varlen_op):
            return name
    return None


def _described(operator: torch._ops.OpOverload, count: int, python: set[str]) -> dict[str, Any]:
    return {
        "name": operator.name(),
        "backend": _backend_of(operator),
        "schema_version": operator._overloadname,
        "schema": str(operator._schema),
        "count": count,
        "python": operator.name() in python,
    }


def _packages(backends: set[str]) -> list[dict[str, Any]]:
    return [
        {
            "backend": name,
            "distribution": one.distribution,
            "minimum": one.minimum,
            "version": _version(one.distribution),
        }
        for name in sorted(backends)
        for one in registry.backend_info(name).packages
    ]


def _proxied(path: str) -> set[str]:
    """The Python operators that the compiled code calls: AOTInductor lists what it calls through its executor."""
    found: set[str] = set()
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            if "/data/aotinductor/" not in name or not name.endswith(".json"):
                continue
            listed = json.loads(file.read(name))
            nodes = listed.get("nodes", []) if isinstance(listed, dict) else []
            found |= {one["node"]["target"].removesuffix(".default") for one in nodes}
    return {name for name in found if name in torch.library._defs}


# ------------------------------------------------------------------------------------------------------- does it fit


def _differences(inputs: list[dict[str, Any]], given: list[Any], index: int | None) -> list[str]:
    """What of the flat arguments ``given`` is not as exported."""
    found: list[str] = []
    symbols: dict[str, int] = {}
    for one, value in zip(inputs, given, strict=True):
        name = one["name"]
        if "constant" in one:
            if isinstance(value, Tensor) or repr(value) != one["constant"]:
                shown = "a tensor" if isinstance(value, Tensor) else repr(value)
                found.append(f"{name} was fixed to {one['constant']}, not {shown}")
            continue
        if not isinstance(value, Tensor):
            found.append(f"{name} must be a tensor, not {type(value).__name__}")
            continue
        if str(value.dtype).removeprefix("torch.") != one["dtype"]:
            found.append(f"{name} must be {one['dtype']}, not {str(value.dtype).removeprefix('torch.')}")
        if value.device.type != one["device"] or (one["device"] != "cpu" and value.device.index != index):
            where = one["device"] if one["device"] == "cpu" else f"{one['device']}:{index}"
            found.append(f"{name} must be on {where}, not {value.device}")
        if value.dim() != len(one["shape"]) or not all(map(_fits_into(symbols), one["shape"], value.shape)):
            found.append(f"{name} has shape {tuple(value.shape)}, must be ({', '.join(map(_shown, one['shape']))})")
    return found


def _fits_into(symbols: dict[str, int]) -> Callable[[Any, int], bool]:
    def fits(wanted: Any, size: int) -> bool:
        if isinstance(wanted, int):
            return size == wanted
        value, rest = divmod(size - wanted["offset"], wanted["factor"])
        low, high = wanted["min"], wanted["max"]
        if rest or (low is not None and value < low) or (high is not None and value > high):
            return False
        return symbols.setdefault(wanted["symbol"], value) == value

    return fits


def _shown(wanted: Any) -> str:
    if isinstance(wanted, int):
        return str(wanted)
    factor = "" if wanted["factor"] == 1 else f"{wanted['factor']}*"
    offset = f"{wanted['offset']:+d}" if wanted["offset"] else ""
    low, high = wanted["min"], wanted["max"]
    bounds = "" if low is None else f" in {low}..{'' if high is None else high}"
    return f"{factor}{wanted['symbol']}{offset}{bounds}"
