"""What a saved adapter says to those who have PEFT and not Spectune."""

from __future__ import annotations

from pathlib import Path

from _spectune_autoload import METHOD

from ..checkpoint import TENSOR_FILE, write_atomically

# PEFT only says KeyError: 'SPECTUNE', and whoever meets it looks into adapter_config.json.
REQUIRES = {"requires": f"pip install {METHOD}"}
HEADING = "## How to load this adapter"


def say_how_to_load(folder: Path, method: str) -> None:
    """Add a section to the folder's README.md, which an adapter's folder has from PEFT or gets here."""
    card = folder / "README.md"
    if not card.exists() and not (folder / TENSOR_FILE).exists():
        return  # a config alone
    said = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    if HEADING not in said:
        what = f"This is a Spectune adapter (`{method}`). Where Spectune is installed, PEFT loads it like any other:"
        command = f"    {REQUIRES['requires']}"
        write_atomically(card, "\n\n".join(filter(None, [said.rstrip(), HEADING, what, command])) + "\n")
