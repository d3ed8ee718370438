"""Run by test_lora.py in a process of its own: loads LoRA folders in PEFT, where Spectune does not exist."""

import importlib
import json
import sys

import torch

# As if it were not installed: importing it raises ImportError.
sys.modules["spectune"] = None

import peft  # noqa: E402
import transformers  # noqa: E402

try:
    importlib.import_module("spectune")
    raise SystemExit("spectune can be imported here, so this proves nothing")
except ImportError:
    pass

answers = {}
for name, job in json.load(open(sys.argv[1])).items():
    base = getattr(transformers, job["class"]).from_pretrained(job["base"])
    plain = base(**torch.load(job["batch"])).logits.detach().clone()
    if job["native"]:
        base.load_adapter(job["lora"])
        model = base
    else:
        model = peft.PeftModel.from_pretrained(base, job["lora"])
    scalings = {s for m in model.modules() if hasattr(m, "lora_A") for s in m.scaling.values()}
    assert scalings == {1.0}, (name, scalings)
    with torch.no_grad():
        answers[name] = {"plain": plain, "lora": model.eval()(**torch.load(job["batch"])).logits}
assert not [module for module in sys.modules if module.startswith("spectune.")]
torch.save(answers, sys.argv[2])
