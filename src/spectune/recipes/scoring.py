"""`Scoring`: the rewards of a run on written texts, and the log of these texts in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .data import Row, place
from .own_reward import OwnReward
from .rewards import Count, Reward

COMPLETIONS = "completions.jsonl"
# Texts of the first and of the last step that the page shows. Chosen.
SHOWN = 4


class Scoring:
    """The function of trl's trainer; `rows` are prepared rows, of which a prompt is the place."""

    __name__ = "reward"

    def __init__(self, rewards: Sequence[Reward], rows: Sequence[Row], tokens: Count) -> None:
        self.rewards, self.rows, self.tokens = rewards, rows, tokens
        self.log: Path | None = None

    def check(self, split: str) -> None:
        """Raise `DataError` for the first row whose reference a reward cannot use."""
        for reward in self.rewards:
            reward.ready()
            for i, row in enumerate(self.rows):
                try:
                    reward.check(row["answer"])
                except DataError as error:
                    raise DataError(f"{place(row, split, i)}: {error}") from None

    def scores(self, places: Sequence[int], written: list[str]) -> dict[str, list[float]]:
        """Get name -> the score of each text, and their weighted sum as `reward`."""
        rows = [self.rows[i] for i in places]
        found: dict[str, list[float]] = {}
        for reward in self.rewards:
            if isinstance(reward, OwnReward):
                columns = [row["columns"] for row in rows]
                said = reward.scores([_text(row["prompt"]) for row in rows], written, columns)
            else:
                said = [
                    reward.score(text, row["answer"] or "", self.tokens)
                    for text, row in zip(written, rows, strict=True)
                ]
            name = reward.function if isinstance(reward, OwnReward) else str(getattr(reward, "reward", ""))
            found[name if name not in found else f"{name} {len(found) + 1}"] = said
        sums = [0.0] * len(written)
        for reward, said in zip(self.rewards, found.values(), strict=True):
            sums = [total + reward.weight * score for total, score in zip(sums, said, strict=True)]
        return {"reward": sums, **found}

    def __call__(self, prompts: list[str], completions: list[str], **told: Any) -> list[float]:
        places = [int(prompt) for prompt in prompts]
        found = self.scores(places, completions)
        for name in list(found)[1:]:
            told["log_metric"](f"rewards/{name}", sum(found[name]) / len(found[name]))
        if self.log is not None:
            step = told["trainer_state"].global_step + 1
            lines = [
                {"step": step, "prompt": _text(self.rows[place]["prompt"]), "completion": text}
                | {name: said[i] for name, said in found.items()}
                for i, (place, text) in enumerate(zip(places, completions, strict=True))
            ]
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        return found["reward"]


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def read_log(folder: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Get what a run's model wrote, up to a step."""
    path = folder / COMPLETIONS
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines]
    return [line for line in found if last is None or line["step"] <= last]
