"""Part f: SmolLM2-135M in bfloat16 on GSM8K: LoRA and `spectral_a`, loss and exact match, three seeds."""

from __future__ import annotations

import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectune import SpectralConfig

from .llama import TARGETS
from .notebook import Notebook, NotHere, Setting
from .timing import synchronize

SEEDS = (0, 1, 2)
# The middle of what was seen to work (benchmarks/results/rates.json), as in benchmarks/gsm8k.py.
RATE = 1e-3
STEPS, BATCH, LONGEST, WARM_UP = 150, 16, 320, 10
QUESTIONS, NEW_TOKENS, ANSWERS_AT_ONCE = 128, 160, 128
METHODS: dict[str, Any] = {
    "spectral_a": lambda: SpectralConfig(method="spectral_a", r=8, target_modules=TARGETS),
    "LoRA": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS),
}
Pair = tuple[list[int], list[int]]


def lines(folder: str, name: str) -> list[dict[str, str]]:
    """Get the rows of a JSONL file, packed or not."""
    for path in (Path(folder) / f"{name}.jsonl", Path(folder) / f"{name}.jsonl.gz"):
        if path.exists():
            opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
            with opened as file:
                return [json.loads(line) for line in file]
    raise FileNotFoundError(f"{folder}: asked for {name}.jsonl or {name}.jsonl.gz, neither is there. Carry it.")


def source(folder: str) -> dict[str, Any]:
    """Get how transformers reads the folder: its own files, or the one GGUF in it."""
    packed = sorted(Path(folder).glob("*.gguf"))
    return {"gguf_file": packed[0].name} if packed and not (Path(folder) / "config.json").exists() else {}


def encoded(tokenizer: Any, row: dict[str, str]) -> Pair:
    """Get the ids of question and answer; in the model's own chat form where it has one."""
    asked = row["question"] + "\nEnd with #### and the number."
    if getattr(tokenizer, "chat_template", None):
        words = [{"role": "user", "content": asked}]
        asked = tokenizer.apply_chat_template(words, tokenize=False, add_generation_prompt=True)
    prompt: list[int] = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer: list[int] = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    return prompt, [*answer, tokenizer.eos_token_id]


def padded(pairs: list[Pair], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Get ids and labels; only answers are learned. Padding stands on the right, where no answer looks."""
    rows = [(prompt + answer, [-100] * len(prompt) + answer) for prompt, answer in pairs]
    width = min(LONGEST, max(len(ids) for ids, _ in rows))
    ids = [(row + [0] * width)[:width] for row, _ in rows]
    labels = [(row + [-100] * width)[:width] for _, row in rows]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


def loss_of(model: Any, pairs: list[Pair], device: str) -> torch.Tensor:
    ids, labels = padded(pairs, device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def number(text: str) -> str | None:
    """Get the answer by GSM8K's rule: what follows #### ."""
    _, mark, rest = text.partition("#### ")
    return rest.split()[0].replace(",", "") if mark and rest.split() else None


@torch.no_grad()
def measured(model: Any, tokenizer: Any, questions: list[dict[str, str]], setting: Setting) -> dict[str, float]:
    """Get the loss on the answers, and the share of greedy answers with the right number."""
    model.eval()
    pairs = [encoded(tokenizer, row) for row in questions]
    losses = [float(loss_of(model, pairs[i : i + BATCH], setting.device)) for i in range(0, len(pairs), BATCH)]
    right = 0
    for start in range(0, len(pairs), ANSWERS_AT_ONCE):
        prompts = [prompt for prompt, _ in pairs[start : start + ANSWERS_AT_ONCE]]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=setting.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=setting.device)
        how = {"max_new_tokens": 4 if setting.tiny else NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        written = model.generate(input_ids=ids, attention_mask=mask, **how)[:, width:]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        wanted = [number(row["answer"]) for row in questions[start : start + ANSWERS_AT_ONCE]]
        right += sum(number(text) == answer for text, answer in zip(texts, wanted, strict=True))
    return {"loss": statistics.mean(losses), "exact_match": right / len(pairs)}


def trained(setting: Setting, method: str, seed: int, data: dict[str, Any]) -> dict[str, Any]:
    """Train one adapter from one seed, and measure it."""
    torch.manual_seed(seed)
    model = get_peft_model(fresh(setting), METHODS[method]()).train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=RATE, weight_decay=0.0)
    steps = 2 if setting.tiny else STEPS
    order = torch.randperm(len(data["train"]), generator=torch.Generator().manual_seed(seed)).tolist()
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        places = order[step * BATCH : (step + 1) * BATCH]
        loss = loss_of(model, [encoded(data["tokenizer"], data["train"][place]) for place in places], setting.device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    synchronize(setting)
    row = {"trained": sum(p.numel() for p in wanted), "train_seconds": round(time.perf_counter() - started, 1)}
    row |= {"steps": steps, "rate": RATE, "last_train_loss": float(loss.detach())}
    return row | measured(model, data["tokenizer"], data["test"], setting)


def fresh(setting: Setting) -> Any:
    assert setting.smollm is not None
    model = AutoModelForCausalLM.from_pretrained(setting.smollm, dtype=torch.bfloat16, **source(setting.smollm))
    return model.to(setting.device)


def run(setting: Setting, notebook: Notebook) -> None:
    names = ["before", *(f"{method}, seed {seed}" for seed in SEEDS for method in METHODS)]
    if not (setting.smollm and setting.gsm8k):
        raise NotHere("not run: no weights given")
    notebook.plan(names)
    tokenizer = AutoTokenizer.from_pretrained(setting.smollm, **source(setting.smollm))
    asked = lines(setting.gsm8k, "gsm8k_test")[: 4 if setting.tiny else QUESTIONS]
    data = {"tokenizer": tokenizer, "train": lines(setting.gsm8k, "gsm8k_train"), "test": asked}
    notebook.note("what", f"{Path(setting.smollm).name} on GSM8K, {len(asked)} test questions, batches of {BATCH}")
    notebook.row("before", lambda: measured(fresh(setting), tokenizer, asked, setting))
    for seed in SEEDS:
        for method in METHODS:
            notebook.row(f"{method}, seed {seed}", lambda m=method, s=seed: trained(setting, m, s, data))
