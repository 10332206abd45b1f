"""Requests to stop: SIGTERM, SIGINT and SIGUSR1 end a run at its next step, after the state has been saved."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))

SECONDS_TO_HAND_ON = 5.0


class Stopped(Exception):
    """The run was asked to stop, and its state is saved."""

    is_user_error = True

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the state is saved")
        self.exit_status = 128 + signal_number


class StopRequest:
    """Whether a signal has asked this process to stop, and which."""

    signal_number = 0
    since = 0.0

    def note(self, signal_number: int, _frame: object) -> None:
        """The handler of the signals. The second one stops at once."""
        if not self.signal_number:
            self.signal_number, self.since = signal_number, time.monotonic()
        # A launcher hands on the signal that a terminal or a scheduler has sent to all: that is no second request.
        elif "LOCAL_WORLD_SIZE" not in os.environ or time.monotonic() > self.since + SECONDS_TO_HAND_ON:
            os._exit(128 + signal_number)


@contextmanager
def stop_request(continue_with: str | None = None) -> Iterator[StopRequest]:
    """Note signals instead of being ended by them, as long as the context lasts.

    Args:
        continue_with: the command line that goes on with the run, printed when it is stopped.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    except Stopped:
        if continue_with:
            print(f"continue: {continue_with}", flush=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals(_worker: int = 0) -> None:
    """For processes that load images: the main process decides when to stop."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
