"""SIGTERM and Ctrl-C as an exception, which ends a training at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """The signal ``number`` came."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise Stopped, once: a second signal ends the process.

    A signal that is ignored (nohup, a background job) stays so. Threads other than the main one get no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]

    def stop(number: int, _frame) -> None:
        for s in caught:
            signal.signal(s, signal.SIG_DFL)
        raise Stopped(number)

    before = {s: signal.signal(s, stop) for s in caught}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
