"""Figures of small data, of unfinished runs and of empty results."""

import csv
import io
from types import SimpleNamespace
from unittest import mock

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
from src.figures.source import show
from src.figures.style import TARGET, TRAIN, VAL, counted
from src.model.network import ANCHORS
from src.serving import drawing
from src.serving.drawing import class_colours
from src.serving.predictor import Detections
from src.training.lr_finder import LRFinderResult
from src.training.metrics import confusion, per_class_table

RECORDS = draw_shapes(6, size=96)
COUNT = len(SHAPE_CLASSES)
CONFIG = PRESETS["voc"]
RANGE_TEST = LRFinderResult([1e-4, 1e-3, 1e-2, 1e-1], [5.0, 7.0, 4.0, 90.0], 1e-2)
GROUND_TRUTH = np.concatenate(
    [
        np.c_[np.full(len(r.labels), i), r.labels, r.difficult, r.boxes / 96]
        for i, r in enumerate(RECORDS)
    ]
).astype(np.float32)
PREDICTIONS = np.c_[
    GROUND_TRUTH[:, :2], np.linspace(0.3, 0.9, len(GROUND_TRUTH)), GROUND_TRUTH[:, 3:]
].astype(np.float32)


def write_metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted(set().union(*rows)))
        writer.writeheader()
        writer.writerows(rows)


def rows_of(epochs, shift=0.0):
    """Rows as training logs them: learning rates without an epoch, validation, training."""
    for epoch in epochs:
        step = 10 * epoch + 9
        yield {"step": step - 5, "lr": 0.001}
        yield {
            "epoch": epoch,
            "step": step,
            "val/loss": 5 - epoch + shift,
            "val/accuracy/class": 0.5,
            "val/class": 2.0,
        }
        terms = {"train/loss": 6 - epoch + shift, "train/class": 3.0, "train/new": 0.5}
        yield {"epoch": epoch, "step": step, **terms}


def detections_of(record) -> Detections:
    """The ground truth of a record as detections of confidence 0.5."""
    return Detections(
        record.boxes, np.full(len(record.labels), 0.5, np.float32), record.labels, record.labels
    )


def explanation_of(record, message="") -> SimpleNamespace:
    """An explanation of the first object of a record."""
    return SimpleNamespace(
        heatmap=np.eye(96, dtype=np.float32),
        detections=detections_of(record),
        explained=np.array([0]),
        message=message,
        is_candidate=False,
    )


def figures(tmp_path):
    """Yield all figures with their names."""
    write_metrics(tmp_path / "metrics.csv", list(rows_of(range(3))))
    data = MosaicDataset(RECORDS, Config(dataset="shapes", classes=SHAPE_CLASSES, image_size=64))
    images = [record.image for record in RECORDS[:2]]
    detections = [detections_of(record) for record in RECORDS[:2]]
    explanations = [explanation_of(record) for record in RECORDS[:2]]
    per_class = per_class_table(PREDICTIONS, GROUND_TRUTH, SHAPE_CLASSES)
    mosaic = next(number for number in range(20) if data.is_mosaic(number))
    errors = confusion(PREDICTIONS, GROUND_TRUTH, COUNT)
    calls = {
        image_figures.plot_annotations: (RECORDS,),
        image_figures.plot_samples: ([data[0], data[1]],),
        image_figures.plot_mosaic: (data, mosaic),
        image_figures.plot_detections: (images, detections),
        image_figures.plot_gradcam: (images, explanations),
        image_figures.plot_anchor_assignment: (data[0], torch.tensor(ANCHORS)),
        curves.plot_dataset_summary: (RECORDS,),
        curves.plot_confusion_matrix: (errors,),
    }
    for function, arguments in calls.items():
        yield function.__name__, function(*arguments, SHAPE_CLASSES)
    yield "resolutions", image_figures.plot_resolutions(data[0], [32, 64])
    yield "anchors", curves.plot_anchors(RECORDS, ANCHORS)
    yield "range test", curves.plot_lr_finder(RANGE_TEST)
    yield "training curves", curves.plot_training_curves(tmp_path / "metrics.csv", CONFIG)
    yield "precision", curves.plot_precision_recall(PREDICTIONS, GROUND_TRUTH, per_class)
    yield "per-class AP", curves.plot_per_class_ap(per_class)
    yield "sampled sizes", curves.plot_multiscale_sizes([64, 64, 96])
    runs = {"one": [0.5, 0.5], "many": [0.4, 0.5]}
    yield "size comparison", curves.plot_size_comparison([64, 96], runs, [3.0, 5.0])


def test_the_range_test_figure_shows_the_decrease_but_not_the_divergence():
    low, high = curves.plot_lr_finder(RANGE_TEST).axes[0].get_ylim()
    assert low < 4 and 7 < high < 90


def test_every_figure_is_white_and_small_and_leaves_the_settings_unchanged(tmp_path):
    before = dict(matplotlib.rcParams)
    for name, figure in figures(tmp_path):
        file = figure.encoded()
        image = Image.open(io.BytesIO(file)).convert("RGB")
        assert min(image.getpixel((0, 0))) > 240, name  # readable on GitHub's dark theme too
        assert 300 <= image.width <= 1100 and image.height <= 1100, name
        assert len(file) < 300_000, name
    assert dict(matplotlib.rcParams) == before


def tile(figure, number=0):
    """The pixels of one image of a figure."""
    return np.asarray(figure.axes[number].images[0].get_array())


def has_colour(image, colour):
    return (image == colour).all(axis=-1).sum() > 20


def test_a_class_has_the_same_colour_in_every_figure():
    colours = class_colours(COUNT)
    bars = curves.plot_dataset_summary(RECORDS, SHAPE_CLASSES).axes[0].patches
    np.testing.assert_allclose(
        [to_rgb(bar.get_facecolor()) for bar in bars], np.array(colours) / 255
    )
    annotated = tile(image_figures.plot_annotations(RECORDS[:1], SHAPE_CLASSES))
    detected = tile(
        image_figures.plot_detections(
            [RECORDS[0].image], [detections_of(RECORDS[0])], SHAPE_CLASSES
        )
    )
    for label in RECORDS[0].labels:
        assert has_colour(annotated, colours[label]) and has_colour(detected, colours[label])


def test_images_are_shown_at_their_own_pixel_size_with_readable_text():
    """Text is drawn in pixels, so its size is right only if the figure doesn't resize the image."""
    figure = image_figures.plot_annotations(RECORDS, SHAPE_CLASSES)
    for number, axis in enumerate(figure.axes):
        width, height = axis.get_window_extent().width, axis.get_window_extent().height
        np.testing.assert_allclose((height, width), tile(figure, number).shape[:2], atol=0.01)
    assert image_figures.FONT_SIZE / figure.dpi * 72 >= 8.5 and figure.get_size_inches()[0] <= 9


def test_ground_truth_is_shown_beside_the_predictions():
    images = [record.image for record in RECORDS[:2]]
    figure = image_figures.plot_detections(
        images, list(map(detections_of, RECORDS[:2])), SHAPE_CLASSES, RECORDS[:2]
    )
    assert titles_of(figure) == ["ground truth", "predictions"] * 2
    left, right = tile(figure, 0), tile(figure, 1)
    colour = class_colours(COUNT)[RECORDS[0].labels[0]]
    assert (
        0 < (left == colour).all(axis=-1).sum() < (right == colour).all(axis=-1).sum()
    )  # dashed, and a shorter label


def titles_of(figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_an_image_explained_several_times_is_shown_once():
    image, both = RECORDS[0].image, [explanation_of(RECORDS[0]), explanation_of(RECORDS[0], "No.")]
    figure = image_figures.plot_gradcam(image, both, SHAPE_CLASSES)
    heatmap = f"heatmap of {SHAPE_CLASSES[RECORDS[0].labels[0]]} 50%"
    assert titles_of(figure) == ["detections", heatmap, "No."]
    figure = image_figures.plot_gradcam([image, image], both, SHAPE_CLASSES, ["a", "b"])
    assert titles_of(figure) == ["detections", "a", "detections", "b"]


def test_before_and_after_are_pairs():
    images = [record.image for record in RECORDS[:2]]
    before, after = (list(map(detections_of, RECORDS[k : k + 2])) for k in (2, 0))
    figure = image_figures.plot_detections(images, after, SHAPE_CLASSES, before=before)
    assert titles_of(figure) == ["before training", "after training"] * 2
    alone = image_figures.plot_detections(images * 2, after + before, SHAPE_CLASSES)
    for number, other in enumerate((2, 0, 3, 1)):
        np.testing.assert_array_equal(tile(figure, number), tile(alone, other))


def test_errors_of_an_image_in_words():
    counts = np.array([[2, 1, 0], [0, 0, 1], [0, 3, 0]])
    text = image_figures.describe_errors(counts, ["star", "ring"])
    assert text == "2 correct, star taken for ring, ring missed, false ring"
    assert [counted(n, "box", "boxes") for n in (1, 3000)] == ["1 box", "3,000 boxes"]


def test_a_mosaic_is_shown_beside_its_four_sources():
    config = Config(dataset="shapes", classes=SHAPE_CLASSES, image_size=64, mosaic_prob=1.0)
    data = MosaicDataset(RECORDS, config)
    with mock.patch.object(data, "image", wraps=data.image) as image:
        _ = data[4]
    figure = image_figures.plot_mosaic(data, 4, SHAPE_CLASSES)
    sources = [RECORDS[call.args[0]] for call in image.call_args_list]
    for number, record in zip((0, 1, 3, 4), sources, strict=True):
        alone = image_figures.plot_annotations([record], SHAPE_CLASSES)
        np.testing.assert_array_equal(tile(figure, number), tile(alone))


def test_source_is_shown_as_python():
    text = show(MosaicDataset.is_mosaic).data
    assert text.startswith("```python\ndef is_mosaic(self") and text.endswith("\n```")


def test_letters_besides_ascii_are_drawn(monkeypatch):
    """Pillow's own font shows all letters that it lacks as the same empty square."""
    monkeypatch.setattr(
        drawing, "SYSTEM_FONTS", (f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf",)
    )
    drawing._font.cache_clear()
    canvas, box = np.zeros((64, 128, 3), np.uint8), np.float32([[10, 30, 100, 60]])
    one, other = (
        drawing.draw_boxes(canvas, box, [(255, 255, 255)], [text]) for text in ("кошка", "собак")
    )
    drawing._font.cache_clear()
    assert not np.array_equal(one, other)


def test_images_may_be_files(tmp_path):
    path, record = tmp_path / "image.png", RECORDS[0]
    Image.fromarray(record.image).save(path)
    found, explanations = [detections_of(record)], [explanation_of(record)]
    for from_file, expected in (
        (
            image_figures.plot_detections([path], found, SHAPE_CLASSES),
            image_figures.plot_detections([record.image], found, SHAPE_CLASSES),
        ),
        (
            image_figures.plot_gradcam(path, explanations, SHAPE_CLASSES),
            image_figures.plot_gradcam(record.image, explanations, SHAPE_CLASSES),
        ),
    ):
        for number in range(len(expected.axes)):
            np.testing.assert_array_equal(tile(from_file, number), tile(expected, number))


def test_the_anchor_assignment_figure_has_three_boxes_per_object_and_scale():
    """Ground truth, cell and anchor; the cell holds the centre of the ground truth."""
    sample = MosaicDataset(RECORDS, Config(dataset="shapes", classes=SHAPE_CLASSES, image_size=96))[
        0
    ]
    figure = image_figures.plot_anchor_assignment(sample, torch.tensor(ANCHORS), SHAPE_CLASSES)
    assert len(figure.axes) == 3 and len(figure.legends[0].get_texts()) == 3
    for axis, grid in zip(figure.axes, (3, 6, 12), strict=True):
        centres = np.array([patch.get_center() for patch in axis.patches]).reshape(-1, 3, 2)
        np.testing.assert_allclose(centres[:, 0], sample[1][:, :2] * grid, atol=1e-4)
        np.testing.assert_allclose(centres[:, 1], np.floor(centres[:, 0]) + 0.5)
        np.testing.assert_allclose(centres[:, 2], centres[:, 1], atol=1e-6)


def test_the_axis_of_the_size_comparison_shows_small_differences():
    figure = curves.plot_size_comparison(
        [128, 160], {"one": [0.90, 0.92], "many": [0.91, 0.93]}, [3.0, 5.0]
    )
    low, high = figure.axes[0].get_ylim()
    assert 0.85 < low < 0.90 and 0.93 < high < 0.97
    assert f"{low:.2f} to {high:.2f}" in figure.axes[0].get_ylabel()
    assert len(figure.axes[0].lines) == 2 and len(figure.axes[1].lines) == 1
    figure = curves.plot_size_comparison(
        [128, 160], {str(run): [0.9, 0.9] for run in range(5)}, [3.0, 5.0]
    )
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 5


def test_curves_have_every_loss_term_the_accuracies_the_rate_and_the_end_of_mosaics(tmp_path):
    write_metrics(tmp_path / "m.csv", list(rows_of(range(2))))
    figure = curves.plot_training_curves(tmp_path / "m.csv", CONFIG.replace(epochs=20))
    lines = {axis.get_title(loc="left"): axis.lines for axis in figure.axes}
    assert list(lines["Class accuracy"][0].get_ydata()) == [0.5, 0.5]
    assert list(lines["Class loss"][1].get_ydata()) == [2.0, 2.0]
    assert list(lines["New loss"][0].get_ydata()) == [0.5, 0.5]
    assert list(lines["Learning rate (OneCycle)"][0].get_ydata()) == [0.001, 0.001]
    assert list(lines["Total loss"][-1].get_xdata()) == [18, 18]


def test_a_resumed_run_has_one_value_per_epoch(tmp_path):
    """Epoch 2 was interrupted after its values were logged, and ran again after the resume."""
    write_metrics(tmp_path / "m.csv", [*rows_of(range(3)), *rows_of(range(2, 5), shift=0.25)])
    epochs, losses = curves.read_curve(tmp_path / "m.csv", "val/loss")
    assert list(epochs) == [0, 1, 2, 3, 4]
    assert list(losses) == [5, 4, 3.25, 2.25, 1.25]


def test_curves_of_a_run_in_progress(tmp_path):
    path = tmp_path / "m.csv"
    write_metrics(path, list(rows_of(range(3))))
    lines = path.read_text().splitlines(keepends=True)
    for end in ("", lines[-1][: len(lines[-1]) // 2]):  # between two lines, and within a line
        path.write_text("".join(lines[:-1]) + end)
        assert list(curves.read_curve(path, "train/loss")[0]) == [0, 1]
        curves.plot_training_curves(path, CONFIG)
    path.write_text(lines[0])  # only the header
    figure = curves.plot_training_curves(path, CONFIG)
    pixels = np.asarray(Image.open(io.BytesIO(figure.encoded())).convert("RGB"))
    for colour in (TRAIN, VAL, TARGET):  # in the legends
        assert has_colour(pixels, np.round(np.array(to_rgb(colour)) * 255))
    assert len(curves.read_curve(path, "val/mAP50")[0]) == 0


def test_figures_without_predictions_and_of_classes_without_objects():
    empty = np.zeros((0, 7), np.float32)
    per_class = per_class_table(empty, GROUND_TRUTH[:1], SHAPE_CLASSES)
    curves.plot_precision_recall(empty, GROUND_TRUTH[:1], per_class)
    curves.plot_per_class_ap(per_class)
    curves.plot_confusion_matrix(confusion(empty, GROUND_TRUTH[:1], COUNT), SHAPE_CLASSES)
