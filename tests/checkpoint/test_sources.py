"""What is read is never replaced by what is written, under whatever spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.checkpoint import refuse_to_replace
from spectune.errors import OutputError


def test_every_spelling_of_a_source_and_every_folder_that_holds_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shelf" / "source").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "shelf" / "source")
    (tmp_path / "round").symlink_to(tmp_path / "shelf")
    monkeypatch.chdir(tmp_path / "shelf")
    source = tmp_path / "shelf" / "source"
    for output in ("source", "source/", "../shelf/./source", "../link", "../round/source", "../round", ".", ".."):
        for spelling in (source, "source", "../link"):
            with pytest.raises(OutputError, match="the output would replace .*source, a source"):
                refuse_to_replace(output, "elsewhere", spelling)


def test_what_is_beside_inside_or_not_there_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("source", "source/inside", "source-2"):
        (tmp_path / name).mkdir()
    for output in ("source/inside", "source-2", "new", "source/new"):
        refuse_to_replace(output, "source")
    # Names of repositories, and what no disk can hold.
    refuse_to_replace("source", "meta-llama/some", "source-3", "a\0b", "x" * 5000)
