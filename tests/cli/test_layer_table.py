"""Tables over layers: kinds in place of hundreds of rows, within 80 columns."""

from __future__ import annotations

import io

from spectune.cli.layer_table import print_by_kind, summaries
from spectune.cli.terminal import Console

FORMS = {"rank": "{:g}".format, "lost": "{:.1%}".format}
ROWS = [(f"model.layers.{i}.self_attn.{name}", (8, i / 100)) for i in range(32) for name in ("q_proj", "v_proj")]


def printed(rows: list[tuple[str, tuple[float, ...]]]) -> list[str]:
    stream = io.StringIO()
    print_by_kind(Console(file=stream, width=80), "lost by layer", FORMS, rows)
    return [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]


def test_hundreds_of_layers_are_three_rows_a_kind_in_80_columns() -> None:
    lines = printed(ROWS)
    assert len(lines) == 2 + 1 + 2 * 3 and max(map(len, lines)) <= 80
    assert [line.split() for line in lines[3:6]] == [
        ["q_proj", "32", "min", "8", "0.0%"],
        ["median", "8", "15.5%"],
        ["max", "8", "31.0%"],
    ]


def test_layers_that_say_the_same_are_one_row() -> None:
    assert printed([(name, (8, 0.25)) for name, _ in ROWS])[-1].split() == ["v_proj", "32", "8", "25.0%"]


def test_what_differs_only_behind_the_digits_shown_is_one_row() -> None:
    assert summaries([(1.0001,), (1.0002,)], ["{:.2f}".format]) == [("", ["1.00"])]
