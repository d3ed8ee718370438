"""The verbs of the command line: the group of each, and an example of its use."""

from __future__ import annotations

RUNS, COMPARING, ADAPTERS, BASES = "Run", "Compare", "Adapters", "Models, bases and machine"

# Verb -> its group in --help, and how it is used.
VERBS: dict[str, tuple[str, str]] = {
    "demo": (RUNS, "spectune demo"),
    "init": (RUNS, "spectune init causal_lm > run.yaml"),
    "check": (RUNS, "spectune check run.yaml"),
    "train": (RUNS, "spectune train run.yaml -o runs/first training.epochs=2"),
    "trl": (RUNS, "spectune trl sft --adapter spectral_a --adapter_r 8 --model_name_or_path base --dataset_name data"),
    "evaluate": (RUNS, "spectune evaluate runs/first"),
    "generate": (RUNS, "spectune generate runs/first --prompt 'Once upon a time'"),
    "chat": (RUNS, "spectune chat runs/first"),
    "report": (RUNS, "spectune report runs/first"),
    "lr": (RUNS, "spectune lr run.yaml"),
    "compare": (COMPARING, "spectune compare sweep.yaml -o sweeps/first --jobs 2"),
    "reproduce": (COMPARING, "spectune reproduce glue-deberta --small"),
    "export": (ADAPTERS, "spectune export runs/first --to lora -o first-lora"),
    "push": (ADAPTERS, "spectune push runs/first me/first --dry-run"),
    "extract": (ADAPTERS, "spectune extract base-model tuned-model --rank 16 -o change"),
    "resize": (ADAPTERS, "spectune resize first-lora --rank 4 -o smaller"),
    "fuse": (ADAPTERS, "spectune fuse runs/one runs/other --rule auto -o both"),
    "schedule": (ADAPTERS, "spectune schedule --concepts 3 --r 8"),
    "inspect": (BASES, "spectune inspect runs/first"),
    "decompose": (BASES, "spectune decompose model-folder --r 64"),
    "cache": (BASES, "spectune cache ls"),
    "env": (BASES, "spectune env"),
}
