"""`python -m spectune.cli`."""

from .app import main

main()
