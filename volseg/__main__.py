"""`python -m volseg` is the `volseg` command."""

from volseg.cli import main

if __name__ == "__main__":
    main()
