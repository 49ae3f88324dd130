"""SIGTERM, SIGUSR1 and SIGINT become a request that the training loop reads between two steps.

A scheduler's SIGTERM or SIGUSR1 (``sbatch --signal=USR1@120``), or a first CTRL-C, only sets ``requested``: the loop
finishes its step, saves and ends, and a save is never cut short. Whoever does not want to wait presses CTRL-C a second
time: ``KeyboardInterrupt`` at once, except inside ``hold()``, which the loop puts around saves; there it is raised when
the save is done. Ranks that a launcher started get one CTRL-C twice, from the terminal and from the launcher, so there
a second one changes nothing (the launcher itself kills ranks that stay). Rejected: raising from the first signal (the
optimizer step in progress would be half done) and a handler that saves by itself.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Context manager: while it is open, ``requested`` holds the name of the first stop signal received, or None.

    The old handlers are back when it closes. Python delivers signals to the main thread only, so elsewhere (training
    started from a thread of a notebook) it changes nothing and ``requested`` stays None.

    Args:
        launched: whether a launcher started this process as one of many; then no SIGINT raises.
    """

    def __init__(self, launched: bool = False) -> None:
        self._launched = launched
        self.requested: str | None = None
        self._interrupted = False  # a first SIGINT came
        self._held = False
        self._pending = False  # a second one came while held
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = self.requested or signal.Signals(number).name
        if number == signal.SIGINT and self._interrupted and not self._launched:
            if not self._held:
                raise KeyboardInterrupt
            self._pending = True
        self._interrupted |= number == signal.SIGINT

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let no signal interrupt the block; a second SIGINT received in it is raised at its end. Not nested."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt
