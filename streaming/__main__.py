"""`python -m streaming` is `imagestream`."""

from streaming.cli import main

main()
