"""`python -m imagestream` runs the command `imagestream`."""

from imagestream import main

if __name__ == "__main__":
    main()
