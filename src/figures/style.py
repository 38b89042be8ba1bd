"""How figures look: one style, one width, the colours that stand for something."""

import functools
import io

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from src.serving.drawing import class_colours

WIDTH = 9.0  # inches; times DPI a little more than GitHub shows, so that nothing is blurred
DPI = 120
INK, SOFT, GRID = "#1f2328", "#6b7280", "#e3e5e8"
TRAIN, VAL, TARGET = "#e69f00", "#0072b2", "#d55e00"  # Okabe and Ito's, told apart with any colour vision
SCALES = ("#0072b2", "#d55e00", "#009e73")  # strides 32, 16, 8
STYLE = {
    "figure.facecolor": "white", "axes.facecolor": "white", "text.color": INK, "axes.labelcolor": INK,
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.titlepad": 7, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "lines.linewidth": 1.8,
    "legend.frameon": False, "legend.fontsize": 8.5, "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
}  # fmt: skip


class NotebookFigure(Figure):
    """A white figure that a notebook shows by itself, without pyplot.

    As a PNG of 128 colours, or, where it is full of pictures, as a JPEG.
    """

    def __init__(self, height: float, pictures: bool = False, width: float = WIDTH):
        """height, width: in inches."""
        super().__init__(figsize=(width, height), dpi=DPI, layout="constrained")
        self.pictures = pictures

    def _ipython_display_(self) -> None:
        from IPython.display import display

        kind = "jpeg" if self.pictures else "png"
        display({f"image/{kind}": self.encoded(), "text/plain": "<Figure>"}, raw=True)

    def encoded(self) -> bytes:
        """The file's bytes, few enough to keep beside code."""
        drawn, file = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        image = Image.open(drawn).convert("RGB")
        if self.pictures:
            image.save(file, "jpeg", quality=80)
        else:
            image.quantize(128).save(file, "png", optimize=True)
        return file.getvalue()


def with_style(draw):
    """Runs a function that returns a figure under STYLE, leaving matplotlib's settings as they were."""

    @functools.wraps(draw)
    def inside(*args, **options) -> Figure:
        with rc_context(STYLE):
            figure = draw(*args, **options)
            figure.draw_without_rendering()  # ticks and layout are made now, in this style
        return figure

    return inside


def colours(count: int) -> np.ndarray:
    """The class colours as matplotlib wants them, 0..1 [count, 3]."""
    return np.array(class_colours(count)) / 255
