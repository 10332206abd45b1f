"""Requests to stop: SIGINT, SIGTERM, SIGHUP and SIGUSR1 end a run after its next step, when the state has been saved."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from engine.distributed import read_launch

SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
SECONDS_TO_FORWARD = 5.0


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""

    is_user_error = True

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the state is saved")
        self.exit_status = 128 + signal_number


class StopRequest:
    """Whether a signal has asked this process to stop, and which."""

    signal_number, since = 0, 0.0

    def __init__(self, *, is_launched: bool = False) -> None:
        self.is_launched = is_launched

    def handle(self, signal_number: int, _frame: object) -> None:
        """The handler of the signals. The second one ends the process at once."""
        if not self.signal_number:
            self.signal_number, self.since = signal_number, time.monotonic()
        # A launcher forwards the signal that a terminal or a scheduler has sent to all: that is no second request.
        elif not self.is_launched or time.monotonic() > self.since + SECONDS_TO_FORWARD:
            os._exit(128 + signal_number)


@contextmanager
def stop_request(resume_command: str | None = None) -> Iterator[StopRequest]:
    """Turn signals, except ignored ones (as under nohup), into a request to stop, which prints the ``resume_command``."""
    request = StopRequest(is_launched=read_launch() is not None)
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, request.handle)
    try:
        yield request
    except Stopped:
        if resume_command:
            print(f"continue: {resume_command}", flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def ignore_signals(_worker: int = 0) -> None:
    """For processes that load images: the main process decides when they stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
