"""The `volseg` command, also available as `python -m volseg`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs


def main() -> None:
    """Run the `volseg` command.

    Ctrl-C and SIGTERM unwind the stack, which removes locks and temporary files, and exit with
    128 + the signal number.
    """
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _raise_again
    try:
        from volseg.cli import main as run  # slow enough to be interrupted by Ctrl-C

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
    """Send a signal again if Python ignored its exception.

    Python ignores exceptions raised in finalisers and weak-reference callbacks, which its import
    machinery uses a lot.
    """
    signals = {KeyboardInterrupt: signal.SIGINT, _TerminatedError: signal.SIGTERM}
    if ignored.exc_type not in signals:
        sys.__unraisablehook__(ignored)
        return
    import _thread
    import threading

    # From a thread, since an exception raised in this function would be ignored too.
    timer = threading.Timer(0.01, _thread.interrupt_main, [signals[ignored.exc_type]])
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
