"""``python -m attngen``: the command line."""

from .cli import main

main()
