"""Synthetic data set: reproducible images, tight boxes, difficult flags."""

import numpy as np
import pytest

from src.config import SHAPE_CLASSES
from src.data.shapes import (
    DIFFICULT_BELOW,
    MAX_SHAPES,
    MIN_VISIBLE_FRACTION,
    SIDE_RANGE,
    draw_shapes,
    plan,
)

SIZE = 96


def same(a, b):
    return all(
        np.array_equal(x, y)
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


def inside(curves, size, steps=3):
    """Slow reference by the even-odd rule: bool [size * steps, size * steps], steps x steps points per pixel."""
    points = (np.arange(size * steps) + 0.5) / steps
    odd = np.zeros((len(points), len(points)), bool)
    for curve in curves:
        for (x1, y1), (x2, y2) in zip(curve, np.roll(curve, -1, axis=0), strict=True):
            for row in np.flatnonzero((points < y1) != (points < y2)):
                odd[row] ^= points > x1 + (points[row] - y1) * (x2 - x1) / (y2 - y1)
    return odd


@pytest.fixture(scope="module")
def records():
    return draw_shapes(100, size=SIZE, seed=5)


@pytest.fixture(scope="module")
def scenes():
    """A few scenes, each (shapes front to back, reference masks, record)."""
    scenes = []
    for index, record in enumerate(draw_shapes(16, size=SIZE, seed=3)):
        shapes = plan(np.random.default_rng([3, index]), SIZE)
        scenes.append((shapes, [inside(shape.curves, SIZE) for shape in shapes], record))
    return scenes


def test_same_seed_gives_same_records_and_longer_lists_start_with_shorter_ones():
    assert same(draw_shapes(3, size=SIZE, seed=7), draw_shapes(6, size=SIZE, seed=7)[:3])


def test_other_seeds_and_indices_give_other_images():
    images = [
        record.image.tobytes()
        for seed in (0, 1, 2)
        for record in draw_shapes(5, size=SIZE, seed=seed)
    ]
    assert len(set(images)) == 15


@pytest.mark.parametrize("size", [64, 97, 192])
def test_record_types(size):
    for image, boxes, labels, difficult in draw_shapes(4, size=size):
        assert (
            image.dtype == np.uint8 and image.shape == (size, size, 3) and image.flags.c_contiguous
        )
        assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4)
        assert (
            labels.dtype == np.int64 and difficult.dtype == bool and labels.shape == difficult.shape
        )


def test_every_record_has_shapes_and_classes_are_balanced(records):
    assert len(SHAPE_CLASSES) >= 8 and all(
        1 <= len(record.labels) <= MAX_SHAPES for record in records
    )
    counts = np.bincount(
        np.concatenate([record.labels for record in records]), minlength=len(SHAPE_CLASSES)
    )
    assert len(counts) == len(SHAPE_CLASSES) and counts.min() > 0.4 * counts.mean()


def test_boxes_are_inside_the_image_and_not_empty(records):
    boxes = np.concatenate([record.boxes for record in records])
    assert boxes.min() >= 0 and boxes.max() <= SIZE
    assert (boxes[:, 2:] - boxes[:, :2]).min() > 2


def test_box_sides_span_a_factor_of_eight():
    boxes = np.concatenate([record.boxes for record in draw_shapes(150, size=64, seed=2)])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / 64
    assert SIDE_RANGE[1] / SIDE_RANGE[0] == pytest.approx(8) and sides.max() <= SIDE_RANGE[1] + 1e-6
    assert np.quantile(sides, 0.98) / np.quantile(sides, 0.02) > 6


def test_boxes_are_tight_around_whole_shapes(scenes):
    for _, masks, record in scenes:
        for mask, box in zip(masks, record.boxes, strict=True):
            rows, columns = (
                np.flatnonzero(mask.any(axis=1)) / 3,
                np.flatnonzero(mask.any(axis=0)) / 3,
            )
            extent = columns[0], rows[0], columns[-1] + 1 / 3, rows[-1] + 1 / 3
            np.testing.assert_allclose(box, extent, atol=1)


def test_difficult_flags_mark_mostly_hidden_shapes(scenes):
    num_difficult = 0
    for shapes, masks, record in scenes:
        front = np.zeros_like(masks[0])
        for shape, mask, difficult in zip(shapes, masks, record.difficult, strict=True):
            visible = (mask & ~front).sum() / mask.sum()
            assert (
                visible == pytest.approx(shape.visible, abs=0.06)
                and visible > MIN_VISIBLE_FRACTION - 0.06
            )
            assert difficult == (shape.visible < DIFFICULT_BELOW)
            num_difficult += difficult
            front |= mask
    assert num_difficult > 0


def test_images_have_edges_at_the_outlines_of_front_shapes(scenes):
    at_edges, elsewhere = [], []
    for _, masks, record in scenes:
        mask = masks[0][1::3, 1::3]  # pixel centres
        edge = mask[2:] != mask[:-2]
        steps = np.abs(record.image[2:].astype(int) - record.image[:-2]).sum(axis=2)
        at_edges.append(steps[edge])
        elsewhere.append(steps[~edge])
    assert np.median(np.concatenate(at_edges)) > 4 * np.median(np.concatenate(elsewhere))


@pytest.mark.parametrize(
    ("arguments", "word"), [({"count": -1}, "count"), ({"count": 1, "size": 63}, "size")]
)
def test_invalid_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        draw_shapes(**arguments)


def test_zero_records():
    assert draw_shapes(0) == []
