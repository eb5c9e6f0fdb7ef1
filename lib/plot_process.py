"""plot.py in the background of a training."""

import subprocess
import sys
from pathlib import Path

from lib.cli import warn

PLOT = Path(__file__).resolve().parent.parent / "plot.py"


class Plotter:
    """Runs plot.py, one process at a time. If it fails, one warning says so and it is not started again."""

    def __init__(self, save: str, enabled: bool):
        self.command = [sys.executable, str(PLOT), "--", save]
        self.process: subprocess.Popen | None = None
        self.enabled = enabled

    def start(self) -> None:
        """Starts it, unless it is still at work."""
        if self.process is not None and self.process.poll() is not None:
            self.wait()
        if self.enabled and self.process is None:
            try:
                self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                                stderr=subprocess.PIPE, start_new_session=True)  # away from Ctrl-C
            except OSError as error:
                self.give_up(str(error))

    def wait(self) -> None:
        if self.process is None:
            return
        _, stderr = self.process.communicate()
        if self.process.returncode:
            self.give_up((stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1])
        self.process = None

    def draw_last(self) -> None:
        """Draws once more, and waits: what an earlier epoch started may have missed the last rows."""
        self.wait()
        self.start()
        self.wait()

    def give_up(self, reason: str) -> None:
        self.enabled = False
        warn(f"no figures, but the training is not affected: {reason}")
