"""Figures of small data and of empty results."""

import io
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from src.config import PRESETS, SHAPE_CLASSES, Config
from src.data.mosaic import MosaicDataset
from src.data.shapes import draw_shapes
from src.figures import curves, images
from src.figures.source import show
from src.model.network import ANCHORS
from src.serving.drawing import class_colour
from src.serving.predictor import Detections
from src.training.lr_finder import LRFinderResult
from src.training.metrics import Evaluation, confusion, per_class_table

RECORDS = draw_shapes(6, size=96)
COUNT = len(SHAPE_CLASSES)
CONFIG = Config(dataset="shapes", classes=SHAPE_CLASSES, image_size=96, mosaic_prob=1.0)
GROUND_TRUTH = np.float32(
    np.concatenate(
        [
            np.c_[np.full(len(r.labels), i), r.labels, r.difficult, r.boxes / 96]
            for i, r in enumerate(RECORDS)
        ]
    )
)
PREDICTIONS = GROUND_TRUTH.copy()
PREDICTIONS[:, 2] = np.linspace(0.3, 0.9, len(PREDICTIONS))


ACCURACIES = ("val/accuracy/class", "val/accuracy/no_object@0.05", "val/accuracy/object@0.05")
COLUMNS = ("train/loss", "val/loss", "train/new", "val/new", *ACCURACIES, "val/mAP50")
METRICS = f"""epoch,lr,step,{",".join(COLUMNS)}
0,0.001,4{8 * ","}
0,,9,6,5,3,2,0.5,0.5,0.5,0.25
1,0.001,14{8 * ","}
1,,19,6,5,3,2,0.5,0.5,0.5,0.25
"""  # two epochs, as training logs them


def detections_of(record) -> Detections:
    scores = np.full(len(record.labels), 0.5, np.float32)
    return Detections(record.boxes, scores, record.labels, record.labels)


def explanation_of(record, message="") -> SimpleNamespace:
    return SimpleNamespace(
        heatmap=np.eye(96, dtype=np.float32),
        detections=detections_of(record),
        explained=np.array([0]),
        message=message,
        is_candidate=False,
    )


PHOTOGRAPHS = [record.image for record in RECORDS[:2]]
DETECTIONS = [detections_of(record) for record in RECORDS[:2]]
EXPLANATIONS = [explanation_of(record) for record in RECORDS[:2]]
PER_CLASS = per_class_table(PREDICTIONS, GROUND_TRUTH, SHAPE_CLASSES)
DATA = MosaicDataset(RECORDS, CONFIG)
RANGE_TEST = LRFinderResult([1e-4, 1e-3, 1e-2], [5.0, 7.0, 4.0], 1e-2)
FIGURES = [  # function, arguments
    (images.plot_annotations, (RECORDS, SHAPE_CLASSES)),
    (images.plot_samples, ([DATA[0], DATA[1]], SHAPE_CLASSES)),
    (images.plot_mosaic, (DATA, 4, SHAPE_CLASSES)),
    (images.plot_resolutions, (DATA[0], [32, 64])),
    (images.plot_detections, (PHOTOGRAPHS, DETECTIONS, SHAPE_CLASSES)),
    (images.plot_gradcam, (PHOTOGRAPHS, EXPLANATIONS, SHAPE_CLASSES)),
    (images.plot_anchor_assignment, (DATA[0], torch.tensor(ANCHORS), SHAPE_CLASSES)),
    (curves.plot_dataset_summary, (RECORDS, SHAPE_CLASSES)),
    (curves.plot_anchors, (RECORDS, ANCHORS)),
    (curves.plot_lr_finder, (RANGE_TEST,)),
    (curves.plot_training_curves, ("metrics.csv", PRESETS["voc"])),
    (curves.plot_precision_recall, (PREDICTIONS, GROUND_TRUTH, PER_CLASS)),
    (curves.plot_per_class_ap, (PER_CLASS,)),
    (curves.plot_confusion_matrix, (confusion(PREDICTIONS, GROUND_TRUTH, COUNT), SHAPE_CLASSES)),
    (curves.plot_multiscale_sizes, ([64, 64, 96],)),
    (curves.plot_size_comparison, ([64, 96], {"one": [0.5, 0.5]}, [3.0, 5.0])),
]


@pytest.mark.parametrize("function, arguments", FIGURES, ids=lambda f: getattr(f, "__name__", ""))
def test_every_figure_is_white_and_small_and_leaves_the_settings_unchanged(
    function, arguments, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("metrics.csv").write_text(METRICS)
    before = dict(matplotlib.rcParams)
    file = function(*arguments).encoded()
    image = Image.open(io.BytesIO(file)).convert("RGB")
    assert min(image.getpixel((0, 0))) > 240  # readable on GitHub's dark theme too
    assert 300 <= image.width <= 1100 and image.height <= 1100 and len(file) < 300_000
    assert dict(matplotlib.rcParams) == before


def tile(figure, number=0):
    return figure.images[number].get_array()


def titles_of(figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def count_colour(image, colour):
    return (image == colour).all(axis=-1).sum()


def test_a_class_has_the_same_colour_in_every_figure():
    palette = [class_colour(label) for label in range(COUNT)]
    bars = curves.plot_dataset_summary(RECORDS, SHAPE_CLASSES).axes[0].patches
    faces = [to_rgb(bar.get_facecolor()) for bar in bars]
    np.testing.assert_allclose(faces, np.array(palette) / 255)
    annotated = images.plot_annotations(RECORDS[:1], SHAPE_CLASSES)
    detected = images.plot_detections(PHOTOGRAPHS[:1], DETECTIONS[:1], SHAPE_CLASSES)
    for label in RECORDS[0].labels:
        assert count_colour(tile(annotated), palette[label]) > 20
        assert count_colour(tile(detected), palette[label]) > 20


def test_images_are_shown_at_their_own_pixel_size_with_readable_text():
    """Text is drawn in pixels, so its size is right only if the figure doesn't resize the image."""
    figure = images.plot_annotations(RECORDS, SHAPE_CLASSES)
    figure.savefig(file := io.BytesIO())
    pixels = np.asarray(Image.open(file).convert("RGB"))
    for image in figure.images:
        left, right, bottom, top = (round(place + 0.5) for place in image.get_extent())
        shown = pixels[len(pixels) - top : len(pixels) - bottom, left:right]
        np.testing.assert_array_equal(shown, image.get_array())
    assert images.FONT_SIZE / figure.dpi * 72 >= 8.5 and figure.get_size_inches()[0] <= 9


def test_ground_truth_is_shown_beside_the_predictions():
    figure = images.plot_detections(PHOTOGRAPHS, DETECTIONS, SHAPE_CLASSES, RECORDS[:2])
    assert titles_of(figure) == ["ground truth", "predictions"] * 2
    colour = class_colour(RECORDS[0].labels[0])
    assert all(count_colour(tile(figure, number), colour) for number in (0, 1))


def test_an_image_explained_several_times_is_shown_once(tmp_path):
    both = [explanation_of(RECORDS[0]), explanation_of(RECORDS[0], "No.")]
    Image.fromarray(PHOTOGRAPHS[0]).save(tmp_path / "image.png")
    figure = images.plot_gradcam(tmp_path / "image.png", both, SHAPE_CLASSES)
    heatmap = f"heatmap of {SHAPE_CLASSES[RECORDS[0].labels[0]]}"
    assert titles_of(figure) == ["predictions", heatmap, "No."]
    pairs = images.plot_gradcam(PHOTOGRAPHS, EXPLANATIONS, SHAPE_CLASSES, ["a", "b"])
    assert titles_of(pairs) == ["predictions", "a", "predictions", "b"]
    np.testing.assert_array_equal(tile(figure, 1), tile(pairs, 1))


def test_images_are_ranked_by_their_errors_and_these_described():
    predictions = np.delete(PREDICTIONS, 0, axis=0)  # misses an object of the first image
    predictions = np.r_[predictions, predictions[-1:], predictions[-1:]]  # false ones in the last
    ranked = images.rank_by_errors(Evaluation({}, {}, PER_CLASS, predictions, GROUND_TRUTH), 6)
    costs = [counts.sum() - 2 * counts.trace() for _, counts in ranked]
    assert sorted(number for number, _ in ranked) == list(range(6)) and costs == sorted(costs)
    text = images.describe_errors(np.array([[2, 1, 0], [0, 0, 1], [0, 1, 0]]), ["star", "ring"])
    expected = (
        "2 correct, star taken for ring, ring taken for background, background taken for ring"
    )
    assert text == expected


def test_a_mosaic_is_shown_beside_its_four_sources():
    with mock.patch.object(DATA, "image", wraps=DATA.image) as image:
        _ = DATA[4]
    figure = images.plot_mosaic(DATA, 4, SHAPE_CLASSES)
    sources = [RECORDS[call.args[0]] for call in image.call_args_list]
    for number, record in zip((0, 1, 3, 4), sources, strict=True):
        alone = images.plot_annotations([record], SHAPE_CLASSES)
        np.testing.assert_array_equal(tile(figure, number), tile(alone))


def test_source_is_shown_as_python():
    text = show(MosaicDataset.is_mosaic, draw_shapes).data
    assert text.startswith("```python\ndef is_mosaic(self") and "\n\n\ndef draw_shapes(" in text


def test_the_anchor_assignment_figure_has_three_boxes_per_object_and_scale():
    figure = images.plot_anchor_assignment(DATA[0], torch.tensor(ANCHORS), SHAPE_CLASSES)
    assert len(figure.axes) == 3 and len(figure.legends[0].get_texts()) == 3
    for axis, grid in zip(figure.axes, (3, 6, 12), strict=True):
        centres = np.array([patch.get_center() for patch in axis.patches]).reshape(-1, 3, 2)
        np.testing.assert_allclose(centres[:, 0], DATA[0][1][:, :2] * grid, atol=1e-4)
        np.testing.assert_allclose(centres[:, 1], np.floor(centres[:, 0]) + 0.5)
        np.testing.assert_allclose(centres[:, 2], centres[:, 1], atol=1e-6)


def test_curves_have_every_loss_term_the_accuracies_the_rate_and_the_end_of_mosaics(tmp_path):
    (tmp_path / "m.csv").write_text(METRICS)
    figure = curves.plot_training_curves(tmp_path / "m.csv", PRESETS["voc"].replace(epochs=20))
    lines = {axis.get_title(loc="left"): axis.lines for axis in figure.axes}
    expected = {
        ("class accuracy", 1): ([1, 2], [0.5, 0.5]),
        ("new loss", 1): ([1, 2], [2, 2]),
        ("learning rate", 0): ([0.5, 1.5], [0.001, 0.001]),
        ("loss", -1): ([18, 18], [0, 1]),  # the end of mosaics
    }
    for (title, number), points in expected.items():
        np.testing.assert_allclose(lines[title][number].get_data(), points)


def test_figures_without_predictions_and_of_classes_without_objects():
    empty = np.zeros((0, 7), np.float32)
    per_class = per_class_table(empty, GROUND_TRUTH[:1], SHAPE_CLASSES)
    curves.plot_precision_recall(empty, GROUND_TRUTH[:1], per_class)
    curves.plot_per_class_ap(per_class)
    curves.plot_confusion_matrix(confusion(empty, GROUND_TRUTH[:1], COUNT), SHAPE_CLASSES)
