"""The app that holds the verbs, and the one place where an error becomes a line and an exit status."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer

from ..errors import SpectuneError, one_line, printable
from .verbs import VERBS

INTERRUPTED = 130  # 128 + SIGINT, as shells count
# Libraries may swallow a KeyboardInterrupt (seen while they were being imported), so it is raised again after this many
# seconds. By then the cleaning up after the first one, a few deleted files, is done. Chosen.
AGAIN_SECONDS = 10

# Libraries that warn of parts of their own that are missing, as soon as something imports them.
CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")

app = typer.Typer(
    name="spectune",
    help="Fine-tune pretrained models in the singular space of their own weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb, (group, example) in VERBS.items():
    command = getattr(import_module(f".{verb}", __package__), verb)
    others = {"ignore_unknown_options": verb == "trl"}  # its options are those of trl's scripts
    app.command(name=verb, rich_help_panel=group, epilog=f"Example: {example}", context_settings=others)(command)


def _print_version(asked: bool) -> None:
    if asked:
        from .terminal import say

        say(f"spectune {version('spectune')}")
        raise typer.Exit


@app.callback()
def spectune(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune pretrained models in the singular space of their own weights."""


# Typer contains its own Click; this is the base class of all its usage errors.
WrongUsage: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt, and once more later unless the process has ended by then."""
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGALRM, _interrupt)
        signal.alarm(AGAIN_SECONDS)
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line: exit 0 when all went well, 1 for a refused request, 2 for wrong usage, 130 for Ctrl-C.

    A failure is one line on stderr. SPECTUNE_DEBUG=1 shows the traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    _show_warnings_plainly()
    for library in CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:  # Typer has already turned Ctrl-C into this status
            _fail("interrupted; nothing half-written was left behind", INTERRUPTED)
        raise SystemExit(status)
    except WrongUsage as error:
        complaint: Any = error
        complaint.show()
        raise SystemExit(complaint.exit_code) from None
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted; nothing half-written was left behind", INTERRUPTED)
    except SpectuneError as error:
        _fail(str(error), 1)
    except Exception as error:
        _fail(f"unexpected {type(error).__name__}: {one_line(error, 500)}. SPECTUNE_DEBUG=1 shows where.", 1)


def _show_warnings_plainly() -> None:
    """Escape control characters in Python's warnings, which may quote a file."""
    shown = warnings.formatwarning

    def plain(*words: Any, **more: Any) -> str:
        return printable(shown(*words, **more), keep="\n")

    warnings.formatwarning = plain


def _fail(line: str, status: int) -> None:
    if os.environ.get("SPECTUNE_DEBUG", "") not in ("", "0"):
        raise
    print(f"spectune: {printable(line)}", file=sys.stderr)
    raise SystemExit(status)
