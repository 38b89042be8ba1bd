"""Figures of images: annotations, training samples, anchor assignment, detections and heatmaps."""

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill

import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from src.figures.style import DPI, FONT_POINTS, SOFT, WIDTH, NotebookFigure, with_style
from src.model.boxes import cxcywh_to_xyxy
from src.model.network import STRIDES
from src.serving.drawing import draw_boxes, draw_detections, draw_heatmap, label_colours
from src.serving.images import load_image, resize_long_side
from src.serving.predictor import Detections
from src.training.loss import Assigned, assign_targets

FONT_SIZE = FONT_POINTS / 72 * DPI  # pixels
LINE_HEIGHT = 20  # pixels of one line of a title
LEGEND_HEIGHT = 30
COLUMNS = 4  # at most
GAP = 8  # pixels between two images


def _tile_size(columns: int) -> int:
    """Return the long side, in pixels, of an image in a figure with that many columns."""
    return int(WIDTH * DPI) // max(columns, 3) - GAP


@with_style
def _grid(
    tiles: Sequence[np.ndarray], columns: int, titles: Sequence[str] = (), legend: Sequence = ()
) -> NotebookFigure:
    """Arrange images in rows, each at its own pixel size under its title; legend: matplotlib handles for the last line."""
    pitch, rows = _tile_size(columns) + GAP, range(0, len(tiles), columns)
    titles = [fill(title, pitch // 8) for title in titles] or [""] * len(tiles)
    title_heights = [
        LINE_HEIGHT * max(len(title.splitlines()) for title in titles[row : row + columns])
        for row in rows
    ]
    heights = [max(map(len, tiles[row : row + columns])) + GAP for row in rows]
    figure_size = columns * pitch, sum(title_heights) + sum(heights) + LEGEND_HEIGHT * bool(legend)
    figure = NotebookFigure(figure_size[1] / DPI, figure_size[0] / DPI, jpeg=True)
    for number, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        row, column = divmod(number, columns)
        top = sum(title_heights[: row + 1]) + sum(heights[:row])
        corner = column * pitch + GAP // 2, figure_size[1] - top - GAP // 2 - tile.shape[0]
        axis = figure.add_axes(np.divide((*corner, *tile.shape[1::-1]), figure_size * 2))
        axis.imshow(tile)
        axis.set_title(title, fontsize=FONT_POINTS, fontweight="normal", pad=4)
        axis.set_axis_off()
    if legend:
        figure.legend(handles=legend, loc="lower center", ncols=len(legend), handlelength=3)
    return figure


def _resize(image: np.ndarray, boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image to `size` on its long side, and its boxes [n, 4] (xyxy in pixels) with it."""
    resized = resize_long_side(image, size)
    return resized, boxes * np.tile(np.divide(resized.shape[1::-1], image.shape[1::-1]), 2)


def _draw_record(record, classes: Sequence[str], size: int, dashed: bool = False) -> np.ndarray:
    """Draw the boxes and classes of an `ImageRecord`, with a "?" for difficult objects."""
    image, boxes = _resize(load_image(record.image), record.boxes, size)
    names = [
        classes[label] + "?" * bool(flag)
        for label, flag in zip(record.labels, record.difficult, strict=True)
    ]
    return draw_boxes(image, boxes, label_colours(record.labels, classes), names, dashed, FONT_SIZE)


def _draw_detections(
    image, detections: Detections, classes: Sequence[str], size: int
) -> np.ndarray:
    """Draw the boxes, classes and confidences of detections."""
    image, boxes = _resize(load_image(image), detections.boxes, size)
    return draw_detections(image, replace(detections, boxes=boxes), classes, font_size=FONT_SIZE)


def plot_annotations(records: Sequence, classes: Sequence[str]) -> NotebookFigure:
    """Plot the images of records with their boxes and classes; "?" marks difficult objects."""
    columns = min(COLUMNS, len(records))
    return _grid(
        [_draw_record(record, classes, _tile_size(columns)) for record in records], columns
    )


def plot_samples(
    samples: Sequence[tuple], classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot training samples: uint8 [3, S, S], boxes cxcywh in 0..1 [n, 4], labels [n]."""
    columns = min(COLUMNS, len(samples))
    size, tiles = _tile_size(columns), []
    for image, boxes, labels, *_ in samples:
        tile, names = (
            resize_long_side(image.permute(1, 2, 0).numpy(), size),
            [classes[label] for label in labels],
        )
        boxes = cxcywh_to_xyxy(boxes).numpy() * size
        tiles.append(
            draw_boxes(tile, boxes, label_colours(labels, classes), names, font_size=FONT_SIZE)
        )
    return _grid(tiles, columns, titles)


def plot_detections(
    images: Sequence,
    detections: Sequence[Detections],
    classes: Sequence[str],
    ground_truth: Sequence = (),
    titles: Sequence[str] = (),
) -> NotebookFigure:
    """Plot images (anything that `load_image` reads) with their detections.

    ground_truth: the records of the images. Each is then shown to the left of the detections, under titles of its own.
    """
    columns = min(COLUMNS, len(images) * (2 if ground_truth else 1))
    size = _tile_size(columns)
    tiles = [
        _draw_detections(image, found, classes, size)
        for image, found in zip(images, detections, strict=True)
    ]
    if not ground_truth:
        return _grid(tiles, columns, titles)
    annotated = [_draw_record(record, classes, size, dashed=True) for record in ground_truth]
    pairs = [tile for pair in zip(annotated, tiles, strict=True) for tile in pair]
    return _grid(pairs, columns, ["ground truth", "predictions"] * len(images))


def plot_gradcam(
    images, explanations: Sequence, classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot detections and, to the right, the heatmaps of `Explanation`s with the explained boxes.

    images: one image for all explanations (it is shown once), or a list with one image per explanation. `load_image` reads
        them.
    titles: one per heatmap. By default the explained detections, or the explanation's message if it has one.
    """
    shared = not isinstance(images, list | tuple)
    count = len(explanations) + 1 if shared else 2 * len(explanations)
    columns = 3 if shared and count > COLUMNS else min(COLUMNS, count)
    size, tiles, tile_titles = _tile_size(columns), [], []
    for number, explanation in enumerate(explanations):
        image = images if shared else images[number]
        if number == 0 or not shared:
            tiles.append(_draw_detections(image, explanation.detections, classes, size))
            tile_titles.append("top candidate" if explanation.is_candidate else "detections")
        tiles.append(_draw_explanation(image, explanation, classes, size))
        tile_titles.append(titles[number] if titles else _title(explanation, classes))
    return _grid(tiles, columns, tile_titles)


def _draw_explanation(image, explanation, classes: Sequence[str], size: int) -> np.ndarray:
    """Draw the heatmap of an explanation and the boxes of the explained detections."""
    rows, detections = explanation.explained, explanation.detections
    image, boxes = _resize(load_image(image), detections.boxes[rows], size)
    image = draw_heatmap(image, resize_long_side(explanation.heatmap, size), 0.75)
    return draw_boxes(
        image, boxes, label_colours(detections.labels[rows], classes), font_size=FONT_SIZE
    )


def _title(explanation, classes: Sequence[str]) -> str:
    """Describe what a heatmap explains."""
    rows, detections = explanation.explained, explanation.detections
    if explanation.message or len(rows) != 1:
        return explanation.message or f"heatmap of {len(rows)} detections"
    return (
        f"heatmap of {classes[detections.labels[rows[0]]]} {100 * detections.scores[rows[0]]:.0f}%"
    )


def plot_anchor_assignment(
    sample: tuple, anchors: Tensor, classes: Sequence[str]
) -> NotebookFigure:
    """Plot the ground truth of a sample, and the cell and the anchor assigned to each object, on all three grids.

    anchors: [3, 3, 2], width and height as fractions of the image.
    """
    image, boxes, labels = sample[:3]
    grids, size, tiles = [image.shape[-1] // stride for stride in STRIDES], _tile_size(3), []
    colours, names = label_colours(labels, classes), [classes[label] for label in labels]
    targets = torch.cat((torch.zeros(len(labels), 1), labels[:, None].float(), boxes), dim=1)
    for assigned, scale, grid in zip(
        assign_targets(targets, grids, anchors, batch=1), anchors, grids, strict=True
    ):
        tile = resize_long_side(image.permute(1, 2, 0).numpy(), size)
        tile = _draw_assignment(tile, assigned, scale.numpy() * size, grid, colours)
        tiles.append(
            draw_boxes(tile, cxcywh_to_xyxy(boxes).numpy() * size, colours, names, True, FONT_SIZE)
        )
    legend = [
        Line2D([], [], color=SOFT, linestyle=(0, (2, 1.5)), label="ground truth"),
        Line2D([], [], color=SOFT, label="assigned anchor, centred on its cell"),
        Patch(color=SOFT, alpha=0.6, label="cell that contains the object's centre"),
    ]
    titles = [
        f"stride {stride}: {grid} × {grid} cells"
        for stride, grid in zip(STRIDES, grids, strict=True)
    ]
    return _grid(tiles, 3, titles, legend)


def _draw_assignment(
    image: np.ndarray, assigned: Assigned, anchors: np.ndarray, grid: int, colours: list
) -> np.ndarray:
    """Draw the grid, and the cell and the anchor of each object. anchors: [3, 2] in pixels."""
    edges = np.rint(np.linspace(0, len(image), grid + 1)).astype(int)
    lines, brightness, image = edges[1:-1], 0 if image.mean() > 127 else 255, image.copy()
    image[lines] = 0.5 * image[lines] + 0.5 * brightness
    image[:, lines] = 0.5 * image[:, lines] + 0.5 * brightness
    valid = assigned.valid.numpy()
    rows, columns, sizes = (
        assigned.row.numpy()[valid],
        assigned.column.numpy()[valid],
        anchors[assigned.anchor.numpy()[valid]],
    )
    colours = [colour for colour, flag in zip(colours, valid, strict=True) if flag]
    for row, column, colour in zip(rows, columns, colours, strict=True):
        cell = image[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
        cell[:] = 0.5 * cell + 0.5 * np.array(colour)
    centres = (np.stack((columns, rows), axis=1) + 0.5) * len(image) / grid
    return draw_boxes(
        image, np.hstack((centres - sizes / 2, centres + sizes / 2)), colours, font_size=FONT_SIZE
    )
