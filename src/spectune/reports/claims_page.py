"""`write_claims`: published claims beside what was computed, as one HTML page that loads nothing and runs nothing."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomically

STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fffefc; --ink: #1d1c1a; --muted: #65625b; --rule: #e2dfd8; }
@media (prefers-color-scheme: dark) { :root { --page: #131312; --card: #1b1b1a; --ink: #ebe8e2; --muted: #a39f96;
  --rule: #31302d; } }
body { margin: 2rem auto; max-width: 960px; padding: 0 1rem; background: var(--page); color: var(--ink);
  overflow-wrap: break-word; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } .say { color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: .92rem; }
th, td { text-align: left; padding: .5rem .7rem; border: 1px solid var(--rule); font-weight: 400; }
thead th { color: var(--muted); } pre { overflow-x: auto; font-size: .8rem; color: var(--muted); }
"""
WORDS = {True: "yes", False: "no", None: "–"}


def write_claims(found: Mapping[str, Any], path: str | Path) -> None:
    """Write `title`, `source`, `rows` (claim, published, found, agrees) and `provenance` as a page; all is escaped."""
    title = html.escape(str(found["title"]))
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(row['claim'])}</th><td>{html.escape(row['published'])}</td>"
        f"<td>{html.escape(row['found'])}</td><td>{WORDS[row['agrees']]}</td></tr>"
        for row in found["rows"]
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<p class="say">{html.escape(str(found["source"]))}</p>'
        '<div class="scroll"><table><thead><tr><th>claim</th><th>published</th>'
        f"<th>found</th><th>agrees</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f"<pre>{html.escape(json.dumps(found['provenance'], indent=2))}</pre></body></html>\n"
    )
    write_atomically(path, page)
