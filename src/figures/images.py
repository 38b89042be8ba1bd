"""Figures of images: annotations, training samples, anchor assignment, detections and heatmaps."""

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill

import cv2
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.functional import resize

from src.data.mosaic import MosaicDataset
from src.figures.style import (
    DPI,
    FONT_POINTS,
    WIDTH,
    NotebookFigure,
    colours,
    counted,
    with_style,
)
from src.model.boxes import cxcywh_to_xyxy
from src.model.network import STRIDES
from src.serving.drawing import draw_boxes, draw_detections, draw_heatmap, label_colours
from src.serving.images import load_image, resize_long_side
from src.serving.predictor import Detections
from src.training.loss import assign_targets

FONT_SIZE = FONT_POINTS / 72 * DPI  # pixels
LINE_HEIGHT = 20  # pixels of one line of a title
COLUMNS = 4  # at most
GAP = 8  # pixels between two images


def _tile_size(columns: int) -> int:
    """Return the long side, in pixels, of an image in a figure with that many columns."""
    return int(WIDTH * DPI) // max(columns, 3) - GAP


@with_style
def _grid(tiles: Sequence[np.ndarray], columns: int, titles: Sequence[str] = ()) -> NotebookFigure:
    """Arrange images in rows, each at its own pixel size under its title."""
    pitch = _tile_size(columns) + GAP
    titles = [fill(title, pitch // 8) for title in titles] or [""] * len(tiles)
    corners = []  # left, top of each image, in pixels from the figure's upper left corner
    bottom = 0
    for first in range(0, len(tiles), columns):
        row = slice(first, first + columns)
        top = bottom + LINE_HEIGHT * max(len(title.splitlines()) for title in titles[row])
        corners += [(number * pitch + GAP // 2, top) for number in range(len(tiles[row]))]
        bottom = top + max(tile.shape[0] for tile in tiles[row]) + GAP
    width, height = columns * pitch, bottom
    figure = NotebookFigure(height / DPI, width / DPI, jpeg=True, layout="none")
    for tile, title, (left, top) in zip(tiles, titles, corners, strict=True):
        box = left, height - top - tile.shape[0], tile.shape[1], tile.shape[0]
        axis = figure.add_axes(np.divide(box, (width, height, width, height)))
        axis.imshow(tile)
        axis.set_title(title, fontsize=FONT_POINTS, fontweight="normal", pad=4)
        axis.set_axis_off()
    return figure


def _resize(image: np.ndarray, boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image to `size` on its long side, and its boxes [n, 4] (xyxy in pixels) with it."""
    resized = resize_long_side(image, size)
    return resized, boxes * np.tile(np.divide(resized.shape[1::-1], image.shape[1::-1]), 2)


def _draw_record(record, classes: Sequence[str], size: int, dashed: bool = False) -> np.ndarray:
    """Draw the boxes and classes of an `ImageRecord`, with a "?" for difficult objects."""
    image, boxes = _resize(load_image(record.image), record.boxes, size)
    labels = zip(record.labels, record.difficult, strict=True)
    names = [classes[label] + "?" * bool(difficult) for label, difficult in labels]
    return draw_boxes(image, boxes, label_colours(record.labels, classes), names, dashed, FONT_SIZE)


def _draw_sample(sample: tuple, classes: Sequence[str], size: int) -> np.ndarray:
    """Draw a training sample: uint8 [3, S, S], boxes cxcywh in 0..1 [n, 4], labels [n]."""
    image, boxes, labels = sample[:3]
    tile = resize_long_side(image.permute(1, 2, 0).numpy(), size)
    names = [classes[label] for label in labels]
    corners = cxcywh_to_xyxy(boxes).numpy() * size
    return draw_boxes(tile, corners, label_colours(labels, classes), names, font_size=FONT_SIZE)


def _draw_detections(image, found: Detections, classes: Sequence[str], size: int) -> np.ndarray:
    """Draw the boxes, classes and confidences of detections."""
    image, boxes = _resize(load_image(image), found.boxes, size)
    return draw_detections(image, replace(found, boxes=boxes), classes, font_size=FONT_SIZE)


def plot_annotations(records: Sequence, classes: Sequence[str]) -> NotebookFigure:
    """Plot the images of records with their boxes and classes; "?" marks difficult objects."""
    columns = min(COLUMNS, len(records))
    size = _tile_size(columns)
    return _grid([_draw_record(record, classes, size) for record in records], columns)


def plot_samples(
    samples: Sequence[tuple], classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot training samples: uint8 [3, S, S], boxes cxcywh in 0..1 [n, 4], labels [n]."""
    columns = min(COLUMNS, len(samples))
    size = _tile_size(columns)
    return _grid([_draw_sample(sample, classes, size) for sample in samples], columns, titles)


class _SourceRecorder(MosaicDataset):
    """A data set that remembers which of its images it has read."""

    def image(self, index: int) -> tuple:
        self.__dict__.setdefault("sources", []).append(index)
        return super().image(index)


def plot_mosaic(dataset: MosaicDataset, sample_id: int, classes: Sequence[str]) -> NotebookFigure:
    """Plot the four images of one mosaic in its arrangement and, to the right, the mosaic."""
    recorder = _SourceRecorder(dataset.records, dataset.config, dataset.cache)
    mosaic = _draw_sample(recorder[sample_id], classes, _tile_size(3))
    sources = [dataset.records[index] for index in recorder.sources]
    tiles = [_draw_record(record, classes, _tile_size(3)) for record in sources]
    titles = ["upper left", "upper right", "the mosaic (half of them are mirrored)"]
    titles += ["lower left", "lower right"]
    return _grid([*tiles[:2], mosaic, *tiles[2:]], 3, titles)


def plot_resolutions(sample: tuple, sizes: Sequence[int]) -> NotebookFigure:
    """Plot the largest object of a training sample at several image sizes, pixel by pixel."""
    image, boxes = sample[:2]
    cx, cy, w, h = boxes[boxes[:, 2:].prod(dim=1).argmax()].tolist()
    side = _tile_size(len(sizes))
    tiles = []
    for size in sizes:
        pixels = resize(image, [size, size]).permute(1, 2, 0).numpy()
        half = round(max(w, h) * size / 2)
        left, top = max(0, round(cx * size) - half), max(0, round(cy * size) - half)
        crop = pixels[top : top + 2 * half, left : left + 2 * half]
        tiles.append(cv2.resize(crop, (side, side), interpolation=cv2.INTER_NEAREST))
    return _grid(tiles, len(sizes), [f"of an image of {size} × {size} pixels" for size in sizes])


def plot_detections(
    images: Sequence,
    detections: Sequence[Detections],
    classes: Sequence[str],
    ground_truth: Sequence = (),
    titles: Sequence[str] = (),
    before: Sequence[Detections] = (),
) -> NotebookFigure:
    """Plot images (anything that `load_image` reads) with their detections.

    titles: one per image.
    ground_truth: the records of the images. Each is then shown to the left of its detections.
    before: detections by another network, to be shown there instead.
    """
    columns = min(COLUMNS, len(images) * (2 if ground_truth or before else 1))
    size = _tile_size(columns)
    tiles = [
        _draw_detections(image, found, classes, size)
        for image, found in zip(images, detections, strict=True)
    ]
    if not (ground_truth or before):
        return _grid(tiles, columns, titles)
    names = ("before training", "after training") if before else ("ground truth", "predictions")
    left = [_draw_record(record, classes, size, dashed=True) for record in ground_truth]
    left += [_draw_detections(images[n], found, classes, size) for n, found in enumerate(before)]
    titles = titles or [names[1]] * len(images)
    pairs = [tile for pair in zip(left, tiles, strict=True) for tile in pair]
    return _grid(pairs, columns, [name for title in titles for name in (names[0], title)])


def describe_errors(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Say what a confusion matrix counts: "2 correct, star missed, heart taken for ring"."""
    background = len(classes)
    texts = [f"{counts.trace()} correct"]
    for true, found in np.argwhere(counts):
        if found == background:
            texts.append(f"{classes[true]} missed")
        elif true == background:
            texts.append(f"false {classes[found]}")
        elif true != found:
            texts.append(f"{classes[true]} taken for {classes[found]}")
    return ", ".join(texts)


def plot_gradcam(
    images, explanations: Sequence, classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot detections and, to the right, the heatmaps of `Explanation`s with the explained boxes.

    images: one for all explanations (shown once), or a list with one per explanation.
        `load_image` reads them.
    titles: one per heatmap. By default the explained detections, or the explanation's message.
    """
    shared = not isinstance(images, list | tuple)
    count = len(explanations) + 1 if shared else 2 * len(explanations)
    columns = 3 if shared and count > COLUMNS else min(COLUMNS, count)
    size = _tile_size(columns)
    tiles, names = [], []
    for number, explanation in enumerate(explanations):
        image = images if shared else images[number]
        if number == 0 or not shared:
            tiles.append(_draw_detections(image, explanation.detections, classes, size))
            names.append("top candidate" if explanation.is_candidate else "detections")
        tiles.append(_draw_explanation(image, explanation, classes, size))
        names.append(titles[number] if titles else _title(explanation, classes))
    return _grid(tiles, columns, names)


def _draw_explanation(image, explanation, classes: Sequence[str], size: int) -> np.ndarray:
    """Draw the heatmap of an explanation and the boxes of the explained detections."""
    rows, detections = explanation.explained, explanation.detections
    image, boxes = _resize(load_image(image), detections.boxes[rows], size)
    image = draw_heatmap(image, resize_long_side(explanation.heatmap, size), 0.75)
    box_colours = label_colours(detections.labels[rows], classes)
    return draw_boxes(image, boxes, box_colours, font_size=FONT_SIZE)


def _title(explanation, classes: Sequence[str]) -> str:
    """Describe what a heatmap explains."""
    rows, detections = explanation.explained, explanation.detections
    if explanation.message or len(rows) != 1:
        return explanation.message or f"heatmap of {counted(len(rows), 'detection')}"
    score = 100 * detections.scores[rows[0]]
    return f"heatmap of {classes[detections.labels[rows[0]]]} {score:.0f}%"


@with_style
def plot_anchor_assignment(
    sample: tuple, anchors: Tensor, classes: Sequence[str]
) -> NotebookFigure:
    """Plot the ground truth of a sample, and each object's cell and anchor on all three grids.

    anchors: [3, 3, 2], width and height as fractions of the image.
    """
    image, boxes, labels = sample[:3]
    grids = [image.shape[-1] // stride for stride in STRIDES]
    targets = torch.cat((torch.zeros(len(labels), 1), labels[:, None].float(), boxes), dim=1)
    scales = assign_targets(targets, grids, anchors, batch=1)
    figure = NotebookFigure(3.6, jpeg=True)
    axes = figure.subplots(1, 3)
    for axis, stride, grid, assigned, sizes in zip(
        axes, STRIDES, grids, scales, anchors * torch.tensor(grids)[:, None, None], strict=True
    ):
        axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, grid, grid, 0))  # a unit is a cell
        axis.set(title=f"stride {stride}: {grid} × {grid} cells", xticks=range(grid + 1))
        axis.set_yticks(range(grid + 1))
        axis.tick_params(length=0, labelbottom=False, labelleft=False)
        axis.set_axisbelow(False)
        for number, colour in enumerate(colours(len(classes))[labels]):
            centre, size = boxes[number, :2] * grid, boxes[number, 2:] * grid
            _add_box(axis, centre, size, edgecolor=colour, linestyle=(0, (2, 1.5)))
            cell = torch.stack((assigned.column[number], assigned.row[number])) + 0.5
            _add_box(axis, cell, torch.ones(2), facecolor=(*colour, 0.5))
            _add_box(axis, cell, sizes[assigned.anchor[number]], edgecolor=colour)
    handles = axes[0].patches[:3]
    names = "ground truth", "cell that contains its centre", "assigned anchor, centred on the cell"
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


def _add_box(axis: Axes, centre: Tensor, size: Tensor, facecolor="none", **style) -> None:
    """Draw a rectangle by its centre [2] and size [2]."""
    corner = (centre - size / 2).tolist()
    axis.add_patch(Rectangle(corner, *size.tolist(), facecolor=facecolor, linewidth=2, **style))
