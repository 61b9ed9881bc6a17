"""Kernels of the Hugging Face Hub as packages: downloaded when a backend is set, and at no other time."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from compiled_attn.packages import Package, Unfit, require
from compiled_attn.spec import report

# The first release of `kernels` that asks before it runs a publisher's code (trust_remote_code).
MINIMUM = "0.14"
TRUST = "COMPILED_ATTN_TRUST_REMOTE_CODE"
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its own variables


@dataclasses.dataclass(frozen=True)
class HubKernel(Package):
    """Version ``pinned`` of the kernel ``repo``, through the package `kernels`.

    ``load()`` downloads what is not in the cache; ``missing()`` looks at packages, environment and cache alone.
    ``bind`` gets the kernel's module.

    >>> from compiled_attn.ops.hub import hub_kernel
    >>> hub_kernel("kernels-community/flash-attn2", 3).repo
    'kernels-community/flash-attn2'
    """

    repo: str = ""
    pinned: int = 0

    def missing(self) -> list[str]:
        """Every reason why the kernel cannot be loaded that can be had without a network."""
        if "loaded" in self.__dict__:
            return []
        if "broken" in self.__dict__:
            return list(self.__dict__["broken"])
        return self.absent() or self._out_of_reach()

    def load(self) -> Any:
        """What ``bind`` made of the kernel, downloaded if need be; NotImplementedError, with the reasons."""
        if "loaded" in self.__dict__:
            return self.__dict__["loaded"]
        found = self.missing()
        if not found:
            try:
                module = self._get()
                self.__dict__["loaded"] = module if self.bind is None else self.bind(module)
                return self.__dict__["loaded"]
            except Unfit as error:
                found = self.__dict__["broken"] = [str(error)]
            except Exception as error:  # a network, a publisher, a build for another machine: the next try may do
                found = [self._explained(error)]
        raise NotImplementedError(report(f"kernel '{self.repo}' version {self.pinned} cannot be loaded:", found))

    def at_hand(self) -> bool:
        """Whether ``load()`` would need no network."""
        local = [entry.partition("=")[0] for entry in os.environ.get("LOCAL_KERNELS", "").split(":")]
        return "loaded" in self.__dict__ or self.repo in local or self._cached()

    def _get(self) -> Any:
        import kernels

        get_kernel = require(kernels, "get_kernel", "repo_id", "version", "trust_remote_code")
        trusted = [repo.strip() for repo in os.environ.get(TRUST, "").split(",") if repo.strip()]
        return get_kernel(self.repo, version=self.pinned, trust_remote_code=trusted or False)

    def _out_of_reach(self) -> list[str]:
        entries = os.environ.get("LOCAL_KERNELS")
        for entry in entries.split(":") if entries is not None else ():
            repo, equals, folder = entry.partition("=")
            if not equals:
                return [f"LOCAL_KERNELS has {entry!r}; write repository=folder, several with ':' between"]
            if repo == self.repo:
                if Path(folder).is_dir():
                    return []
                return [f"LOCAL_KERNELS names {folder!r} for {self.repo}, which is no folder"]
        if _offline() and not self._cached():
            return [
                f"{self.repo} version {self.pinned} is not in the cache, and HF_HUB_OFFLINE is set; load it once with "
                f"a network, or set LOCAL_KERNELS={self.repo}=<folder>"
            ]
        return []

    def _cached(self) -> bool:
        """Whether `kernels` would find the version in its cache, by the same files that it looks at."""
        home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
        cache = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
        name = self.repo.replace("/", "--")
        folders = [Path(cache).expanduser() / f"{kind}s--{name}" for kind in ("kernel", "model")]
        return any((folder / "refs" / f"v{self.pinned}").is_file() for folder in folders)

    def _explained(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        if "trust_remote_code" in text:
            return (
                f"its publisher is not one that the Hub calls trusted, or that could not be asked ({text}). A kernel "
                f"is code that runs with your rights: if you trust {self.repo}, set {TRUST}={self.repo}"
            )
        return text


class Loaded:
    """A :class:`HubKernel` as its kernel functions see it: ``load()`` gives what is loaded, and downloads nothing.

    An attention call may run inside a compiled step or a CUDA graph, where nobody expects a download.
    """

    def __init__(self, package: HubKernel) -> None:
        self.package = package

    def load(self) -> Any:
        """What ``package.load()`` gave; NotImplementedError if nobody called it yet."""
        try:
            return self.package.__dict__["loaded"]
        except KeyError:
            pass
        raise NotImplementedError(
            f"kernel '{self.package.repo}' is not loaded: kernels of the Hub are fetched when a backend is set, never "
            "in a call. First set_default_backend(name), set_attention_backend(model, name), or "
            "attention_backend(name) outside of compiled code"
        )


def _offline() -> bool:
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
