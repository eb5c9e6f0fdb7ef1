"""Colours and style of the tools' figures. They are drawn by matplotlib's Figure, which needs no backend."""

import os

os.environ.pop("MPLBACKEND", None)  # matplotlib cannot be imported if this names a backend that it does not know

import matplotlib.style
from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe set
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
GRID = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
        "grid.color": "0.9", "legend.fontsize": 8.5, "legend.framealpha": 0.9}


def style(settings: dict[str, object]):
    """-> a context with matplotlib's own defaults and these settings, whatever the user's matplotlibrc says"""
    return matplotlib.style.context(settings, after_reset=True)


__all__ = ["COLOURS", "GRID", "Figure", "style"]
