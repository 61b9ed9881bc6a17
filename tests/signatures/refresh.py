"""Records the signatures of kernel libraries, as published, in the JSON files beside this one.

Wheels (or the sdist of a library without one) are downloaded one at a time into a temporary folder and read with
``ast``: nothing is installed or imported. What is not on PyPI is read from a file (``--from-file``).

    python tests/signatures/refresh.py                        write every file from the newest releases
    python tests/signatures/refresh.py xformers==0.0.35       one library, one version
    python tests/signatures/refresh.py --check                compare instead; exit status 1 when something changed
    python tests/signatures/refresh.py flash-attn-3 --from-file flash_attn_interface.py --release 3.0.0 \\
        --source "github.com/Dao-AILab/flash-attention, hopper/flash_attn_interface.py" \\
        --function flash_attn_interface:flash_attn_func

To record another function of a library, add it to LIBRARIES.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Library:
    """What to read: ``functions`` as "module:name" or "module:Class.method"; a dataclass stands for its fields.

    ``schemas`` is a file of operator schemas ("func: name(Tensor x, ...) -> ..."), read for functions that have no
    Python source. ``sdist`` takes the source distribution, whose metadata pip makes with ``environment`` set;
    ``betas`` is for a library that publishes nothing else.
    """

    functions: tuple[str, ...]
    schemas: str | None = None
    sdist: bool = False
    betas: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def _functions(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}:{name}" for name in names)


LIBRARIES = {
    "flash-attn": Library(
        _functions(
            "flash_attn.flash_attn_interface", "flash_attn_func", "flash_attn_varlen_func", "_flash_attn_forward",
            "_flash_attn_varlen_forward", "_flash_attn_backward", "_flash_attn_varlen_backward",
        ),
        sdist=True,
        environment=(("FLASH_ATTENTION_SKIP_CUDA_BUILD", "TRUE"),),
    ),
    "flash-attn-4": Library(
        _functions(
            "flash_attn.cute.interface", "flash_attn_func", "flash_attn_varlen_func", "_flash_attn_fwd",
            "_flash_attn_bwd",
        ),
        betas=True,
    ),
    "sageattention": Library(
        _functions("sageattention.core", "sageattn", "sageattn_varlen")
        + _functions("sageattention.quant_per_block_varlen", "per_block_int8")
        + _functions("sageattention.attn_qk_int8_per_block", "forward")
        + _functions("sageattention.attn_qk_int8_per_block_causal", "forward")
        + _functions("sageattention.attn_qk_int8_block_varlen", "forward")
        + _functions("sageattention.attn_qk_int8_per_block_causal_varlen", "forward")
    ),
    "xformers": Library(
        _functions(
            "xformers.ops.fmha", "memory_efficient_attention", "memory_efficient_attention_forward",
            "memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_backward",
        )
        + _functions(
            "xformers.ops.fmha.attn_bias", "_SeqLenInfo", "_PaddedSeqLenInfo", "BlockDiagonalMask",
            "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask",
            "BlockDiagonalCausalLocalAttentionMask", "BlockDiagonalCausalLocalAttentionFromBottomRightMask",
            "LowerTriangularMask.__init__", "LowerTriangularFromBottomRightMask",
            "LowerTriangularFromBottomRightLocalAttentionMask", "LocalAttentionFromBottomRightMask",
        )
        + _functions("xformers.ops.fmha.common", "Inputs", "Context", "Gradients")
        + _functions(
            "xformers.ops.fmha.cutlass", "FwOp.apply", "FwOp.not_supported_reasons", "BwOp.apply",
            "BwOp.not_supported_reasons",
        )
        + _functions(
            "xformers.ops.fmha.flash", "FwOp.apply", "FwOp.not_supported_reasons", "BwOp.apply",
            "BwOp.not_supported_reasons", "_flash_fwd", "_flash_bwd",
        )
    ),
    "amd-aiter": Library(
        _functions(
            "aiter.ops.mha", "flash_attn_func", "flash_attn_varlen_func", "_flash_attn_forward",
            "_flash_attn_backward", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "mha_fwd", "mha_bwd",
            "mha_varlen_fwd", "mha_varlen_bwd",
        )
    ),
    "torch-npu": Library(
        _functions(
            "torch_npu", "npu_fusion_attention", "npu_fusion_attention_grad", "npu_fusion_attention_v2",
            "npu_fusion_attention_grad_v2",
        ),
        schemas="torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml",
    ),
    "torch_xla": Library(
        _functions(
            "torch_xla.experimental.custom_kernel", "flash_attention", "fa_custom_forward", "fa_custom_backward",
            "FlashAttention.forward", "FlashAttention.prepare_segment_ids",
        )
    ),
    "kernels": Library(
        _functions("kernels.load", "get_kernel", "get_local_kernel", "get_locked_kernel", "load_kernel", "has_kernel")
    ),
}  # fmt: skip

# One machine's tags, so that the files do not depend on where the script runs.
_TAGS = ("--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3", "--abi", "none")
_PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 5)), "manylinux2014_x86_64", "any")


def download(requirement: str, library: Library, folder: Path) -> Path:
    """The wheel or sdist of ``requirement`` in ``folder``, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    if library.sdist:
        # torch's build helpers are looked for in this environment instead of a fresh one of some gigabytes
        command += ["--no-binary", ":all:", "--no-build-isolation"]
    else:
        command += ["--only-binary", ":all:", *_TAGS]
        command += [part for platform in _PLATFORMS for part in ("--platform", platform)]
    if library.betas:
        command.append("--pre")
    subprocess.run([*command, requirement], check=True, env={**os.environ, **dict(library.environment)})
    (found,) = folder.iterdir()
    return found


def members(archive: Path) -> dict[str, bytes]:
    """The .py and .yaml files of a wheel or sdist, by their paths without the sdist's top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name.endswith((".py", ".yaml"))}
    found = {}
    with tarfile.open(archive) as sdist:
        for entry in sdist:
            file = sdist.extractfile(entry) if entry.name.endswith((".py", ".yaml")) else None
            if file is not None:
                found[entry.name.split("/", 1)[1]] = file.read()
    return found


def release(archive: Path) -> str:
    """The version in the name of a wheel or sdist."""
    return archive.name.removesuffix(".tar.gz").split("-")[1]


def signature(tree: ast.Module, name: str) -> str | None:
    """The signature of a function, method or dataclass, without annotations; None if it is not there.

    Of several definitions the last one counts, as it does when Python imports the file.
    """
    scope: ast.AST = tree
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [node for node in ast.walk(scope) if isinstance(node, kinds) and node.name == part]
        if not found:
            return None
        scope = found[-1]
    if isinstance(scope, ast.ClassDef):
        fields = [node for node in scope.body if isinstance(node, ast.AnnAssign)]
        fields = [node for node in fields if "ClassVar" not in ast.unparse(node.annotation)]
        texts = [
            f"{ast.unparse(node.target)}={_literal(node.value)}" if node.value else ast.unparse(node.target)
            for node in fields
        ]
        return f"({', '.join(texts)})"
    assert isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef))
    arguments = scope.args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    for values in (arguments.defaults, arguments.kw_defaults):
        values[:] = [None if value is None else ast.parse(_literal(value), mode="eval").body for value in values]
    return f"({ast.unparse(arguments)})"


def _literal(value: ast.expr) -> str:
    """A default as text; what is no literal becomes an ellipsis: it is optional, and its value is the library's."""
    try:
        ast.literal_eval(value)
    except ValueError:
        return "..."
    return ast.unparse(value)


def schema_signature(text: str, name: str) -> str | None:
    """The signature of operator ``name`` in a file of schemas, as Python calls it."""
    found = re.search(rf"\bfunc: {name}\((.*?)\) ->", text)
    if found is None:
        return None
    parameters = []
    for parameter in re.split(r",\s+(?![^\[]*\])", found[1]):
        plain = parameter.split(" ", 1)[-1]  # without its type; the star has none
        plain, equals, default = plain.partition("=")
        parameters.append(f"{plain}={ast.unparse(ast.parse(default, mode='eval'))}" if equals else plain)
    return f"({', '.join(parameters)})"


Entry = dict[str, Any]


def read(requirement: str) -> Entry:
    """What the JSON file of ``requirement`` shall hold."""
    distribution = re.split(r"[=<>!~ ]", requirement)[0]
    library = LIBRARIES[distribution]
    with tempfile.TemporaryDirectory() as folder:
        archive = download(requirement, library, Path(folder))
        files = members(archive)
        functions = {}
        for function in library.functions:
            module, name = function.split(":")
            path = module.replace(".", "/")
            source = files.get(f"{path}.py") or files.get(f"{path}/__init__.py")
            found = signature(ast.parse(source), name) if source is not None else None
            if found is None and library.schemas is not None:
                found = schema_signature(files[library.schemas].decode(), name)
            if found is None:
                raise SystemExit(f"{archive.name} has no {function}; correct LIBRARIES in {__file__}")
            functions[function] = found
        return {
            "distribution": distribution,
            "version": release(archive),
            "source": f"PyPI, {archive.name}",
            "functions": functions,
        }


def read_file(arguments: argparse.Namespace) -> Entry:
    """The same for a source file that is not on PyPI."""
    tree = ast.parse(Path(arguments.from_file).read_text())
    functions = {}
    for function in arguments.function:
        found = signature(tree, function.split(":")[1])
        if found is None:
            raise SystemExit(f"{arguments.from_file} has no {function}")
        functions[function] = found
    return {
        "distribution": arguments.libraries[0],
        "version": arguments.release,
        "source": arguments.source,
        "functions": functions,
    }


def differences(recorded: Entry, found: Entry) -> list[str]:
    """One line for each function whose signature is not the recorded one."""
    old, new = recorded["functions"], found["functions"]
    lines = [f"{name}: not recorded" for name in new if name not in old]
    lines += [f"{name}: gone" for name in old if name not in new]
    lines += [
        f"{name}\n    was {old[name]}\n    is  {new[name]}" for name in new if old.get(name, new[name]) != new[name]
    ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", help="distributions, name or name==version (default: all of LIBRARIES)")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--from-file", help="read this source file instead of PyPI")
    parser.add_argument("--source", help="with --from-file: where the file comes from")
    parser.add_argument("--release", help="with --from-file: its version")
    parser.add_argument("--function", action="append", default=[], help="with --from-file: module:name, repeatable")
    arguments = parser.parse_args()
    if arguments.from_file:
        if len(arguments.libraries) != 1 or not (arguments.source and arguments.release and arguments.function):
            parser.error("--from-file needs one name, --source, --release and --function")
        entries: Iterator[Entry] = iter([read_file(arguments)])
    else:
        unknown = [name for name in arguments.libraries if re.split(r"[=<>!~ ]", name)[0] not in LIBRARIES]
        if unknown:
            parser.error(f"{', '.join(unknown)}: known are {', '.join(LIBRARIES)}; others need --from-file")
        entries = (read(requirement) for requirement in arguments.libraries or LIBRARIES)
    changed = 0
    for entry in entries:
        path = HERE / f"{entry['distribution']}.json"
        label = f"{entry['distribution']} {entry['version']}"
        if not arguments.check:
            path.write_text(json.dumps(entry, indent=1) + "\n")
            print(f"{label}: {len(entry['functions'])} signatures in {path.name}")
            continue
        recorded = json.loads(path.read_text())
        lines = differences(recorded, entry)
        changed += bool(lines)
        print(f"{label}, recorded from {recorded['version']}: {'changed' if lines else 'the same'}")
        for line in lines:
            print(f"  {line}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
