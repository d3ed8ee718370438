"""noxfile.py: every session runs its own Python."""

from __future__ import annotations

import ast
import re
from pathlib import Path

NOXFILE = Path(__file__).parents[2] / "noxfile.py"


def test_no_session_runs_whatever_python_is_first_on_the_path() -> None:
    calls = [node for node in ast.walk(ast.parse(NOXFILE.read_text("utf-8"))) if isinstance(node, ast.Call)]
    runs = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "run"]
    assert len(runs) > 5 and {ast.unparse(call.args[0]) for call in runs} == {"python_of(session)"}


def test_no_session_turns_off_a_plugin_whose_markers_tests_use() -> None:
    assert "no:warnings" not in NOXFILE.read_text("utf-8")  # pytest refuses `filterwarnings` as unknown then


def test_nox_tries_the_pythons_that_we_promise() -> None:
    promised = re.findall(r"Python :: (3\.\d+)", (NOXFILE.parent / "pyproject.toml").read_text("utf-8"))
    tried = re.search(r"^PYTHONS = (.*?\])", NOXFILE.read_text("utf-8"), re.M)
    assert tried is not None and ast.literal_eval(tried[1]) == promised


def test_the_lower_ends_that_nox_installs_are_those_that_we_promise() -> None:
    promised = re.search(
        r"^dependencies = \[\n(.*?)^\]", (NOXFILE.parent / "pyproject.toml").read_text("utf-8"), re.M | re.S
    )
    assert promised is not None
    ends = dict(re.findall(r'^ *"([a-z]+)>=([\d.]+)', promised[1], re.M))
    tested = dict(re.findall(r'"([a-z]+)==([\d.]+?)(?:\.\*|\.0)?"', NOXFILE.read_text("utf-8")))
    assert len(ends) == 14 and all(f"{tested[name]}.".startswith(f"{end}.") for name, end in ends.items()), (
        ends,
        tested,
    )
