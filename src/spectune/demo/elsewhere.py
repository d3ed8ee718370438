"""A script for a fresh process: predict with an adapter from the disk. A LoRA needs only plain PEFT.

    python elsewhere.py JOB.json ANSWER.json

It imports peft by hand and spectune not at all: that is what it proves.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorWithPadding


def main(job: dict[str, Any], answer: Path) -> None:
    """Write the most probable label of every text of the job."""
    if job["with_spectune"]:
        importlib.import_module("spectune")
    peft = importlib.import_module("peft")
    torch.set_num_threads(job["threads"])
    base = AutoModelForTokenClassification.from_pretrained(
        job["base"], num_labels=job["labels"], trust_remote_code=False
    )
    model = peft.PeftModel.from_pretrained(base, job["adapter"]).eval()
    if not job["with_spectune"] and "spectune" in sys.modules:
        raise SystemExit("spectune was imported, so this proves nothing")
    tokenizer = AutoTokenizer.from_pretrained(job["base"], trust_remote_code=False)
    rows = tokenizer(job["texts"], truncation=True, max_length=job["max_tokens"])["input_ids"]
    collate, found = DataCollatorWithPadding(tokenizer), [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(rows), 64):
        places = order[start : start + 64]
        with torch.no_grad():
            batch = collate([{"input_ids": rows[i]} for i in places])
            mask = batch["attention_mask"][..., None]
            labels = ((model(**batch).logits * mask).sum(1) / mask.sum(1)).argmax(-1).tolist()
        for place, label in zip(places, labels, strict=True):
            found[place] = label
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
