"""`python -m spectune`."""

from .cli.app import main

main()
