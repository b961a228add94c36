"""SIGINT ends a command with one line, and leaves nothing behind, whenever it comes.

Facts: Python raises KeyboardInterrupt wherever the main thread happens to be. Within an import it
may get lost, or be turned into another error. Within a finaliser it is printed and forgotten, and
C code that calls Python may drop it. A second one breaks off what the first one makes the program
clean up. Strategy: from the first interrupt on, the command is looked at every little while until
it is done. KeyboardInterrupt is raised whenever none is under way and nothing is being imported.
"""

from __future__ import annotations

import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_SOON = 0.01  # seconds


class Interrupts:
    """A context in which SIGINT raises KeyboardInterrupt so; after it, for a process whose work is
    done (`lasting`), SIGINT does nothing. A process that was started with SIGINT ignored, and a
    thread that is not the main one, are left as they are."""

    def __init__(self, *, lasting: bool) -> None:
        self._lasting = lasting
        self._working = True

    def __enter__(self) -> None:
        self._outermost = sys._getframe(1)  # an import around all of this is none of ours
        self._before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGALRM)}
        if self._before[signal.SIGINT] is not signal.default_int_handler:
            self._before = {}
        try:
            for number in self._before:
                signal.signal(number, self._interrupted)
        except ValueError:  # not the main thread
            self._before = {}
        if self._before:
            sys.unraisablehook = self._lost

    def __exit__(self, *error: object) -> None:
        self._working = False
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
            sys.unraisablehook = sys.__unraisablehook__
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._lasting else handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if not self._working:
            return
        signal.setitimer(signal.ITIMER_REAL, _SOON)
        if not _interrupt_under_way() and not self._importing(frame):
            raise KeyboardInterrupt

    def _importing(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._outermost:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False

    def _lost(self, found: sys.UnraisableHookArgs) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):  # else it is raised anew
            sys.__unraisablehook__(found)


def _interrupt_under_way() -> bool:
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False
