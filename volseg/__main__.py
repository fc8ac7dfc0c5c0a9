"""The `volseg` command, which is `python -m volseg` too."""

import sys


def main() -> None:
    """Entry point of the `volseg` command."""
    try:
        from volseg.cli import main as run  # takes part of a second, in which Ctrl-C may come

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
