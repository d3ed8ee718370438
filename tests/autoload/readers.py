"""A process that never names the package: each reader loads the adapter in a fork in which nothing has loaded it yet.

    python -m tests.autoload.readers FOLDER

FOLDER has a base and its adapter for each kind of model. Prints {reader: outputs, or what went wrong} as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The heavy parts of all readers, imported once and before the forks.
import peft
import torch
import transformers

IDS = [[5, 6, 7, 8, 9, 10]]


def logits(model: Any) -> list[float]:
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits[0, -1].tolist()


def causal_lm(place: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(place / "llama")


def peft_model(place: Path) -> Any:
    return logits(peft.PeftModel.from_pretrained(causal_lm(place), place / "llama-adapter"))


def auto_peft(place: Path) -> Any:
    return logits(peft.AutoPeftModelForCausalLM.from_pretrained(place / "llama-adapter"))


def auto_model(place: Path) -> Any:
    return logits(transformers.AutoModelForCausalLM.from_pretrained(place / "llama-adapter"))


def load_adapter(place: Path) -> Any:
    model = causal_lm(place)
    model.load_adapter(str(place / "llama-adapter"))
    return logits(model)


def pipeline(place: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama")
    return logits(transformers.pipeline("text-generation", str(place / "llama-adapter"), tokenizer=tokenizer).model)


def lm_eval(place: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    read = HFLM(pretrained=str(place / "llama"), peft=str(place / "llama-adapter"), device="cpu", batch_size=1)
    return logits(read.model)


def trl(place: Path) -> Any:
    """Read it, train nothing (a rate of zero), and give the outputs of what the trainer has."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = peft.AutoPeftModelForCausalLM.from_pretrained(place / "llama-adapter", is_trainable=True)
    options = {"max_steps": 1, "learning_rate": 0.0, "use_cpu": True, "report_to": [], "bf16": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama")
    data = Dataset.from_dict({"text": ["w1 w2 w3"] * 4})
    trainer = SFTTrainer(
        model, SFTConfig(str(place / "run"), **options), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return logits(trainer.model)


def sentence_transformers(place: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(place / "bert"), device="cpu")
    model.load_adapter(str(place / "bert-adapter"))
    return model.encode(["w1 w2 w3"])[0].tolist()


def diffusers(place: Path) -> Any:
    from diffusers import UNet2DConditionModel

    unet = peft.PeftModel.from_pretrained(UNet2DConditionModel.from_pretrained(place / "unet"), place / "unet-adapter")
    return unet_output(unet.eval())


def unet_output(unet: Any) -> list[float]:
    draw = torch.Generator().manual_seed(0)
    image, text = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 3, 8, generator=draw)
    with torch.no_grad():
        return unet(image, 1, text).sample.flatten()[:50].tolist()


# Reader -> (the package whose version counts, the model whose outputs it gives).
READERS: dict[Callable[[Path], Any], tuple[str, str]] = {
    peft_model: ("peft", "llama"),
    auto_peft: ("peft", "llama"),
    auto_model: ("transformers", "llama"),
    load_adapter: ("transformers", "llama"),
    pipeline: ("transformers", "llama"),
    trl: ("trl", "llama"),
    lm_eval: ("lm_eval", "llama"),
    sentence_transformers: ("sentence-transformers", "bert"),
    diffusers: ("diffusers", "unet"),
}


def in_a_fork(read: Callable[[Path], Any], place: Path) -> Any:
    """Get what a reader gives, {"missing": name} without its package, or {"error": text}."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        os.close(ours)
        os.dup2(2, 1)  # what libraries print is not our answer
        try:
            assert not any(name.split(".")[0] == "spectune" for name in sys.modules), "something has loaded it before"
            found: Any = read(place)
        except ModuleNotFoundError as error:
            found = {"missing": error.name}
        except BaseException:
            found = {"error": traceback.format_exc()}
        os.write(theirs, json.dumps(found).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return json.loads(said or '{"error": "the process died"}')


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[2:]
    chosen = [read for read in READERS if not names or read.__name__ in names]
    print(json.dumps({read.__name__: in_a_fork(read, Path(sys.argv[1])) for read in chosen}))
