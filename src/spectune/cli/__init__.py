"""The command line: one short function per verb. Nothing heavy is imported before a verb runs."""

from .app import main as main
