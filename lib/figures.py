"""What the tools' figures share: colours, style, PNG. Import this before matplotlib: it disarms MPLBACKEND.

matplotlib reads the environment variable MPLBACKEND once, in its first import, and raises ValueError for a backend that
is not installed, such as a notebook's in another environment. The tools need no backend: they only write files.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_mplbackend() -> Iterator[None]:
    """A context in which matplotlib's first import does not see MPLBACKEND.

    Afterwards the variable is as before, and so is its effect on a program that imports a tool and draws by itself.
    """
    is_first_import = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend and is_first_import:
        with contextlib.suppress(ValueError):  # there is no such backend
            matplotlib.rcParams["backend"] = backend


with without_mplbackend():
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display needed

# Okabe and Ito's colours, which colour-blind readers can tell apart
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
