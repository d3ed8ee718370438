"""The demo's task: tell which of 24 languages in Latin script a sentence of a web framework is written in.

The model has read English only. The sentences are Django's own translations of its interface (BSD licence), which
pip installs as gettext catalogues: real text, thousands of sentences, and close relatives among the languages
(Danish and two Norwegians; Czech and Slovak; Spanish, Catalan and Galician; Indonesian and Malay). Chosen over the ten
languages of chatterbot-corpus because a frozen body leaves far more to learn here (benchmarks/results/demo.json).
"""

from __future__ import annotations

import gettext
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..checkpoint import write_atomically
from ..errors import MissingExtraError

LANGUAGES = {
    "af": "Afrikaans", "nl": "Dutch", "de": "German", "da": "Danish", "nb": "Bokmål", "nn": "Nynorsk", "sv": "Swedish",
    "is": "Icelandic", "es": "Spanish", "ca": "Catalan", "gl": "Galician", "pt": "Portuguese", "it": "Italian",
    "ro": "Romanian", "fr": "French", "cs": "Czech", "sk": "Slovak", "pl": "Polish", "sl": "Slovenian",
    "sr_Latn": "Serbian", "fi": "Finnish", "et": "Estonian", "id": "Indonesian", "ms": "Malay",
}  # fmt: skip
# Placeholders, tags and entities are the same in all languages.
NOISE = re.compile(r"%\(\w+\)[a-z]|%[a-z%]|\{[^}]*\}|<[^>]+>|&\w+;|\n")
# Shorter strings (names of colours, "OK") are often the same word in several languages. Chosen.
FEWEST_WORDS, FEWEST_LETTERS = 3, 12
# Shares of the messages, not of the sentences: all translations of one message stay on one side.
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
SPLIT_SEED = 0


@dataclass(frozen=True)
class Sentences:
    """Texts with the place of their label in `labels`."""

    texts: tuple[str, ...]
    targets: tuple[int, ...]

    def first(self, count: int | None) -> Sentences:
        """Get the first `count` of them (they are in random order); all for None."""
        return Sentences(self.texts[:count], self.targets[:count])


@dataclass(frozen=True)
class LanguageTask:
    """Three parts without a common message, so that no test sentence is the translation of one seen in training."""

    labels: tuple[str, ...]
    train: Sentences
    validation: Sentences
    test: Sentences


def load_languages() -> LanguageTask:
    """Get the task; the same parts on every machine for one release of Django. `MissingExtraError` without it."""
    files = _files()
    rows = _rows({code: _catalogue(files[code]) for code in LANGUAGES})
    messages = sorted({message for message, _, _ in rows})
    random.Random(SPLIT_SEED).shuffle(messages)
    test_end = int(TEST_SHARE * len(messages))
    validation_end = test_end + int(VALIDATION_SHARE * len(messages))
    parts = {message: "test" if i < test_end else "validation" for i, message in enumerate(messages[:validation_end])}
    by_part: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for message, text, code in rows:
        by_part[parts.get(message, "train")].append((text, list(LANGUAGES).index(code)))
    return LanguageTask(tuple(LANGUAGES.values()), *(_shuffled(by_part[p]) for p in ("train", "validation", "test")))


def write_languages(folder: Path, count: int | None = None) -> dict[str, Path]:
    """Write the task as three JSONL files of text and label, at most `count` sentences each; get split -> file."""
    task, found = load_languages(), {}
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        part: Sentences = getattr(task, split).first(count)
        rows = ({"text": t, "label": task.labels[i]} for t, i in zip(part.texts, part.targets, strict=True))
        found[split] = folder / f"languages-{split}.jsonl"
        write_atomically(found[split], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return found


def _shuffled(rows: list[tuple[str, int]]) -> Sentences:
    random.Random(SPLIT_SEED).shuffle(rows)
    return Sentences(tuple(text for text, _ in rows), tuple(target for _, target in rows))


def _files() -> dict[str, list[Path]]:
    """Get language -> Django's compiled catalogues in it, in one walk through its folder and without importing it."""
    spec = find_spec("django")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "the demo needs the package django for its sentences. Run: pip install 'spectune[demo]'"
        )
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(Path(spec.origin).parent.glob("**/locale/*/LC_MESSAGES/django*.mo")):
        found[path.parts[-3]].append(path)
    return found


def _catalogue(files: list[Path]) -> dict[str, str]:
    """Get message -> translation from compiled catalogues; the first of two translations stays."""
    found: dict[str, str] = {}
    for path in files:
        with path.open("rb") as file:
            catalogue = vars(gettext.GNUTranslations(file))["_catalog"]
        for key, translation in catalogue.items():
            message = key[0] if isinstance(key, tuple) else key
            if message and translation:
                found.setdefault(message.split("\x04")[-1], clean(translation))
    return found


def clean(text: str) -> str:
    """Get a message without placeholders, tags and line breaks."""
    return re.sub(r"\s+", " ", NOISE.sub(" ", text)).strip()


def _rows(catalogues: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    """Get (message, sentence, language) for strings that are long enough, translated, and of only one language."""
    owners: dict[str, set[str]] = defaultdict(set)
    for code, catalogue in catalogues.items():
        for text in catalogue.values():
            owners[text.lower()].add(code)
    rows = []
    for code, catalogue in catalogues.items():
        seen: set[str] = set()
        for message, text in sorted(catalogue.items()):
            letters = re.sub(r"[\W\d_]+", " ", text.lower()).strip()
            too_short = len(text.split()) < FEWEST_WORDS or sum(map(str.isalpha, text)) < FEWEST_LETTERS
            untranslated = clean(message).lower() == text.lower()
            if too_short or untranslated or len(owners[text.lower()]) > 1 or letters in seen:
                continue
            seen.add(letters)
            rows.append((re.sub(r"[^a-z]+", " ", clean(message).lower()).strip(), text, code))
    return rows
