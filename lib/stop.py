"""Ctrl-C and SIGTERM. Imports nothing slow, so that train.py can call it first."""

import os
import signal


def stop_on_signals() -> None:
    """Lets SIGINT and SIGTERM end the process at once, with one line. Whenever that is, what is on disk is whole."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)


def stop(number: int, _frame) -> None:
    if "MASTER_ADDR" not in os.environ or os.environ.get("RANK") == "0":  # one line under torchrun, too
        text = f"train.py: stopped by {signal.Signals(number).name}; --resume continues from the last epoch saved\n"
        end_of_bar = "\n" if os.isatty(2) else ""
        os.write(2, (end_of_bar + text).encode())  # print() could have been interrupted itself
    os._exit(128 + number)
