"""The `volseg` command, which is `python -m volseg` too."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def main() -> None:
    """Entry point of the `volseg` command. Ctrl-C and SIGTERM unwind, so that locks and temporary
    files go, and end with 128 + the number of the signal."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _raise_again
    try:
        from volseg.cli import main as run  # takes part of a second, in which Ctrl-C may come

        run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except _TerminatedError:
        sys.exit(128 + signal.SIGTERM)


class _TerminatedError(BaseException):
    """SIGTERM arrived."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


def _raise_again(ignored: UnraisableHookArgs) -> None:
    """Python drops what is raised in a finaliser or in a callback of a weak reference, of which its
    import machinery has many: a signal that came there is sent again a moment later."""
    signals = {KeyboardInterrupt: signal.SIGINT, _TerminatedError: signal.SIGTERM}
    if ignored.exc_type not in signals:
        sys.__unraisablehook__(ignored)
        return
    import _thread
    import threading

    # From a thread, since an exception that was raised in here would be dropped too.
    again = threading.Timer(0.01, _thread.interrupt_main, [signals[ignored.exc_type]])
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
