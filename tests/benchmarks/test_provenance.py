"""Every results file says which sources wrote it, also where they have no history."""

from __future__ import annotations

from pathlib import Path

import provenance
import pytest


def test_sources_without_history_say_their_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "COMMIT", tmp_path / "COMMIT")
    for path in ("", None):  # without git, and with it
        with monkeypatch.context() as patch:
            patch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
            if path is not None:
                patch.setenv("PATH", path)
            assert provenance.commit().startswith("spectune 0") and provenance.commit().endswith(
                ", without its history"
            )
    (tmp_path / "COMMIT").write_text("abc\n")
    assert provenance.commit() == "abc"
