"""Figures full of pictures: records, samples, detections, heatmap maps, and the cells that answer for an object."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from src.figures.style import SOFT, WIDTH, NotebookFigure, colours, with_style
from src.model.boxes import cxcywh_to_xyxy
from src.model.network import STRIDES
from src.serving.drawing import draw_heatmap
from src.serving.images import load_image
from src.training.loss import assign_targets

DARK = "#141414"  # edge of lines and chips, so that they are seen on any picture
DASHED = (0, (3, 2))
BETWEEN = "   ·   "  # two parts of a caption


def _grid(
    count: int, columns: int, shape: float = 1.0, caption: str = "", titled: bool = False
) -> tuple[NotebookFigure, list[Axes]]:
    """A figure for `count` pictures whose height is `shape` times their width; a caption stands below them."""
    columns = max(1, min(columns, count))
    rows, side = -(-count // columns), WIDTH / max(columns, 3)  # inches
    height = rows * (side * shape + 0.22 * titled) + 0.25 * bool(caption)
    figure = NotebookFigure(height, pictures=True, width=columns * side)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    if caption:
        figure.supxlabel(caption if columns > 1 else caption.replace(BETWEEN, "\n"), fontsize=8.5, color=SOFT)
    return figure, list(axes[:count])


def _show(axis: Axes, image: np.ndarray, title: str = "") -> None:
    axis.imshow(image)
    axis.set_title(title, fontsize=8.5, fontweight="normal", pad=4)


def _frame(axis: Axes, box, colour, **style) -> None:
    """One box xyxy in pixels: a coloured line with a dark edge."""
    x1, y1, x2, y2 = box
    line = {"linewidth": 1.4} | style
    edge = [withStroke(linewidth=line["linewidth"] + 1.4, foreground=DARK)]
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, path_effects=edge, **line))


def _boxes(axis: Axes, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str], count: int) -> None:
    """Boxes [n, 4] xyxy in pixels of the picture on `axis`, each with its name on a chip of its class's colour."""
    height, width = axis.images[0].get_array().shape[:2]
    for box, label, name in zip(boxes, labels, names, strict=True):
        colour = colours(count)[label]
        _frame(axis, box, colour)
        below = box[1] < 0.08 * height
        right = box[0] > 0.72 * width
        axis.text(
            box[2] if right else max(0, box[0]), box[1], name, fontsize=6.5,
            color="white" if colour @ (0.2126, 0.7152, 0.0722) < 0.45 else "black",
            va="top" if below else "bottom", ha="right" if right else "left",
            bbox={"facecolor": colour, "edgecolor": DARK, "linewidth": 0.4, "pad": 1.2},
        )  # fmt: skip


@with_style
def plot_annotations(records: Sequence, classes: Sequence[str], columns: int = 4) -> Figure:
    """Pictures as they are, with the boxes and names of their objects; "?" marks difficult ones."""
    images = [load_image(record.image) for record in records]
    figure, axes = _grid(len(records), columns, max(image.shape[0] / image.shape[1] for image in images))
    for axis, image, record in zip(axes, images, records, strict=True):
        _show(axis, image)
        names = [classes[label] + "?" * bool(hard) for label, hard in zip(record.labels, record.difficult, strict=True)]
        _boxes(axis, record.boxes, record.labels, names, len(classes))
    return figure


@with_style
def plot_samples(samples: Sequence[tuple], classes: Sequence[str], titles: Sequence[str] = (), columns: int = 4) -> Figure:
    """Samples as the network gets them: uint8 [3, S, S], boxes cxcywh in 0..1 [n, 4], labels [n]."""
    figure, axes = _grid(len(samples), columns, titled=bool(titles))
    for number, (axis, (image, boxes, labels, *_)) in enumerate(zip(axes, samples, strict=True)):
        _show(axis, image.permute(1, 2, 0).numpy(), titles[number] if titles else "")
        boxes = cxcywh_to_xyxy(boxes).numpy() * image.shape[-1]
        _boxes(axis, boxes, labels.numpy(), [classes[label] for label in labels], len(classes))
    return figure


@with_style
def plot_detections(
    images: Sequence[np.ndarray], found: Sequence, classes: Sequence[str], records: Sequence = (), columns: int = 4
) -> Figure:
    """Detections over their pictures uint8 [H, W, 3], confidence in %; of `records`, the true boxes dashed."""
    caption = "coloured: found, with confidence in %" + (BETWEEN + "white, dashed: what is there" if len(records) else "")
    figure, axes = _grid(len(images), columns, max(image.shape[0] / image.shape[1] for image in images), caption)
    for number, (axis, image, here) in enumerate(zip(axes, images, found, strict=True)):
        _show(axis, image)
        names = [f"{classes[label]} {100 * score:.0f}" for label, score in zip(here.labels, here.scores, strict=True)]
        _boxes(axis, here.boxes, here.labels, names, len(classes))
        for box in records[number].boxes if len(records) else ():
            _frame(axis, box, "white", linewidth=0.9, linestyle=DASHED)
    return figure


@with_style
def plot_gradcam(
    images: Sequence[np.ndarray], explanations: Sequence, classes: Sequence[str], titles: Sequence[str] = ()
) -> Figure:
    """Above what was found in each picture, below an `Explanation` of what is framed: where the network looked."""
    caption = "above: found, confidence in %" + BETWEEN + "below: brighter counted more"
    shape = max(image.shape[0] / image.shape[1] for image in images)
    titled = any(titles) or any(found.message for found in explanations)
    figure, axes = _grid(2 * len(images), len(images), shape, caption, titled=titled)
    for number, (image, found) in enumerate(zip(images, explanations, strict=True)):
        above, below, what = axes[number], axes[len(images) + number], found.detections
        names = [f"{classes[label]} {100 * score:.0f}" for label, score in zip(what.labels, what.scores, strict=True)]
        _show(above, image, titles[number] if titles else "")
        _boxes(above, what.boxes, what.labels, names, len(classes))
        _show(below, draw_heatmap(image, found.heatmap, 0.75), fill(found.message, 42))
        for row in found.explained:
            _frame(below, what.boxes[row], colours(len(classes))[what.labels[row]])
    return figure


@with_style
def plot_anchor_assignment(sample: tuple, anchors: torch.Tensor, classes: Sequence[str]) -> Figure:
    """Which cell and which anchor [3, 3, 2] answer for each object of a sample, on each of the three grids."""
    image, boxes, labels = sample[:3]
    side = image.shape[-1]
    targets = torch.cat((torch.zeros(len(labels), 1), labels[:, None].float(), boxes), dim=1)
    caption = "filled: the cell that holds an object's centre" + BETWEEN + "dashed: its anchor, before the network adjusts it"
    figure, axes = _grid(3, 3, caption=caption, titled=True)
    assigned = assign_targets(targets, [side // stride for stride in STRIDES], anchors, batch=1)
    for axis, stride, found, scale in zip(axes, STRIDES, assigned, anchors, strict=True):
        _show(axis, image.permute(1, 2, 0).numpy(), f"stride {stride}: {side // stride} × {side // stride} cells")
        lines = np.arange(0, side + 1, stride) - 0.5
        axis.hlines(lines, -0.5, side - 0.5, color="white", linewidth=0.5, alpha=0.6)
        axis.vlines(lines, -0.5, side - 0.5, color="white", linewidth=0.5, alpha=0.6)
        for row, column, anchor, label in zip(found.row, found.column, found.anchor, labels, strict=True):
            colour, cell = colours(len(classes))[label], np.array([column, row], dtype=float) * stride - 0.5
            axis.add_patch(Rectangle(cell, stride, stride, facecolor=(*colour, 0.6), edgecolor=DARK, linewidth=0.8))
            half = scale[anchor].numpy() * side / 2
            centre = cell + stride / 2
            _frame(axis, (*(centre - half), *(centre + half)), colour, linewidth=1.2, linestyle=DASHED)
        axis.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
    return figure
