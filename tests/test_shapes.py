"""Synthetic data set: reproducible images, tight boxes, difficult flags."""

import numpy as np
import pytest

from src.config import SHAPE_CLASSES
from src.data import shapes
from src.data.shapes import MAX_SHAPES, OUTLINES, SIDE_RANGE, draw_shapes

SIZE = 96


@pytest.fixture(scope="module")
def records():
    return draw_shapes(150, size=SIZE, seed=5)


def test_same_seed_gives_same_records_and_longer_lists_start_with_shorter_ones(records):
    images = [record.image for seed in range(3) for record in draw_shapes(5, SIZE, seed)]
    assert len({image.tobytes() for image in images}) == 15
    for short, long in zip(draw_shapes(3, SIZE, seed=5), records, strict=False):
        assert all(map(np.array_equal, short, long))
    assert draw_shapes(0) == []


def test_every_record_has_shapes_and_classes_are_balanced(records):
    types = {(*(column.dtype.name for column in record), record.image.shape) for record in records}
    assert types == {("uint8", "float32", "int64", "bool", (SIZE, SIZE, 3))}
    assert tuple(OUTLINES) == SHAPE_CLASSES and len(SHAPE_CLASSES) >= 8
    assert all(1 <= len(record.labels) <= MAX_SHAPES for record in records)
    counts = np.bincount(np.concatenate([record.labels for record in records]))
    assert len(counts) == len(SHAPE_CLASSES) and counts.min() > 0.4 * counts.mean()


def test_boxes_are_inside_the_image_and_span_the_range_of_sides(records):
    boxes = np.concatenate([record.boxes for record in records])
    assert boxes.min() >= 0 and boxes.max() <= SIZE
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / SIZE
    assert sides.min() == pytest.approx(SIDE_RANGE[0], rel=0.1)
    assert sides.max() == pytest.approx(SIDE_RANGE[1], rel=0.1)


def test_boxes_enclose_the_pixels_of_shapes(records):
    """Shapes are more saturated than backgrounds, so their pixels are known without the boxes."""
    single = [record for record in records if len(record.labels) == 1]
    for record in single:
        rows, columns = np.nonzero(np.ptp(record.image, axis=2) > 70)
        extent = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(record.boxes[0], extent, atol=1)
    assert len(single) > 10


def test_difficult_shapes_are_those_mostly_hidden(monkeypatch):
    """Slow reference: count the pixels of each shape that no later shape contains."""
    calls = []
    plain = shapes.visible_fractions
    monkeypatch.setattr(shapes, "visible_fractions", lambda m: calls.append(m) or plain(m))
    flags = []
    for index in range(30):
        record = shapes.draw_scene(np.random.default_rng([3, index]), SIZE)
        masks = [mask > 0.5 for mask in calls[-1]]
        for number, difficult in enumerate(record.difficult):
            hidden = np.any([*masks[number + 1 :], np.zeros_like(masks[0])], axis=0)
            visible = (masks[number] & ~hidden).sum() / masks[number].sum()
            assert visible > shapes.MIN_VISIBLE_FRACTION - 0.03
            if abs(visible - shapes.DIFFICULT_BELOW) > 0.03:
                assert difficult == (visible < shapes.DIFFICULT_BELOW)
        flags.extend(record.difficult)
    assert 0 < sum(flags) < len(flags) / 4
