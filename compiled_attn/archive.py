"""The package as a file: its manifest, the seal that ties both together, and whether it fits this process.

The manifest is a JSON file in the archive's ``extra`` folder, which torch's loader hands on and ignores. It holds size
and CRC of every other file and a checksum of itself, so that edits, mix-ups and damage are noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from . import registry
from .spec import report

FORMAT = 1
# the PT2 archive's folder for files of others
_ENTRY = "extra/compiled_attn.json"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "format": int, "compiled_attn": str, "sources": str, "torch": str, "triton": (str, type(None)),
    "cuda": (str, type(None)), "cudnn": (int, type(None)), "backend": str, "operators": list, "higher_order": dict,
    "python_free": bool, "packages": list, "device": dict, "host": dict, "inputs": list, "in_spec": str,
    "files": dict, "checksum": str,
}  # fmt: skip


def manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in the package ``path``, read without running or importing anything from it.

    Keys: ``format``; ``compiled_attn`` (version) and ``sources`` (hash); ``torch``, ``triton``, ``cuda``, ``cudnn``
    (None where not used); ``backend`` (as chosen for the whole model); ``operators``, each with ``name``,
    ``backend``, ``schema_version``, ``schema``, ``count`` and ``python`` (whether it runs Python); ``higher_order``
    (FlexAttention and the like, by count); ``python_free``; ``packages`` of the backends; ``device`` and ``host``
    (what it was compiled for); ``inputs``; ``in_spec``; ``files`` (size and CRC of the rest); ``checksum``.

    Raises ValueError if there is no such file, it is no ``.pt2`` of ours, a newer format, edited, or its contents
    are not those it was made with. That notices accidents; it is no signature: load only what you trust.

    >>> import compiled_attn
    >>> compiled_attn.export.manifest("nothing.pt2")
    Traceback (most recent call last):
    ValueError: nothing.pt2: no such file
    """
    path = os.fspath(path)
    with opened(path) as archive:
        return read(path, archive)


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _contents(archive: zipfile.ZipFile) -> dict[str, list[int]]:
    return {
        one.filename.partition("/")[2]: [one.file_size, one.CRC]
        for one in archive.infolist()
        if one.filename.partition("/")[2] != _ENTRY
    }


def seal(path: str, content: dict[str, Any]) -> dict[str, Any]:
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        content = {**content, "files": _contents(archive)}
        content["checksum"] = _checksum(content)
        archive.writestr(f"{root}/{_ENTRY}", json.dumps(content, indent=1))
    return content


@contextlib.contextmanager
def opened(path: str) -> Iterator[zipfile.ZipFile]:
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a .pt2 package, or it was cut short ({error})") from error
    with archive:
        yield archive


def read(path: str, archive: zipfile.ZipFile) -> dict[str, Any]:
    names = [name for name in archive.namelist() if name.partition("/")[2] == _ENTRY]
    if not names:
        raise ValueError(
            f"{path} has no manifest of ours: it was not made by compiled_attn.export.package "
            "(torch._inductor.aoti_load_package loads other packages)"
        )
    try:
        content = json.loads(archive.read(names[0]))
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: the manifest cannot be read ({error}); package the model again") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ValueError(f"{path}: the manifest has no format version; package the model again")
    if content["format"] > FORMAT:
        raise ValueError(
            f"{path}: the manifest has format {content['format']}, this compiled_attn reads up to {FORMAT}; upgrade it"
        )
    found = [f"{key} is missing" for key in _KEYS if key not in content]
    found += [
        f"{key} is {content[key]!r}, of the wrong type"
        for key, kind in _KEYS.items()
        if key in content and not isinstance(content[key], kind)
    ]
    if not found and content["checksum"] != _checksum(content):
        found.append("it does not have its checksum: it was edited")
    if not found and (len(names) > 1 or len(archive.namelist()) != len(content["files"]) + 1):
        found.append("files were added to the package, or removed")
    if not found:
        here = _contents(archive)
        found += [
            f"{name} is not the file it was made with" for name in here if here[name] != content["files"].get(name)
        ]
    if found:
        raise ValueError(report(f"{path}: the manifest is wrong; package the model again:", found))
    return content


def misfits(content: dict[str, Any], device: torch.device | None) -> list[str]:
    """Every reason why this process cannot run the package."""
    found: list[str] = []
    wanted, here = (".".join(version.split(".")[:2]) for version in (content["torch"], str(torch.__version__)))
    if wanted != here:
        found.append(f"compiled with torch {content['torch']}, this is {torch.__version__}; use torch {wanted}")
    kind = content["device"]["type"]
    if device is not None and device.type != kind:
        found.append(f"compiled for {kind}, cannot run on {device}")
    if kind != "cpu" and not (hasattr(torch, kind) and getattr(torch, kind).is_available()):
        found.append(f"compiled for {kind} ({content['device']['architecture']}), of which there is none here")
    elif kind != "cpu":
        here = architecture(kind, device if device is not None and device.type == kind else None)
        if here != content["device"]["architecture"]:
            found.append(f"compiled for {content['device']['architecture']}, this is {here}")
    host = content["host"]
    if (host["system"], host["machine"]) != (sys.platform, platform.machine()):
        found.append(f"compiled on {host['system']} {host['machine']}, this is {sys.platform} {platform.machine()}")
    else:
        missing = sorted(set(host["features"]) - _cpu_features())
        if missing:
            found.append(f"compiled for a CPU with {', '.join(missing)}, which this one has not")
    for one in content["operators"]:
        if one["python"]:
            found += _operator_misfits(one)
    return found


def _operator_misfits(wanted: dict[str, Any]) -> list[str]:
    name, backend = wanted["name"], wanted["backend"]
    operator = find(name)
    if operator is None:
        packet = getattr(getattr(torch.ops, name.partition("::")[0]), name.partition("::")[2].partition(".")[0], None)
        if packet is None:
            return [f"operator {name} is not registered; import the library that defines it"]
        return [f"operator {name} is here as {', '.join(packet.overloads())}, another schema version"]
    found = []
    if str(operator._schema) != wanted["schema"]:
        found.append(f"operator {name} has another schema here: {operator._schema}")
    if backend is not None:
        found += [f"backend {backend!r}: {reason}" for reason in registry.unavailable(backend)]
    return found


def architecture(kind: str, device: torch.device | None = None) -> str:
    """What compiled kernels are bound to: ``sm_90``, ``gfx942``; the host's machine for a CPU."""
    if kind == "cpu":
        return platform.machine()
    from torch._dynamo.device_interface import get_interface_for_device

    found = str(get_interface_for_device(kind).get_compute_capability(device))
    return f"sm_{found}" if found.isdigit() else found


def _cpu_features() -> set[str]:
    from torch._inductor.cpu_vec_isa import x86_isa_checker

    capabilities = getattr(torch.cpu, "get_capabilities", None)
    named = set() if capabilities is None else {name for name, value in capabilities().items() if value is True}
    return named | set(x86_isa_checker())


def host() -> dict[str, Any]:
    """The CPU that the code was compiled for: all of this one, as Inductor passes -march=native unless told."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    here, isa = _cpu_features(), str(pick_vec_isa()).lower()
    native = getattr(torch._inductor.config.cpp, "march", None) in (None, "native")
    return {
        "system": sys.platform,
        "machine": platform.machine(),
        "isa": isa,
        "features": sorted(here if native else here & set(isa.split())),
    }


def find(name: str) -> torch._ops.OpOverload | None:
    """The operator ``namespace::name.overload``, None where it is not registered."""
    space, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, space), base, None)
    return getattr(packet, overload or "default", None)
