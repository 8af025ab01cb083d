"""The look of all pictures: colours, fonts, and how a figure is written to a file.

No display is needed, and the same figure always makes the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any, Literal

import matplotlib as mpl
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

INK, FAINT = "#222222", "#8a8a8a"
GREY, BLUE = "#9a9a9a", "#56b4e9"
"""The prompt, and the parent; in histograms all tokens, and the longest path."""
THREADS = ("#e69f00", "#2fb58f", "#cc79a7", "#f0e442", "#d55e00")
"""Threads in the order of their outlines. The colours are those of Okabe and Ito, which
colour-blind readers can tell apart; the green is lighter, because boxes contain dark text."""
RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Lines of training runs. They are darker, because lines are thin."""
FULL, PALE = 0.65, 0.2
"""Strength of the colour of a trained token, and of one without a loss."""
SMALL = 8.0
"""Points of the text in boxes, which is monospace so that its width is known before drawing."""
CHARACTER = SMALL * 0.602 / 72
"""Inches per character of that text."""

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # part of matplotlib, so pictures are the same on every machine
    "font.size": 9,
    "text.color": INK,
    "text.hinting": "no_hinting",  # otherwise letters move apart and lines leave their boxes
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "svg.hashsalt": "tw_jax",
}


def save(figure: Figure, file: str | Path | IO[bytes], format: Literal["png", "svg"]) -> None:
    """Writes a figure without a date, so that the same figure makes the same bytes."""
    metadata = {"Date": None} if format == "svg" else None
    with mpl.rc_context(STYLE):
        figure.savefig(file, format=format, dpi=160, facecolor="white", metadata=metadata)


def blend(color: str, strength: float) -> tuple[float, float, float]:
    """A colour on white; a strength of 1 leaves it as it is."""
    red, green, blue = (1 - strength * (1 - c) for c in to_rgb(color))
    return red, green, blue
