"""`python -m imagestream` is the command `imagestream`."""

from imagestream import main

if __name__ == "__main__":
    main()
