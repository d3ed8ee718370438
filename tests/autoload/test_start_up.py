"""The start-up file of the wheel: PEFT knows the method in a process that never imports spectune."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .start import ROOT, run_installed

# A package called peft, in place of the real one, which takes seconds to import.
FAKE_PEFT = """
import enum
class PeftType(str, enum.Enum):
    LORA = "LORA"
PEFT_TYPE_TO_CONFIG_MAPPING = {}
"""
KNOWN = "import peft, sys\nprint('SPECTUNE' in peft.PEFT_TYPE_TO_CONFIG_MAPPING, 'spectune' in sys.modules)"


@pytest.fixture
def fake_peft(tmp_path: Path) -> str:
    """A path for PYTHONPATH with a stand-in for peft before the real one."""
    (tmp_path / "fake" / "peft").mkdir(parents=True)
    (tmp_path / "fake" / "peft" / "__init__.py").write_text(FAKE_PEFT)
    return os.pathsep.join([str(tmp_path / "fake"), *filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "src")])])


def said(folder: Path, code: str, **environment: str) -> str:
    done = run_installed(folder, code, **environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


def test_peft_knows_the_method_and_spectune_is_not_imported(tmp_path: Path, fake_peft: str) -> None:
    assert said(tmp_path / "site", KNOWN, PYTHONPATH=fake_peft) == "True False"


def test_a_variable_turns_it_off(tmp_path: Path, fake_peft: str) -> None:
    code = f"print(sys.meta_path[0].__class__.__name__, '_spectune_autoload' in sys.modules)\n{KNOWN}"
    off = said(tmp_path / "site", code, PYTHONPATH=fake_peft, SPECTUNE_AUTOLOAD="0").splitlines()
    assert "AfterImport" not in off[0] and off[0].endswith("False") and off[1] == "False False"


def test_it_imports_nothing_but_its_own_file(tmp_path: Path) -> None:
    code = "import builtins; before = set(sys.modules)\nsite.addsitedir(sys.argv[1])\nprint(set(sys.modules) - before)"
    done = run_installed(tmp_path / "none", code, str(tmp_path / "site"), SPECTUNE_AUTOLOAD="0")
    assert done.stdout.strip() == "set()"
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "spectune_autoload.pth").write_bytes((ROOT / "src" / "spectune_autoload.pth").read_bytes())
    code = f"import os; os.environ.pop('SPECTUNE_AUTOLOAD')\n{code}"
    done = run_installed(tmp_path / "none", code, str(tmp_path / "later"), SPECTUNE_AUTOLOAD="0")
    assert done.stdout.strip() == "{'_spectune_autoload'}"


@pytest.mark.parametrize("broken", [None, "import no_such_thing", "raise SystemError", "def ("])
def test_a_broken_or_removed_spectune_is_silent(tmp_path: Path, broken: str | None) -> None:
    """With the stand-in for the module before the real one; None leaves the file without its module."""
    site = tmp_path / "site"
    site.mkdir()
    if broken is None:
        (site / "spectune_autoload.pth").write_text(
            (ROOT / "src" / "spectune_autoload.pth").read_text().replace("_spectune_autoload", "_spectune_removed")
        )
        assert "_spectune_removed" in (site / "spectune_autoload.pth").read_text()
    else:
        (tmp_path / "_spectune_autoload.py").write_text(broken)
    assert said(site, "print('alive')", PYTHONPATH=str(tmp_path)) == "alive"


def test_a_peft_without_tables_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("VERSION = 9")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    assert said(tmp_path / "site", "import peft; print(peft.VERSION)", PYTHONPATH=path) == "9"


def test_asking_whether_peft_is_there_imports_nothing(tmp_path: Path, fake_peft: str) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('peft').name, 'peft' in sys.modules)"
    assert said(tmp_path / "site", code, PYTHONPATH=fake_peft) == "peft False"


def test_a_peft_that_cannot_be_imported_says_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError('torch is too old')")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    done = run_installed(tmp_path / "site", "import peft", PYTHONPATH=path)
    assert done.returncode == 1 and done.stderr.strip().endswith("ImportError: torch is too old")


@pytest.mark.parametrize("editable", [False, True])
def test_the_wheel_has_the_file_at_its_root(tmp_path: Path, editable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    build = pytest.importorskip("hatchling.build")
    if editable:
        pytest.importorskip("editables")
    monkeypatch.chdir(ROOT)
    name = (build.build_editable if editable else build.build_wheel)(str(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("spectune_autoload.pth") == (ROOT / "src" / "spectune_autoload.pth").read_bytes()
        if editable:  # the module is found where the source is
            assert str(ROOT / "src") in wheel.read("_editable_impl_spectune.pth").decode()
        else:
            assert {"_spectune_autoload.py", "spectune/__init__.py"} <= names
    assert all(name.split("/")[0].startswith(("spectune", "_spectune", "_editable")) for name in names)
