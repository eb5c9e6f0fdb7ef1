"""Colours, style and PNG output of the tools' figures. Import this before matplotlib, so that it can hide MPLBACKEND.

matplotlib's first import raises ValueError if the environment variable MPLBACKEND names a backend that is not
installed. The tools need no backend, because they only write files.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_mplbackend() -> Iterator[None]:
    """A context that hides the environment variable MPLBACKEND from matplotlib's first import.

    Afterwards the variable is restored, and programs that import a tool still get the backend.
    """
    is_first_import = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend and is_first_import:
        with contextlib.suppress(ValueError):  # the backend is not installed
            matplotlib.rcParams["backend"] = backend


with without_mplbackend():
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display needed

# Okabe and Ito's colour-blind-safe set
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "0.9",
    "font.size": 10, "legend.fontsize": 8.5, "legend.title_fontsize": 8.5, "legend.framealpha": 0.9,
}


def png_of(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
