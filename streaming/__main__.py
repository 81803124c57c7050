"""`python -m streaming` is `imagestream`."""

from streaming.cli import main

if __name__ == "__main__":
    main()
