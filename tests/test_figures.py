"""Figures: drawn from little data, from unfinished files, and without a trace in matplotlib's settings."""

import csv
import io
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from src.config import PRESETS, SHAPE_CLASSES, Config
from src.data.mosaic import MosaicDataset
from src.data.shapes import draw_shapes
from src.figures import curves
from src.figures import images as image_figures
from src.model.network import ANCHORS
from src.serving.drawing import class_colours
from src.serving.predictor import Detections
from src.training.lr_finder import LRFinderResult
from src.training.metrics import confusion, per_class_table
from src.training.report import targets

RECORDS = draw_shapes(6, size=96)
COUNT = len(SHAPE_CLASSES)
ASKED = targets(PRESETS["voc"])
TRUTH = np.concatenate(
    [np.c_[np.full(len(r.labels), i), r.labels, r.difficult, r.boxes / 96] for i, r in enumerate(RECORDS)]
).astype(np.float32)
FOUND = np.c_[TRUTH[:, :2], np.linspace(0.3, 0.9, len(TRUTH)), TRUTH[:, 3:]].astype(np.float32)


def write_metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)


def rows_of(epochs, shift=0.0):
    """What training logs: the rate every few steps without an epoch, then held-out and training values."""
    for epoch in epochs:
        step = 10 * epoch + 9
        yield {"step": step - 5, "lr": 0.001}
        yield {"epoch": epoch, "step": step, "val/loss": 5 - epoch + shift, "val/accuracy/class": 0.5, "val/class": 2.0}
        yield {"epoch": epoch, "step": step, "train/loss": 6 - epoch + shift}


def figures(tmp_path):
    """Every figure there is, by name."""
    write_metrics(tmp_path / "metrics.csv", list(rows_of(range(3))))
    data = MosaicDataset(RECORDS, Config(dataset="shapes", classes=SHAPE_CLASSES, image_size=64))
    images = [record.image for record in RECORDS[:2]]
    found = [Detections(r.boxes, np.full(len(r.labels), 0.5, np.float32), r.labels, r.labels) for r in RECORDS[:2]]
    heatmap = SimpleNamespace(heatmap=np.eye(96, dtype=np.float32), detections=found[0], explained=np.array([0]), message="")
    table = per_class_table(FOUND, TRUTH, SHAPE_CLASSES)
    sizes = [{"size": size, "mAP50": 0.5, "milliseconds": 3.0} for size in (64, 96)]
    yield "records", image_figures.plot_annotations(RECORDS, SHAPE_CLASSES)
    yield "samples", image_figures.plot_samples([data[0], data[1]], SHAPE_CLASSES, ["a", "b"])
    yield "detections", image_figures.plot_detections(images, found, SHAPE_CLASSES, RECORDS[:2])
    yield "explanations", image_figures.plot_gradcam(images[:1], [heatmap], SHAPE_CLASSES)
    yield "scales", image_figures.plot_anchor_assignment(data[0], torch.tensor(ANCHORS), SHAPE_CLASSES)
    yield "summary", curves.plot_dataset_summary(RECORDS, SHAPE_CLASSES)
    yield "anchors", curves.plot_anchors(RECORDS, ANCHORS)
    yield "rates", curves.plot_lr_finder(LRFinderResult([1e-4, 1e-3, 1e-2, 1e-1], [5.0, 7.0, 4.0, 90.0], 1e-2))
    yield "curves", curves.plot_training_curves(tmp_path / "metrics.csv", ASKED)
    yield "precision and recall", curves.plot_precision_recall(FOUND, TRUTH, table)
    yield "precisions", curves.plot_per_class_ap(table)
    yield "confusion", curves.plot_confusion_matrix(confusion(FOUND, TRUTH, COUNT), SHAPE_CLASSES)
    yield "drawn", curves.plot_multiscale_sizes([64, 64, 96])
    yield "sizes", curves.plot_size_comparison({"one": sizes, "many": sizes})


def test_the_range_test_shows_the_whole_fall_and_not_the_explosion():
    figure = curves.plot_lr_finder(LRFinderResult([1e-4, 1e-3, 1e-2, 1e-1], [5.0, 7.0, 4.0, 90.0], 1e-2))
    low, high = figure.axes[0].get_ylim()
    assert low < 4 and 7 < high < 90


def test_every_figure_is_white_small_and_wide_enough_and_leaves_the_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    for name, figure in figures(tmp_path):
        image = Image.open(io.BytesIO(figure.encoded())).convert("RGB")
        assert min(image.getpixel((0, 0))) > 240, name  # readable on GitHub's dark page too
        assert 300 <= image.width <= 1100 and image.height <= 1100, name
        assert len(figure.encoded()) < 300_000, name
    assert dict(matplotlib.rcParams) == before


def test_a_class_has_its_colour_in_every_figure():
    wanted = np.array(class_colours(COUNT)) / 255
    bars = curves.plot_dataset_summary(RECORDS, SHAPE_CLASSES).axes[0].patches
    np.testing.assert_allclose([to_rgb(bar.get_facecolor()) for bar in bars], wanted)
    axis = image_figures.plot_annotations(RECORDS[:1], SHAPE_CLASSES).axes[0]
    np.testing.assert_allclose([to_rgb(p.get_edgecolor()) for p in axis.patches], wanted[RECORDS[0].labels])


def test_class_loss_and_class_accuracy_are_not_mixed_up(tmp_path):
    write_metrics(tmp_path / "m.csv", list(rows_of(range(2))))
    axes = {axis.get_title(loc="left"): axis for axis in curves.plot_training_curves(tmp_path / "m.csv", ASKED).axes}
    assert list(axes["Class accuracy"].lines[0].get_ydata()) == [0.5, 0.5]
    assert list(axes["Loss: class"].lines[1].get_ydata()) == [2.0, 2.0]


def test_a_resumed_run_has_no_seam(tmp_path):
    """Epoch 2 was run twice: interrupted after it was logged, and again after the resume."""
    write_metrics(tmp_path / "m.csv", [*rows_of(range(3)), *rows_of(range(2, 5), shift=0.25)])
    epochs, losses = curves.read_curve(tmp_path / "m.csv", "val/loss")
    assert list(epochs) == [0, 1, 2, 3, 4]
    assert list(losses) == [5, 4, 3.25, 2.25, 1.25]


def test_curves_of_a_run_that_is_being_written(tmp_path):
    path = tmp_path / "m.csv"
    write_metrics(path, list(rows_of(range(3))))
    lines = path.read_text().splitlines(keepends=True)
    for end in ("", lines[-1][: len(lines[-1]) // 2]):  # between two lines, and in the middle of one
        path.write_text("".join(lines[:-1]) + end)
        assert list(curves.read_curve(path, "train/loss")[0]) == [0, 1]
        curves.plot_training_curves(path, ASKED)
    path.write_text(lines[0])  # nothing but the header
    curves.plot_training_curves(path, ASKED)
    assert len(curves.read_curve(path, "val/mAP50")[0]) == 0


def test_nothing_found_and_classes_without_objects_are_drawn():
    nothing = np.zeros((0, 7), np.float32)
    table = per_class_table(nothing, TRUTH[:1], SHAPE_CLASSES)
    curves.plot_precision_recall(nothing, TRUTH[:1], table)
    curves.plot_per_class_ap(table)
    curves.plot_confusion_matrix(confusion(nothing, TRUTH[:1], COUNT), SHAPE_CLASSES)
