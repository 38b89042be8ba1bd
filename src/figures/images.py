"""Figures of images: annotations, training samples, anchor assignment, detections and heatmaps."""

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from src.data.mosaic import MosaicDataset
from src.data.records import ImageRecord, make_record
from src.figures.style import DPI, FONT_POINTS, WIDTH, NotebookFigure, colours, with_style
from src.model.boxes import cxcywh_to_xyxy
from src.serving.drawing import class_colour, draw_boxes, draw_detections, draw_explanation
from src.serving.images import load_image, resize_long_side
from src.serving.predictor import Detections
from src.training.loss import assign_targets
from src.training.metrics import Evaluation, confusion

FONT_SIZE = FONT_POINTS / 72 * DPI  # pixels
LINE_HEIGHT = 20  # pixels of one line of a title
COLUMNS = 4
GAP = 8  # pixels between two images
TILE = int(WIDTH * DPI) // COLUMNS - GAP  # pixels of the long side of an image


@with_style
def _grid(
    tiles: Sequence[np.ndarray], titles: Sequence[str], columns: int = COLUMNS
) -> NotebookFigure:
    """Arrange images in rows, each at its own pixel size under its title."""
    columns = min(columns, len(tiles))
    titles = [fill(title, TILE // 8) for title in titles] or [""] * len(tiles)
    header = LINE_HEIGHT * (1 + max(title.count("\n") for title in titles))
    rows = [tiles[first : first + columns] for first in range(0, len(tiles), columns)]
    heights = [header + GAP + max(len(tile) for tile in row) for row in rows]
    size = np.array([columns * (TILE + GAP), sum(heights)])
    figure = NotebookFigure(size[1] / DPI, size[0] / DPI, jpeg=True, layout="none")
    for number, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        row, column = divmod(number, columns)
        left, top = column * (TILE + GAP) + GAP // 2, sum(heights[row:]) - header
        figure.figimage(tile, left, top - len(tile))
        figure.text(left / size[0], (top + GAP // 2) / size[1], title, fontsize=FONT_POINTS)
    return figure


def _resize(image, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Load an image, resize it to TILE pixels on its long side, and its boxes [n, 4] with it."""
    image = load_image(image)
    resized = resize_long_side(image, TILE)
    return resized, boxes * np.tile(np.divide(resized.shape[1::-1], image.shape[1::-1]), 2)


def _draw_record(record: ImageRecord, classes: Sequence[str]) -> np.ndarray:
    """Draw the boxes and classes of an image, with a "?" for difficult objects."""
    image, boxes = _resize(record.image, record.boxes)
    labels = zip(record.labels, record.difficult, strict=True)
    names = [classes[label] + "?" * bool(difficult) for label, difficult in labels]
    return draw_boxes(image, boxes, [*map(class_colour, record.labels)], names, FONT_SIZE)


def _draw_detections(image, found: Detections, classes: Sequence[str]) -> np.ndarray:
    """Draw the boxes, classes and confidences of detections."""
    image, boxes = _resize(image, found.boxes)
    return draw_detections(image, replace(found, boxes=boxes), classes, font_size=FONT_SIZE)


def plot_annotations(
    records: Sequence[ImageRecord], classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot the images of records with their boxes and classes; "?" marks difficult objects."""
    return _grid([_draw_record(record, classes) for record in records], titles)


def plot_samples(
    samples: Sequence[tuple], classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot training samples: uint8 [3, S, S], boxes cxcywh in 0..1 [n, 4], labels [n]."""
    return plot_annotations([_to_record(sample) for sample in samples], classes, titles)


def _to_record(sample: tuple) -> ImageRecord:
    """Convert a training sample to an image and its boxes in pixels."""
    image, boxes, labels = sample[:3]
    corners = cxcywh_to_xyxy(boxes) * image.shape[-1]
    return make_record(image.permute(1, 2, 0).numpy(), corners, labels, [False] * len(labels))


class _SourceRecorder(MosaicDataset):
    """A data set that remembers which of its images it has read."""

    def image(self, index: int) -> tuple:
        self.__dict__.setdefault("sources", []).append(index)
        return super().image(index)


def plot_mosaic(dataset: MosaicDataset, sample_id: int, classes: Sequence[str]) -> NotebookFigure:
    """Plot the four images of one mosaic in its arrangement and, to the right, the mosaic."""
    recorder = _SourceRecorder(dataset.records, dataset.config, dataset.cache)
    mosaic = _to_record(recorder[sample_id])
    sources = [dataset.records[index] for index in recorder.sources]
    tiles = [_draw_record(record, classes) for record in (*sources[:2], mosaic, *sources[2:])]
    titles = ["upper left", "upper right", "mosaic (perhaps mirrored)", "lower left", "lower right"]
    return _grid(tiles, titles, columns=3)


def plot_resolutions(sample: tuple, sizes: Sequence[int]) -> NotebookFigure:
    """Plot the centre of a training sample at several image sizes, pixel by pixel."""
    tiles = []
    for size in sizes:
        start, end = size // 3, 2 * size // 3
        centre = resize(sample[0], [size, size])[:, start:end, start:end]
        enlarged = resize(centre, [TILE, TILE], InterpolationMode.NEAREST)
        tiles.append(enlarged.permute(1, 2, 0).numpy())
    return _grid(tiles, [f"{size} × {size} pixels" for size in sizes])


def plot_detections(
    images: Sequence,
    detections: Sequence[Detections],
    classes: Sequence[str],
    ground_truth: Sequence[ImageRecord] = (),
    titles: Sequence[str] = (),
) -> NotebookFigure:
    """Plot images (anything that `load_image` reads) with their detections.

    titles: one per image.
    ground_truth: the records of the images. Each is then shown to the left of its detections.
    """
    titles = titles or ["predictions"] * len(images)
    tiles, names = [], []
    for number, (image, found) in enumerate(zip(images, detections, strict=True)):
        if ground_truth:
            tiles.append(_draw_record(ground_truth[number], classes))
            names.append("ground truth")
        tiles.append(_draw_detections(image, found, classes))
        names.append(titles[number])
    return _grid(tiles, names)


def rank_by_errors(evaluation: Evaluation, number_of_images: int) -> list[tuple[int, np.ndarray]]:
    """Rank validation images by errors minus correct detections, best first.

    Returns (number of the image, its confusion matrix [C + 1, C + 1]) for each image.
    """
    ranked = []
    for number in range(number_of_images):
        predictions = evaluation.predictions[evaluation.predictions[:, 0] == number]
        objects = evaluation.ground_truth[evaluation.ground_truth[:, 0] == number]
        ranked.append((number, confusion(predictions, objects, len(evaluation.per_class))))
    return sorted(ranked, key=lambda pair: pair[1].sum() - 2 * pair[1].trace())


def describe_errors(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Say what a confusion matrix counts: "2 correct, star taken for background"."""
    names = [*classes, "background"]
    errors = [
        f"{names[true]} taken for {names[found]}"
        for true, found in np.argwhere(counts)
        if true != found
    ]
    return ", ".join([f"{counts.trace()} correct", *errors])


def plot_gradcam(
    images, explanations: Sequence, classes: Sequence[str], titles: Sequence[str] = ()
) -> NotebookFigure:
    """Plot detections and, to the right, the heatmaps of `Explanation`s with the explained boxes.

    images: one for all explanations, or a list with one per explanation; `load_image` reads them.
    titles: one per heatmap. By default the explained classes, or the explanation's message.
    """
    images = images if isinstance(images, list | tuple) else [images] * len(explanations)
    tiles, names = [], []
    for number, (image, explanation) in enumerate(zip(images, explanations, strict=True)):
        detections = explanation.detections
        if number == 0 or image is not images[number - 1]:
            tiles.append(_draw_detections(image, detections, classes))
            names.append("predictions")
        heatmap = draw_explanation(load_image(image), explanation, classes)
        tiles.append(resize_long_side(heatmap, TILE))
        explained = {classes[label] for label in detections.labels[explanation.explained]}
        default = explanation.message or f"heatmap of {', '.join(sorted(explained))}"
        names.append(titles[number] if titles else default)
    return _grid(tiles, names)


@with_style
def plot_anchor_assignment(
    sample: tuple, anchors: Tensor, classes: Sequence[str]
) -> NotebookFigure:
    """Plot the ground truth of a sample, and each object's cell and anchor per scale.

    anchors: [scales, A, 2], width and height as fractions of the image.
    """
    image, boxes, labels = sample[:3]
    grids = [image.shape[-1] * 2**scale // 32 for scale in range(len(anchors))]
    targets = torch.cat((torch.zeros(len(labels), 1), labels[:, None], boxes), dim=1)
    scales = assign_targets(targets, grids, anchors, batch=1)
    figure = NotebookFigure(3.6, jpeg=True)
    axes = figure.subplots(1, len(anchors), squeeze=False)[0]
    for axis, grid, assigned, sizes in zip(axes, grids, scales, anchors, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, grid, grid, 0))  # a unit is a cell
        axis.set(
            title=f"stride {image.shape[-1] // grid}: {grid} × {grid} cells",
            axisbelow=False,
            xticks=range(grid + 1),
            xticklabels=[],
            yticks=range(grid + 1),
            yticklabels=[],
        )
        cells = torch.stack((assigned.column, assigned.row), dim=1) + 0.5
        shapes = sizes[assigned.anchor] * grid
        for number, colour in enumerate(colours(len(classes))[labels.numpy()]):
            centre, size = (boxes[number] * grid).split(2)
            _add_box(axis, centre, size, edgecolor=colour, linestyle="--")
            _add_box(axis, cells[number], torch.ones(2), facecolor=(*colour, 0.5))
            _add_box(axis, cells[number], shapes[number], edgecolor=colour)
    figure.legend(
        axes[0].patches[:3],
        ["ground truth", "cell of its centre", "assigned anchor"],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _add_box(axis: Axes, centre: Tensor, size: Tensor, facecolor="none", **style) -> None:
    """Draw a rectangle by its centre [2] and size [2]."""
    box = torch.cat((centre - size / 2, size)).tolist()
    axis.add_patch(Rectangle(box[:2], *box[2:], facecolor=facecolor, linewidth=2, **style))
