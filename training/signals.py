"""SIGTERM and Ctrl-C: a run finishes its step, saves, says how to continue, and exits with status 143 or 130."""

from __future__ import annotations

import signal
import threading


class Stopped(Exception):
    """The process was asked to stop.

    Attributes:
        status: the exit status, 143 for SIGTERM and 130 for SIGINT (Ctrl-C).
    """

    def __init__(self, number: int, note: str):
        self.status = 128 + number
        super().__init__(f"{signal.Signals(number).name}: {note}")


class StopRequest:
    """Catches SIGTERM and SIGINT within a `with` block.

    They raise `Stopped` at once, except while `deferred` is set: then the first one is only noted in `number`.
    """

    def __init__(self):
        self.number, self.deferred = 0, False
        self.note = "stopped before the first step"

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame) -> None:
        if not self.deferred or self.number:
            raise Stopped(number, self.note)
        self.number = number
