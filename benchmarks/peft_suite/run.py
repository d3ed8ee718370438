"""PEFT's own tests over Spectune's methods, on models made from configs, offline.

    python benchmarks/peft_suite/run.py PEFT             # PEFT: a checkout, or its unpacked sdist
    python benchmarks/peft_suite/run.py PEFT --methods svft --files test_custom_models.py --pytest='-x -k merge'

Nothing is written into PEFT's folder: its tests are copied. Writes benchmarks/results/peft_suite.json: what passed,
failed and was skipped, with reasons, and for each failure that is meant to be, why. Exits with 1 when another failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from provenance import provenance  # noqa: E402

from peft_suite import offline_hub  # noqa: E402
from peft_suite.deliberate import reason  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "spectral_a": {"method": "spectral_a"},
    "spectral_r": {"method": "spectral_r"},
    "svft": {"method": "svft"},
    "specadapt": {"method": "specadapt"},
}
FILES = (
    "test_custom_models.py", "test_decoder_models.py", "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py", "test_seq_classifier.py", "test_token_classification_qa.py",
    "test_vision_models.py", "test_stablediffusion.py", "test_config.py", "test_quantization.py",
)  # fmt: skip
PACKAGES = ("peft", "torch", "transformers", "accelerate", "diffusers", "safetensors", "pytest")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="folder that holds PEFT's tests/")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--files", default=",".join(FILES))
    parser.add_argument("--output", type=Path, default=HERE.parent / "results" / "peft_suite.json")
    parser.add_argument("--pytest", default="", help="options for pytest, such as '-n 2'")
    return parser.parse_args()


def run(tests: Path, method: str, given: argparse.Namespace, work: Path) -> list[dict[str, str]]:
    """Get one record for each test of a method."""
    report = work / f"{method}.jsonl"
    report.unlink(missing_ok=True)
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(work / "hub"), "TQDM_DISABLE": "1",
        "SPECTUNE_OPTIONS": json.dumps(METHODS[method]), "SPECTUNE_REPORT": str(report),
    }  # fmt: skip
    files = [f"tests/{name}" for name in given.files.split(",")]
    call = [sys.executable, "-m", "pytest", "-q", "-p", "peft_suite.plugin", "-p", "no:cacheprovider", "--tb=short"]
    subprocess.run([*call, *shlex.split(given.pytest), *files], cwd=tests, env=environment, check=False)
    return [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []


def summary(method: str, records: list[dict[str, str]]) -> dict[str, Any]:
    """Get the counts of a method's tests, file by file, its failures, and the reasons for what was skipped."""
    by_file: dict[str, Counter[str]] = {}
    failures = []
    for record in records:
        file = record["test"].partition("::")[0].removeprefix("tests/")
        why = reason(record) if record["outcome"] == "failed" else ""
        by_file.setdefault(file, Counter())["deliberate" if why else record["outcome"]] += 1
        if record["outcome"] == "failed":
            failures.append({"test": record["test"], "told": first_line(record["told"]), "deliberate": why})
    skipped = Counter(re.sub(r"^Skipped: ", "", r["told"]) for r in records if r["outcome"] == "skipped")
    total = sum(by_file.values(), Counter())
    print(f"{method}: {dict(total)}", flush=True)
    return {"total": total, "files": by_file, "failures": failures, "skipped": dict(skipped.most_common())}


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


def main() -> int:
    given = arguments()
    work = Path(tempfile.mkdtemp(prefix="peft-suite-"))
    try:
        shutil.copytree(given.peft / "tests", work / "tests")
        (work / "tests" / "__init__.py").touch()  # PEFT's sdist leaves it out
        offline_hub.fill(work / "hub")
        record = provenance() | {"versions": {name: version(name) for name in PACKAGES}, "methods": {}}
        found = record["methods"]
        for method in given.methods.split(","):
            found[method] = summary(method, run(work, method, given, work))
            given.output.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        shutil.rmtree(work)
    return int(any(method["total"]["failed"] or not method["total"]["passed"] for method in found.values()))


if __name__ == "__main__":
    sys.exit(main())
