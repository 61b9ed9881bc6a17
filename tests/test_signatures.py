"""Every recorded signature can be read again: from PyPI, or from a clone of the repository that the script names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import recorded
from signatures import refresh

RECORDS = sorted(path.stem for path in recorded.SIGNATURES.glob("*.json"))


def test_every_record_has_a_source():
    assert sorted(refresh.LIBRARIES) == RECORDS


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_what_their_source_says(name):
    library, record = refresh.LIBRARIES[name], recorded.record(name)
    assert record["distribution"] == name
    assert tuple(record["functions"]) == library.functions
    if library.clone is None:
        assert record["source"].startswith("PyPI, ")
        return
    assert record["source"] == library.clone.source()
    assert record["version"] == (library.clone.version or library.clone.revision[:12])
    # a branch would be another one tomorrow
    assert re.fullmatch(r"[0-9a-f]{40}|v[0-9.]+", library.clone.revision)


@pytest.fixture
def clone(monkeypatch, tmp_path):
    """A repository of two files, changed since its tag; its record goes to another folder."""
    folder = tmp_path / "clone"
    (folder / "made").mkdir(parents=True)
    identity = {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    alone = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}

    def git(*words):
        subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, env=alone)

    git("init")
    (folder / "made" / "first.py").write_text("def one(q, k: int = 3): ...\ndef twice(a): ...\n")
    (folder / "made" / "second.py").write_text("from __future__ import annotations\ndef twice(b, c=torch.half): ...\n")
    git("add", "made")
    git("commit", "--message", "as released")
    git("tag", "v1.0")
    (folder / "made" / "first.py").write_text("def one(renamed): ...\n")
    monkeypatch.setattr(refresh, "HERE", tmp_path)
    source = refresh.Clone("github.com/somebody/made", "v1.0", ("made/first.py", "made/second.py"), "1.0")
    monkeypatch.setitem(refresh.LIBRARIES, "made", refresh.Library(("made:one", "made:twice"), clone=source))
    return folder


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["refresh.py", *map(str, words)])
    return refresh.main()


def test_one_command_makes_a_record_of_several_files(monkeypatch, capsys, tmp_path, clone):
    """At the revision of the table, whatever is checked out."""
    assert run(monkeypatch, "made", "--from", clone) == 0
    written = json.loads((tmp_path / "made.json").read_text())
    assert written == {
        "distribution": "made",
        "version": "1.0",
        "source": "github.com/somebody/made v1.0, made/first.py, made/second.py",
        "functions": {"made:one": "(q, k=3)", "made:twice": "(b, c=...)"},
    }
    assert run(monkeypatch, "made", "--from", clone, "--check") == 0
    written["functions"]["made:one"] = "(q)"
    (tmp_path / "made.json").write_text(json.dumps(written))
    capsys.readouterr()
    assert run(monkeypatch, "made", "--from", clone, "--check") == 1
    assert capsys.readouterr().out == (
        "made 1.0, recorded from 1.0: changed\n  made:one\n    was (q)\n    is  (q, k=3)\n"
    )


def test_a_clone_that_does_not_serve_says_what_would(monkeypatch, tmp_path, clone):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty has no made/first\.py at v1\.0; it must be a clone of github\.com/so"):
        run(monkeypatch, "made", "--from", tmp_path / "empty")
    library = refresh.Library(("made:three",), clone=refresh.LIBRARIES["made"].clone)
    monkeypatch.setitem(refresh.LIBRARIES, "made", library)
    with pytest.raises(SystemExit, match=r"made/first\.py and made/second\.py has no made:three"):
        run(monkeypatch, "made", "--from", clone)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["made"], "made: on PyPI are "),
        (["--from", "."], "not none"),
        (["kernels", "--from", "."], "not kernels"),
        (["nobody"], "others need --from-file"),
    ],
)
def test_what_cannot_be_read_that_way_is_refused(monkeypatch, capsys, clone, words, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, *words)
    assert message in capsys.readouterr().err


def test_without_a_name_all_on_pypi_are_read(monkeypatch, capsys, tmp_path):
    asked = []

    def read(name):
        asked.append(name)
        return {"distribution": name, "version": "9", "source": "PyPI, none", "functions": {}}

    monkeypatch.setattr(refresh, "read", read)
    monkeypatch.setattr(refresh, "HERE", tmp_path)
    assert run(monkeypatch) == 0
    assert set(asked) == {name for name in RECORDS if recorded.record(name)["source"].startswith("PyPI, ")}
    *_, left = capsys.readouterr().out.splitlines()
    assert set(left.partition("(see --from): ")[2].split(", ")) == set(RECORDS) - set(asked)


def test_a_file_is_read_for_a_library_that_is_not_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(refresh, "HERE", tmp_path)
    (tmp_path / "new.py").write_text("def attention(q, k, *, causal: bool = False): ...\n")
    words = ("--release", "2", "--source", "somewhere", "--function", "new:attention")
    assert run(monkeypatch, "new", "--from-file", tmp_path / "new.py", *words) == 0
    assert json.loads((tmp_path / "new.json").read_text())["functions"] == {"new:attention": "(q, k, *, causal=False)"}
