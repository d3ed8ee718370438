"""Draw docs/pictures: what 60 steps of a method do to the singular values of one weight of a real model.

    python docs/make_pictures.py

all-MiniLM-L6-v2 learns to tell 24 languages apart (`spectune demo`'s task). About two minutes on two cores.
"""

from __future__ import annotations

import re
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from spectune.demo import base_folder, write_languages
from spectune.pages.charts import spectrum_chart
from spectune.recipes import parse_config
from spectune.runs import train_run

FOLDER = Path(__file__).parent / "pictures"
METHODS: dict[str, dict[str, Any]] = {
    "spectral_a": {"method": "spectral_a", "r": 8},
    "spectral_r": {"method": "spectral_r", "r": 8},
}


def style() -> str:
    """Get the light colours and the rules for charts of the pages' style sheet."""
    css = files("spectune.pages").joinpath("house.css").read_text(encoding="utf-8")
    root = re.search(r"^:root \{.*?^\}", css, re.M | re.S)
    assert root is not None
    rules = re.findall(r"^\.chart [^{]*\{[^}]*\}", css, re.M)
    return "\n".join([root[0], *rules, "svg { font-family: sans-serif; background: #fffefc; }"])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = {split: str(path) for split, path in write_languages(Path(folder)).items()}
        for name, adapter in METHODS.items():
            values = {
                "recipe": "text_classification",
                "model": str(base_folder()),
                "pooling": "mean",
                "data": {**data, "max_tokens": 48, "limit": {"test": 8, "validation": 8}},
                "adapter": adapter | {"target_modules": ["query", "value"]},
                "training": {"steps": 60, "batch_size": 32, "head_first": True},
            }
            result = train_run(parse_config(values), Path(folder, name), looks=True).result
            drawn = spectrum_chart(result.spectra[0])
            drawn = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
            drawn = drawn.replace("<title>", f"<style>{style()}</style><title>", 1)
            (FOLDER / f"{name}.svg").write_text(drawn + "\n", encoding="utf-8")
            print(FOLDER / f"{name}.svg", result.spectra[0].name)


if __name__ == "__main__":
    main()
