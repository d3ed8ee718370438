"""What an import costs, without a clock: only which modules it brings in."""

from __future__ import annotations

import ast
import subprocess
import sys

from ..effort import PATIENCE

HEAVY = {"torch", "peft", "transformers", "numpy", "safetensors", "datasets", "diffusers", "accelerate"}


def modules_after(code: str) -> set[str]:
    """The top-level modules of a fresh interpreter that has run `code`."""
    report = (
        "import sys, atexit; atexit.register(lambda: print('\\n' + repr({m.split('.')[0] for m in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found: set[str] = ast.literal_eval(done.stdout.splitlines()[-1])
    return found


def test_the_command_line_answers_help_without_torch() -> None:
    found = modules_after("sys.argv = ['spectune', '--help']\nfrom spectune.cli import main\nmain()")
    assert "typer" in found
    assert not found & HEAVY


def test_importing_spectune_alone_imports_nothing_heavy() -> None:
    found = modules_after("import spectune")
    assert "spectune" in found
    assert not found & HEAVY


def test_importing_spectune_imports_nothing_that_peft_does_not() -> None:
    both, peft = modules_after("import peft, spectune"), modules_after("import peft")
    # The start-up file of an installed spectune is one; a checkout on the path has none.
    assert both - peft - {"_spectune_autoload"} == {"spectune"}


def test_the_network_is_off_before_anything_reads_the_switch() -> None:
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
