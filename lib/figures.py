"""What the tools' figures share: colours, style, PNG."""

import io

from matplotlib.figure import Figure  # without pyplot: no display needed

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]  # Okabe-Ito
STYLE = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "0.9",
    "font.size": 10, "legend.fontsize": 8.5, "legend.title_fontsize": 8.5, "legend.framealpha": 0.9,
}


def png_of(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
