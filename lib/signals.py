"""Turns SIGTERM and Ctrl-C into an exception, which ends a training at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """Raised when the process receives the signal ``number``."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """A context in which the first SIGTERM or SIGINT raises Stopped; a second signal ends the process.

    An ignored signal (nohup, a background job) stays ignored. Outside the main thread, where Python allows no signal
    handlers, the context does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]

    def stop(number: int, _frame) -> None:
        for n in numbers:
            signal.signal(n, signal.SIG_DFL)
        raise Stopped(number)

    previous = {n: signal.signal(n, stop) for n in numbers}
    try:
        yield
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
