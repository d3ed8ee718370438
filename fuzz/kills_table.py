"""The table of `fuzz/kills.json` as docs/reliability.md has it: `python fuzz/kills_table.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WHAT = {
    "train": "`spectune train`, from the start",
    "resume": "`spectune train --resume`",
    "checkpoint": "one checkpoint, an older one deleted",
    "save": "`save_pretrained` inside `fresh_folder`, over an older adapter",
    "save_plainly": "PEFT's `save_pretrained` alone, over an older adapter",
    "export_lora": "`export --to lora`, over an older one",
    "merge": "`export --to merged`, over an older one",
    "fuse": "`fuse`, over an older one",
    "extract": "`extract`",
    "decompose": "`decompose` into a cache that holds something",
}


def table(recorded: dict[str, Any]) -> str:
    """Get one row for each action."""
    rows = ["| killed | kills | left something hidden | lost | reruns to the same bits |", "|---|---|---|---|---|"]
    for tally in recorded["actions"]:
        reruns = f"{tally['reruns_to_the_same']} of {tally['reruns']}"
        figures = (tally["kills"], tally["left_something_hidden"], tally["lost"], reruns)
        rows.append(f"| {WHAT[tally['action']]} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(json.loads(Path(__file__).with_name("kills.json").read_text())))
