"""The app without a browser: its functions, and what is drawn on images."""

import re
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from src.serving import drawing
from src.serving.app import build_app, on_row_select, on_threshold_change
from src.serving.drawing import COLOURS, class_colour, draw_detections, draw_heatmap, place_label
from src.serving.gradcam import LAYERS, METHODS, explain
from src.serving.images import resize_long_side
from src.serving.predictor import Detections, Predictor
from src.serving.session import (
    analyze_image,
    credits_html,
    model_facts_html,
    render_detections,
    render_heatmap,
)
from tests.planted import CLASSES, blurred_noise, planted_model
from tests.test_rooms import ROOT

DEFAULTS = (next(iter(LAYERS)), next(iter(METHODS)))  # what the page shows first


@pytest.fixture(scope="module")
def predictor():
    metadata = {"data": "nothing <yet>", "mAP50": 0.12345, "metrics": {"class accuracy": 0.5}}
    return Predictor(planted_model(metadata=metadata), device="cpu")


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "wide.png"
    Image.fromarray(blurred_noise(150, 90)).save(path)
    return path


def objects(boxes, labels=None, scores=None) -> Detections:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.array(labels if labels is not None else [0] * len(boxes), np.int64)
    scores = np.array(scores if scores is not None else [0.9] * len(boxes), np.float32)
    return Detections(boxes, scores, labels, np.arange(len(boxes)))


def test_colours_are_fixed_and_distinct():
    assert len({class_colour(label) for label in range(20)}) == 20
    assert class_colour(0) == class_colour(20)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (640, 480), (4000, 50), (50, 4000)])
def test_boxes_are_drawn_on_any_size(size):
    width, height = size
    image = np.full((height, width, 3), 128, np.uint8)
    boxes = [
        [0, 0, width, height],
        [width / 2, height / 2, width / 2, height / 2],
        [-5, -5, width + 9, height + 9],
    ]
    drawn = draw_detections(image, objects(boxes, [0, 1, 2]), CLASSES)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (image == 128).all() and (drawn != image).any()


def luminance(pixels) -> np.ndarray:
    """Relative luminance of WCAG 2, plus the 0.05 of its contrast ratio."""
    return (np.asarray(pixels) / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722] + 0.05


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255), *COLOURS[::3]])
def test_boxes_and_labels_are_visible_on_any_background(background):
    """A line and its edge, or they and the background, have WCAG's contrast for graphics.

    Labels have that for text.
    """
    image = np.full((800, 800, 3), background, np.uint8)
    for label, colour in enumerate(COLOURS):
        drawn = draw_detections(
            image, objects([[160, 200, 640, 700]], [label]), [f"class {i}" for i in range(20)]
        )
        profile = luminance(drawn[450, 140:180])
        assert profile.max() / profile.min() > 2
        rows, columns = np.nonzero((drawn[:190] == colour).all(axis=-1))
        chip = luminance(drawn[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()])
        assert chip.max() / chip.min() > 4.5


def overlap(a, b) -> float:
    """Return the area that two rectangles xyxy share."""
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return max(width, 0) * max(height, 0)


def placed_labels(boxes, size=(400, 400)) -> list[np.ndarray]:
    """Place a label per box, in order. No label leaves the image or covers another one."""
    labels = np.zeros((0, 4))
    for number in range(len(boxes)):
        label = place_label(np.array([80, 17]), number, boxes, labels, size)
        if label is not None:
            assert (label >= 0).all() and (label <= np.tile(size, 2)).all()
            assert not any(overlap(label, other) for other in labels)
            labels = np.vstack([labels, label])
    return [*labels]


@pytest.mark.parametrize("count", [1, 3, 8, 30])
def test_labels_never_overlap_each_other(count):
    """Boxes around one object, as before NMS, and boxes anywhere."""
    rng = np.random.default_rng(count)
    corners = rng.uniform(0, 400, (count, 2, 2))
    for boxes in (
        np.array([150, 150, 260, 250]) + rng.normal(0, 4, (count, 4)),
        np.hstack([corners.min(axis=1), corners.max(axis=1) + 1]),
    ):
        assert len(placed_labels(boxes)) >= min(count, 12)


def test_labels_cover_no_box_if_there_is_space():
    """Boxes at every edge of the image, two that touch, and two that overlap."""
    edges = [[0, 0, 60, 60], [340, 0, 400, 60], [0, 340, 60, 400], [340, 340, 400, 400]]
    touching = [[120, 150, 180, 210], [180, 150, 240, 210]]
    overlapping = [[130, 290, 200, 340], [160, 300, 230, 350]]
    boxes = np.array([*edges, *touching, *overlapping], float)
    labels = placed_labels(boxes)
    assert len(labels) == len(boxes)
    assert not any(overlap(label, box) for label in labels for box in boxes)


def test_a_label_is_inside_its_box_only_if_nothing_else_fits():
    """The box fills the image, or leaves a stripe at one of its four sides, as wide as a label."""
    full = [0, 0, 300, 200]
    stripes = [[0, 25, 300, 200], [0, 0, 300, 175], [110, 0, 300, 200], [0, 0, 190, 200]]
    for box in (full, *stripes):
        (label,) = placed_labels(np.array([box], float), (300, 200))
        assert bool(overlap(label, box)) == (box is full)


def test_the_heatmap_covers_the_image_only_where_it_is_high():
    image = np.full((20, 20, 3), (10, 200, 90), np.uint8)
    heatmap = np.zeros((20, 20), np.float32)
    heatmap[:, 10:] = 1
    drawn = draw_heatmap(image, heatmap, 0.7).astype(int)
    assert np.abs(np.diff(drawn[:, :10], axis=1)).max() == 0
    assert np.abs(drawn[0, 0] - drawn[0, 15]).max() > 60
    assert np.ptp(draw_heatmap(image, heatmap, 0.0)) == 0  # opacity 0: the grey image alone


def test_one_forward_pass_is_enough_for_all_thresholds(predictor, image_path):
    session = analyze_image(predictor, image_path)
    forward = "torch.nn.Module.__call__"
    with mock.patch(forward, side_effect=AssertionError("a forward pass")):
        tables = [render_detections(session, limit, 0.45)[2] for limit in (0.2, 0.4, 0.99)]
        render_heatmap(session, "all", DEFAULTS[0], "gradcam", 0.5, 0.2, 0.45)
    assert len(tables[0]) > len(tables[1]) > len(tables[2]) == 0


def test_the_table_equals_the_predictor(predictor, image_path):
    expected = predictor(image_path, 0.2)
    session = analyze_image(predictor, image_path)
    drawn, summary, table, choices = render_detections(session, 0.2, 0.45)
    assert f"Detections: {len(expected)}" in summary and "150 &times; 90" in summary
    assert [row[0] for row in table] == [*range(1, len(expected) + 1)]
    assert [row[2] for row in table] == [f"{100 * score:.1f}%" for score in expected.scores]
    boxes = [[float(edge) for edge in row[3].split(", ")] for row in table]
    np.testing.assert_allclose(boxes, expected.boxes, atol=0.51)
    for row, label in zip(table, expected.labels, strict=True):
        assert CLASSES[label] in row[1]
    values = [value for _, value in choices]
    assert values[0] == "all" and values[-len(expected) :] == expected.index.tolist()
    assert drawn.shape[:2] == (288, 480)  # displayed larger, same aspect ratio


def test_class_names_are_escaped(image_path):
    model = planted_model()
    model.classes = ["<script>", "b", "c"]
    session = analyze_image(Predictor(model, device="cpu"), image_path)
    table = render_detections(session, 0.2, 0.45)[2]
    assert "<script>" not in model_facts_html(model, {"<b>": 'x"y'}) + str(table)


def test_the_heatmap_has_a_message(predictor, image_path):
    session = analyze_image(predictor, image_path)
    best = session.detections(0.2, 0.45).index.tolist()
    first, message = render_heatmap(session, best[0], *DEFAULTS, 0.7, 0.2, 0.45)
    second, _ = render_heatmap(session, best[1], *DEFAULTS, 0.7, 0.2, 0.45)
    assert first.shape == session.view.shape and (first != second).any()
    assert "Bright areas" in message
    assert "No detection above 99%" in render_heatmap(session, "all", *DEFAULTS, 0.7, 0.99, 0.45)[1]


def test_other_thresholds_keep_the_explained_detection(predictor, image_path):
    """At another NMS threshold the same detection can be in another row."""
    session = analyze_image(predictor, image_path)
    few = session.detections(0.2, 0.1).index.tolist()
    many = session.detections(0.2, 0.95).index.tolist()
    target = next(index for row, index in enumerate(few) if many.index(index) != row)
    assert on_threshold_change(session, target, 0.2, 0.95)[3].value == target
    options = {"confidence": 0.2, "iou_threshold": 0.95}
    expected = explain(predictor, image_path, many.index(target), **options)
    result = session.explain(target, *DEFAULTS, 0.2, 0.95)
    assert result.explained.tolist() == expected.explained.tolist()
    assert result.heatmap == pytest.approx(resize_long_side(expected.heatmap, 480), abs=1e-6)
    gone = next(index for index in many if index not in few)
    assert on_threshold_change(session, gone, 0.2, 0.1)[3].value == "all"
    assert on_row_select(session, 0.2, 0.95, SimpleNamespace(row_value=["3"])) == many[2]


def test_the_page_lists_the_metadata(predictor):
    text = model_facts_html(predictor.model, {"The code": "https://example.org/code"})
    link = 'href="https://example.org/code"'
    for part in ("nothing &lt;yet&gt;", "0.123", "million", link, *CLASSES):
        assert part in text


def test_letters_of_other_scripts_are_drawn():
    image, box = np.full((80, 200, 3), 255, np.uint8), np.float32([[10, 40, 190, 75]])
    if drawing._font(20, is_ascii=False).getname() == drawing._font(20, is_ascii=True).getname():
        pytest.skip("none of the system's fonts is here")
    first, second = (drawing.draw_boxes(image, box, [(0, 0, 255)], [text]) for text in "жщ")
    assert (first != second).any()


def test_samples_are_shown_with_their_authors(sample_files, predictor, tmp_path):
    folder = sample_files[0].parent
    text = credits_html(folder)
    for part in (
        "first by Ada &lt;Lovelace&gt;",
        'href="https://example.org/first"',
        'href="https://creativecommons.org/licenses/by/4.0/"',
        "Public Domain: second by Charles Babbage",
    ):
        assert part in text
    page = build_app(predictor, folder)
    assert text in [getattr(block, "value", None) for block in page.blocks.values()]
    assert credits_html(tmp_path) == ""
    shutil.copy(sample_files[0], tmp_path / "my dog.jpg")
    text = (folder / "LICENSES.txt").read_text().replace("first.jpg", "my dog.jpg")
    (tmp_path / "LICENSES.txt").write_text(text.replace("second.jpg", "photos/second.jpg"))
    assert "my dog by Ada" in credits_html(tmp_path)
    build_app(predictor, tmp_path / "missing")  # the Hub keeps no empty folder


def test_every_shipped_photograph_has_an_author_and_a_free_licence():
    folder = ROOT / "weights" / "samples"
    text = credits_html(folder)
    assert all(f"{path.stem} by " in text for path in folder.glob("*.jpg"))
    assert "unknown" not in text
    licences = set(re.findall(r"<p>(?:<a [^>]*>)?([^:<]+)", text))
    assert licences <= {"Public Domain", "CC0-1.0", "CC-BY-4.0"}
