"""Runs plot.py in the background of a training."""

import subprocess
import sys
from pathlib import Path

from lib.cli import warn

PLOT = Path(__file__).resolve().parent.parent / "plot.py"


class Plotter:
    """Runs plot.py, one process at a time. After a failure it warns once and never starts plot.py again."""

    def __init__(self, save: str, enabled: bool):
        self.command = [sys.executable, str(PLOT), "--", save]
        self.process: subprocess.Popen | None = None
        self.enabled = enabled

    def start(self) -> None:
        """Starts plot.py, unless the last process still runs."""
        if self.process is not None and self.process.poll() is not None:
            self.wait()
        if self.enabled and self.process is None:
            try:
                self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                                stderr=subprocess.PIPE,
                                                start_new_session=True)  # Ctrl-C does not reach it
            except OSError as error:
                self.give_up(str(error))

    def wait(self) -> None:
        if self.process is None:
            return
        _, stderr = self.process.communicate()
        if self.process.returncode:
            lines = stderr.decode(errors="replace").strip().splitlines()
            self.give_up(lines[-1] if lines else "no message")
        self.process = None

    def draw_last(self) -> None:
        """Draws once more and waits for it: a process that an earlier epoch started may have missed the last rows."""
        self.wait()
        self.start()
        self.wait()

    def give_up(self, reason: str) -> None:
        self.enabled = False
        warn(f"no figures, but the training is not affected: {reason}")
