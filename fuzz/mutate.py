"""Mutations that stay near the format: of the bytes of a file, and of the tree of a JSON document."""

from __future__ import annotations

import json
import random
from typing import Any

# What programs trip over: borders of integers, floats that are none, names that are paths, trees that are deep.
INTEGERS = (-1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
HOSTILE: tuple[Any, ...] = (
    *INTEGERS,
    None,
    True,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "\x00",
    "\x1b[2J\n",
    "\ud800",
    "../../etc/passwd",
    "/dev/zero",
    "C:\\x",
    "a" * 5_000,
    "(a|aa)+[bc]",
    "(" * 300,
    "__metadata__",
    "U_OR",
    [],
    {},
    [[]],
    {"a": {}},
)
WORDS = tuple(
    b'"dtype" "shape" "data_offsets" [0,0] {} [] null true NaN Infinity 1e999 -1 99999999999999999999 "BF16" "I64" '
    b'"method" "svft" "spectral_r" "specadapt" "svdiff" "lidb" "orthogonal_adaptation" "columns" "bottom" "random" "r" '
    b'"rank_pattern" "alpha_pattern" "svd" "peft_type" "SPECTUNE" "LORA" "\\u0000" "\\ud800" &a *a !!python/object: '
    b"!!int !!timestamp --- ? : | > % @ ` 1_000 0x 2001-99-99".split()
)
DEEP = 30_000


def mutate(data: bytes, random_: random.Random) -> bytes:
    """Get a changed copy, by one to four steps, as a tree where the bytes are JSON and as bytes otherwise."""
    for _ in range(random_.choice((1, 1, 2, 4))):
        tree = _tree(data) if random_.random() < 0.7 else None
        if tree is not None:
            data = _dump(_change(tree, random_))
        else:
            data = _change_bytes(data, random_)
    return data


def _tree(data: bytes) -> Any:
    try:
        return json.loads(data) if data[:1] in (b"{", b"[") and len(data) < 100_000 else None
    except (ValueError, RecursionError):
        return None


def _dump(tree: Any) -> bytes:
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # an integer of too many digits
        return b"{}"


def _change(tree: Any, random_: random.Random) -> Any:
    if isinstance(tree, dict) and tree and random_.random() < 0.85:
        return _change_object(dict(tree), random_)
    if isinstance(tree, list) and tree and random_.random() < 0.85:
        entries, place = list(tree), random_.randrange(len(tree))
        step = random_.randrange(4)
        if step == 0:
            del entries[place]
        elif step == 1:
            entries.insert(place, random_.choice(HOSTILE))
        else:
            entries[place] = _change(entries[place], random_)
        return entries
    if isinstance(tree, int) and not isinstance(tree, bool) and random_.random() < 0.5:
        return tree + random_.choice((-1, 1, 2, 8, -8))
    if random_.random() < 0.02:
        nested: Any = {}
        for _ in range(200):
            nested = {"a": nested} if random_.random() < 0.5 else [nested]
        return nested
    return random_.choice(HOSTILE)


def _change_object(tree: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    key, step = random_.choice(list(tree)), random_.randrange(8)
    if step == 0:
        del tree[key]
    elif step == 1:
        tree[str(random_.choice(HOSTILE))] = tree[key]
    elif step == 2:
        tree[str(random_.choice(HOSTILE))] = random_.choice(HOSTILE)
    elif step == 3:
        tree[json.loads(random_.choice([word for word in WORDS if word[:1] == b'"' and b"ud8" not in word]))] = _change(
            tree[key], random_
        )
    else:
        tree[key] = _change(tree[key], random_)
    return tree


def _change_bytes(data: bytes, random_: random.Random) -> bytes:
    step, place = random_.randrange(9), random_.randrange(len(data) + 1)
    some = random_.randrange(1, 9)
    if step == 0:
        return data[:place] + bytes(random_.randrange(256) for _ in range(some)) + data[place + some :]
    if step == 1:
        return data[:place] + data[place + some :]
    if step == 2:
        return data[:place]
    if step == 3:
        return data[:place] + random_.choice(WORDS) + data[place:]
    if step == 4:
        number = random_.choice(INTEGERS) % 2**64
        return data[:place] + number.to_bytes(8, "little") + data[place + 8 :]
    if step == 5:
        return data[:place] + data[place : place + 40] * random_.choice((2, 3, 50)) + data[place + 40 :]
    if step == 6 and random_.random() < 0.05:
        return random_.choice((b"[", b'{"a":', b"- ")) * DEEP
    if step == 7 and data:
        spot = random_.randrange(len(data))
        return data[:spot] + bytes([data[spot] ^ (1 << random_.randrange(8))]) + data[spot + 1 :]
    number = random_.choice(INTEGERS) % 2**32
    return data[:place] + number.to_bytes(4, "little") + data[place + 4 :]
