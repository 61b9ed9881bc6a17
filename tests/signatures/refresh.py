"""Records the signatures of kernel libraries, as published, in the JSON files beside this one.

Wheels (or the sdist of a library without one) are downloaded one at a time into a temporary folder and read with
``ast``: nothing is installed or imported. What is not on PyPI is read from a clone of its repository (``--from``), at
the revision that LIBRARIES names, whatever is checked out there.

    python tests/signatures/refresh.py                        write every file from the newest releases on PyPI
    python tests/signatures/refresh.py xformers==0.0.35       one library, one version
    python tests/signatures/refresh.py --check                compare instead; exit status 1 when something changed
    python tests/signatures/refresh.py flash-attn-3 --from ~/flash-attention        what is not on PyPI
    python tests/signatures/refresh.py something-new --from-file interface.py --release 1.0 \\
        --source "github.com/somebody/something-new, interface.py" --function interface:attention

To record another function of a library, or a newer revision of a repository, change LIBRARIES.
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
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Clone:
    """Where a library is read that is not on PyPI: ``files`` of ``repository``, at a tag or commit.

    Several files are read as one, in that order: of functions with one name the last counts. The record is of
    ``version``, by default the commit itself, and names the files by their paths, or as ``described``.
    """

    repository: str
    revision: str
    files: tuple[str, ...]
    version: str = ""
    described: str = ""

    def source(self) -> str:
        """What the record says of where it is from."""
        revision = f" {self.revision[:8]}" if self.version else ""
        return f"{self.repository}{revision}, {self.described or ', '.join(self.files)}"


@dataclasses.dataclass(frozen=True)
class Library:
    """What to read: ``functions`` as "module:name" or "module:Class.method"; a dataclass stands for its fields.

    ``schemas`` is a file of operator schemas ("func: name(Tensor x, ...) -> ..."), read for functions that have no
    Python source. ``sdist`` takes the source distribution, whose metadata pip makes with ``environment`` set;
    ``betas`` is for a library that publishes nothing else, ``clone`` for one that is not on PyPI.
    """

    functions: tuple[str, ...]
    schemas: str | None = None
    sdist: bool = False
    betas: bool = False
    environment: tuple[tuple[str, str], ...] = ()
    clone: Clone | None = None


def _functions(module: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{module}:{name}" for name in names)


_FLASH = "github.com/Dao-AILab/flash-attention"


def _flash_3(revision: str, version: str) -> Library:
    return Library(
        _functions(
            "flash_attn_interface", "flash_attn_func", "flash_attn_varlen_func", "_flash_attn_forward",
            "_flash_attn_backward",
        ),
        clone=Clone(_FLASH, revision, ("hopper/flash_attn_interface.py",), version),
    )  # fmt: skip


_SAGE = ("github.com/thu-ml/SageAttention", "d1a57a546c3d395b1ffcbeecc66d81db76f3b4b5")
# what the Hub's kernels are built of; the version of such a record is the Hub's
_HUB = ("github.com/huggingface/kernels-community", "40d4194f48b6775c4be4776ed08035fabb0e758f")

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
    "flash-attn-2.6.3": Library(
        _functions(
            "flash_attn.flash_attn_interface", "_flash_attn_forward", "_flash_attn_varlen_forward",
            "_flash_attn_backward", "_flash_attn_varlen_backward",
        ),
        clone=Clone(_FLASH, "v2.6.3", ("flash_attn/flash_attn_interface.py",), "2.6.3"),
    ),
    "flash-attn-3": _flash_3("0251105a2fb19d2957484b7f023cd8c115286ced", "3.0.0"),
    "flash-attn-3-beta": _flash_3("0165c96fff7a7cd2e152aa9659f75c972a702f5d", "3.0.0b1"),
    "flash-attn2-hub": Library(
        _functions(
            "flash_attn_interface", "_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward",
            "_flash_attn_varlen_backward",
        ),
        clone=Clone(*_HUB, ("flash-attn2/torch-ext/flash_attn2/flash_attn_interface.py",), "3"),
    ),
    "flash-attn3-hub": Library(
        _functions("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
        clone=Clone(*_HUB, ("flash-attn3/torch-ext/flash_attn3/flash_attn_interface.py",), "1"),
    ),
    "flash-attn4-hub": Library(
        _functions("interface", "_flash_attn_fwd", "_flash_attn_bwd"),
        clone=Clone(*_HUB, ("flash-attn4/torch-ext/flash_attn4/interface.py",), "0"),
    ),
    "sageattention-2": Library(
        _functions(
            "sageattention.core", "sageattn", "sageattn_varlen", "sageattn_qk_int8_pv_fp16_triton",
            "sageattn_qk_int8_pv_fp16_cuda", "sageattn_qk_int8_pv_fp8_cuda", "sageattn_qk_int8_pv_fp8_cuda_sm90",
        )
        + _functions("sageattention.triton.quant_per_block_varlen", "per_block_int8")
        + _functions("sageattention.triton.attn_qk_int8_block_varlen", "forward"),
        clone=Clone(
            *_SAGE,
            (
                "sageattention/core.py", "sageattention/triton/quant_per_block_varlen.py",
                "sageattention/triton/attn_qk_int8_block_varlen.py",
            ),
            "2.2.0",
            "sageattention/core.py and triton/*_varlen.py behind one another",
        ),
    ),
    "sageattention-3": Library(
        _functions("sageattn3", "sageattn3_blackwell"),
        clone=Clone(*_SAGE, ("sageattention3_blackwell/sageattn3/api.py",), "3"),
    ),
    "sage-attention-hub": Library(
        _functions("sage_attention", "sageattn", "sageattn3_blackwell"),
        clone=Clone(
            *_HUB,
            tuple(f"sage-attention/torch-ext/sage_attention/{name}.py" for name in ("core", "sm100_compile")),
            "2",
            "sage-attention/torch-ext/sage_attention/core.py and sm100_compile.py behind one another",
        ),
    ),
    "aiter-flash-attn-ck": Library(
        _functions("aiter_flash_attn_ck.mha", "flash_attn_func", "flash_attn_varlen_func"),
        clone=Clone(*_HUB, ("aiter-flash-attn-ck/torch-ext/aiter_flash_attn_ck/mha.py",)),
    ),
    "aiter-flash-attn-ck-hub": Library(
        _functions("aiter_flash_attn_ck", "flash_attn_func", "flash_attn_varlen_func"),
        clone=Clone(*_HUB, ("aiter-flash-attn-ck/torch-ext/aiter_flash_attn_ck/mha.py",), "1"),
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


def read_clone(distribution: str, folder: str) -> Entry:
    """The same for a library that is not on PyPI, from a clone of its repository in ``folder``."""
    library = LIBRARIES[distribution]
    clone = library.clone
    assert clone is not None
    text = "\n".join(at_revision(folder, clone, path) for path in clone.files)
    return {
        "distribution": distribution,
        "version": clone.version or clone.revision[:12],
        "source": clone.source(),
        "functions": signatures(text, library.functions, " and ".join(clone.files)),
    }


def at_revision(folder: str, clone: Clone, path: str) -> str:
    """A file as git has it at the revision of ``clone``: what is checked out may be another one."""
    command = ["git", "-C", folder, "show", f"{clone.revision}:{path}"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(
            f"{folder} has no {path} at {clone.revision}; it must be a clone of {clone.repository} (in a shallow one, "
            f"first git fetch --depth 1 origin {clone.revision}). git: {done.stderr.strip()}"
        )
    return done.stdout


def read_file(arguments: argparse.Namespace) -> Entry:
    """The same for a source file of a library that LIBRARIES does not know."""
    text = Path(arguments.from_file).read_text()
    return {
        "distribution": arguments.libraries[0],
        "version": arguments.release,
        "source": arguments.source,
        "functions": signatures(text, arguments.function, arguments.from_file),
    }


def signatures(text: str, functions: Iterable[str], origin: str) -> dict[str, str]:
    """The signatures of ``functions`` in the source ``text``, which is from ``origin``."""
    tree = ast.parse(text)
    found = {function: signature(tree, function.split(":")[1]) for function in functions}
    missing = [function for function, one in found.items() if one is None]
    if missing:
        raise SystemExit(f"{origin} has no {', '.join(missing)}")
    return {function: one for function, one in found.items() if one is not None}


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
    parser.add_argument("libraries", nargs="*", help="distributions, name or name==version (default: all on PyPI)")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("--from", dest="clone", metavar="FOLDER", help="read a clone of the repository instead of PyPI")
    parser.add_argument("--from-file", help="read this source file instead of PyPI")
    parser.add_argument("--source", help="with --from-file: where the file comes from")
    parser.add_argument("--release", help="with --from-file: its version")
    parser.add_argument("--function", action="append", default=[], help="with --from-file: module:name, repeatable")
    arguments = parser.parse_args()
    on_pypi = [name for name, library in LIBRARIES.items() if library.clone is None]
    elsewhere = [name for name in LIBRARIES if name not in on_pypi]
    entries: Iterable[Entry]
    if arguments.from_file:
        if len(arguments.libraries) != 1 or not (arguments.source and arguments.release and arguments.function):
            parser.error("--from-file needs one name, --source, --release and --function")
        entries = [read_file(arguments)]
    elif arguments.clone:
        unknown = [name for name in arguments.libraries if name not in elsewhere]
        if unknown or not arguments.libraries:
            parser.error(f"--from needs names of {', '.join(elsewhere)}, not {', '.join(unknown) or 'none'}")
        entries = (read_clone(name, arguments.clone) for name in arguments.libraries)
    else:
        unknown = [name for name in arguments.libraries if re.split(r"[=<>!~ ]", name)[0] not in on_pypi]
        if unknown:
            parser.error(
                f"{', '.join(unknown)}: on PyPI are {', '.join(on_pypi)}; --from is for {', '.join(elsewhere)}; others "
                "need --from-file"
            )
        entries = (read(requirement) for requirement in arguments.libraries or on_pypi)
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
    if not arguments.libraries:
        print(f"not on PyPI, and left as they are (see --from): {', '.join(elsewhere)}")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
