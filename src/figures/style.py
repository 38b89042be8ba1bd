"""Style of all figures: sizes, fonts and colours."""

import io

import numpy as np
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure
from PIL import Image

from src.serving.drawing import class_colour

WIDTH = 9.0  # inches
DPI = 120  # a figure is 1080 pixels wide, slightly more than GitHub and Jupyter show
FONT_POINTS = 8.5
INK, SOFT, GRID = "#1f2328", "#6b7280", "#e3e5e8"
TRAIN, VAL, TARGET = "#e69f00", "#0072b2", "#d55e00"  # by Okabe and Ito, for any colour vision
STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "text.color": INK,
    "axes.labelcolor": INK,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.ymargin": 0.1,
    "axes.prop_cycle": cycler(color=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")),
    "lines.linewidth": 1.8,
    "legend.facecolor": "white",  # lines may pass behind it
    "legend.edgecolor": "none",
    "legend.fontsize": FONT_POINTS,
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}
with_style = rc_context(STYLE)  # decorator of functions that draw a figure


class NotebookFigure(Figure):
    """A matplotlib figure that a notebook displays as a small file.

    That is a JPEG if it shows images, else a PNG of 128 colours. A plain Figure is displayed only
    through pyplot, as one format for all figures, and several times larger. Sizes are in inches.
    """

    def __init__(
        self, height: float, width: float = WIDTH, jpeg: bool = False, layout: str = "constrained"
    ):
        super().__init__(figsize=(width, height), dpi=DPI, layout=layout)
        self.kind = "jpeg" if jpeg else "png"

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display({f"image/{self.kind}": self.encoded(), "text/plain": "<Figure>"}, raw=True)

    @with_style
    def encoded(self) -> bytes:
        """Return the figure as the bytes of a JPEG or PNG file."""
        png = io.BytesIO()
        self.savefig(png, format="png")
        image = Image.open(png).convert("RGB")
        file = io.BytesIO()
        if self.kind == "png":
            image = image.quantize(128, method=Image.Quantize.MAXCOVERAGE)  # keeps rare colours
        image.save(file, self.kind, quality=60, optimize=True)
        return file.getvalue()


def colours(count: int) -> np.ndarray:
    """Return the class colours for matplotlib: float [count, 3] in 0..1."""
    return np.array([class_colour(label) for label in range(count)]) / 255
