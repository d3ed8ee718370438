"""Run the tests that meet another tool, and record version and result of each: `python benchmarks/compatibility.py`.

With names of tools, such as `vLLM SGLang`, only these run, and the other rows stay.

A tool beside the environment, such as one installed with --no-deps, is found through PYTHONPATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from provenance import provenance

ROOT = Path(__file__).parents[1]
READS = "tests/autoload/test_readers.py::test_it_reads_the_adapter"
ROADS = "tests/tuner/test_peft_roads.py"
# tool, its package, the module that our tests import of it, what is run, the tests
TRIED = [
    ("PEFT", "peft", "peft", "`AutoPeftModel…` without an import; the roads below", [f"{READS}[auto_peft]", ROADS]),
    (
        "transformers", "transformers", "transformers", "`pipeline`, `AutoModel…`, `load_adapter` without an import",
        [f"{READS}[{name}]" for name in ("auto_model", "load_adapter", "pipeline")],
    ),
    ("sentence-transformers", "sentence-transformers", "sentence_transformers", "encodes, without an import",
     [f"{READS}[sentence_transformers]"]),
    ("diffusers", "diffusers", "diffusers", "a UNet with an adapter, without an import", [f"{READS}[diffusers]"]),
    ("lm-eval", "lm_eval", "lm_eval", "scores an adapter, without an import", [f"{READS}[lm_eval]"]),
    ("trl", "trl", "trl", "`SFTTrainer` without an import; the scripts sft, dpo, grpo; DPO goes on from an adapter",
     [f"{READS}[trl]", "tests/plugins/test_trl.py", "tests/tuner/test_dpo.py"]),
    ("axolotl", "axolotl", "axolotl.integrations.base", "the plugin makes, resumes and refuses adapters",
     ["tests/plugins/test_axolotl.py"]),
    ("ms-swift", "ms-swift", "swift.tuner_plugin", "the tuner makes adapters", ["tests/plugins/test_swift.py"]),
    ("vLLM", "vllm", "vllm.lora.resolver", "names and paths lead to exact LoRAs", ["tests/plugins/test_vllm.py"]),
    ("SGLang", "sglang", "sglang.srt.plugins", "paths lead to exact LoRAs", ["tests/plugins/test_sglang.py"]),
    ("FastAPI", "fastapi", "fastapi", "`examples/serving` answers for each adapter as it does alone",
     ["tests/examples/test_serving.py"]),
    ("Jupyter (nbclient)", "nbclient", "nbclient", "`examples/notebook` runs", ["tests/examples/test_notebook.py"]),
    ("Gradio", "gradio", "gradio", "`examples/space` inspects adapters and models", ["tests/examples/test_space.py"]),
]  # fmt: skip
STAND_IN = "stand-in of its interface"


def version_of(package: str, module: str) -> str:
    """Get the installed version, or that the tests used a stand-in."""
    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, cwd=ROOT)
    return metadata.version(package) if done.returncode == 0 else STAND_IN


def cases(tests: list[str]) -> list[tuple[str, str]]:
    """Run tests and get the file and name of each, joined as pytest does, with passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.xml"
        words = ["-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=sys.stderr)
        found = []
        for case in ElementTree.parse(report).iter("testcase"):
            said = {part.tag for part in case}
            result = "failed" if said & {"failure", "error"} else "skipped" if "skipped" in said else "passed"
            file = case.attrib["classname"].replace(".", "/") + ".py"
            found.append((f"{file}::{case.attrib['name']}", result))
    return found


def main() -> None:
    file = ROOT / "benchmarks" / "results" / "compatibility.json"
    asked = sys.argv[1:] or [tool for tool, *_ in TRIED]
    kept = {row["tool"]: row for row in json.loads(file.read_text())["tools"] if row["tool"] not in asked}
    ran = cases(sorted({test for tool, *_, tests in TRIED if tool in asked for test in tests}))
    rows = []
    for tool, package, module, what, tests in TRIED:
        if tool in kept:
            rows.append(kept[tool])
            continue
        mine = [result for name, result in ran if name in tests or name.partition("::")[0] in tests]
        row = {"tool": tool, "version": version_of(package, module), "ran": what}
        rows.append({**row, **{word: mine.count(word) for word in ("passed", "failed", "skipped")}})
    file.write_text(json.dumps({**provenance(), "tools": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
