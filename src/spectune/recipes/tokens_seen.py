"""Mistakes in a language model's examples that show in their tokens, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .answers import begins_texts
from .tokens import IGNORED, Tokens

# Examples whose tokens are compared; a tokenizer and a template treat others in the same way. Chosen.
LOOKED_AT = 64
Taught = tuple[list[int], list[int]]


def losses(taught: Sequence[Taught], limit: int, split: str) -> list[str]:
    """Get how many examples are cut, and how many lose their whole answer."""
    long = [labels for ids, labels in taught if len(ids) > limit]
    lost = sum(is_silent(labels[:limit]) and not is_silent(labels) for labels in long)
    silent = sum(is_silent(labels) for _, labels in taught)
    of = f"of {len(taught):,} examples of {split}"
    said = [f"{len(long):,} {of} are cut at {limit:,} tokens and lose their ends"] if long else []
    said += [f"{lost:,} of them lose their whole answer and are left out. Raise data.max_tokens"] if lost else []
    return said + ([f"{silent:,} {of} have no token with loss and are left out"] if silent else [])


def is_silent(labels: Sequence[int]) -> bool:
    """Ask whether nothing is learned from an example; its first token is never predicted."""
    return all(label == IGNORED for label in labels[1:])


def ends_and_beginnings(tokens: Tokens, rows: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> list[str]:
    """Get mistakes in the first and last tokens of some examples; `ends`: the tokens that end an answer."""
    tokenizer, taught = tokens.tokenizer, [tokens.taught(row) for row in rows]
    said = []
    if not any(label in ends for _, labels in taught for label in labels):
        names = " or ".join(repr(name) for name in tokenizer.convert_ids_to_tokens(list(ends)))
        last = repr(tokenizer.convert_ids_to_tokens([taught[0][0][-1]])[0])
        said.append(
            f"the model does not learn to stop: generation ends at {names}, but the first example ends with {last}"
        )
    if begins_texts(tokenizer):
        first = tokenizer.bos_token_id
        without = sum(ids[:1] != [first] for ids, _ in taught)
        twice = sum(ids[:2] == [first, first] for ids, _ in taught)
        name, of = repr(tokenizer.bos_token), f"of {len(taught)} examples"
        said += [f"{without} {of} do not begin with {name}, as texts of this tokenizer do"] if without else []
        said += [f"{twice} {of} begin with {name} twice: remove it from the data or the template"] if twice else []
    return said


def disagreements(tokens: Tokens, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Get how many examples have another prompt than in training, and the first difference."""
    other = [row for row in rows if "prompt" in row and not tokens.agrees(row)]
    if not other:
        return []
    asked, (taught, _) = tokens.asked(other[0]), tokens.taught(other[0])
    at = next(i for i, token in enumerate(asked) if taught[i : i + 1] != [token])
    show = tokens.tokenizer.decode
    return [
        f"in {len(other)} of {len(rows)} examples the prompt differs from training: prompt {show(asked[at:])[:60]!r}, "
        f"training {show(taught[at:])[:60]!r}. Give a data.chat_template that writes both alike"
    ]
