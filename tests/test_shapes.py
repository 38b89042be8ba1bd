"""The built-in data set: same seed, same pictures; boxes that fit what is drawn; flags that say what is hidden."""

import numpy as np
import pytest

from src.config import SHAPE_CLASSES
from src.data.shapes import DIFFICULT_BELOW, MAX_SHAPES, MIN_VISIBLE_FRACTION, SIDES, draw_shapes, plan

SIZE = 96


def same(a, b):
    return all(np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def inside(curves, size, steps=3):
    """The slow, obvious oracle: which of steps x steps points in each pixel have an odd number of edges to their left,
    bool [size * steps, size * steps]."""
    at = (np.arange(size * steps) + 0.5) / steps
    odd = np.zeros((len(at), len(at)), bool)
    for curve in curves:
        for (x1, y1), (x2, y2) in zip(curve, np.roll(curve, -1, axis=0), strict=True):
            for row in np.flatnonzero((at < y1) != (at < y2)):
                odd[row] ^= at > x1 + (at[row] - y1) * (x2 - x1) / (y2 - y1)
    return odd


@pytest.fixture(scope="module")
def records():
    return draw_shapes(100, size=SIZE, seed=5)


@pytest.fixture(scope="module")
def scenes():
    """(shapes front to back, the oracle's masks, the record) of a few scenes."""
    found = []
    for index, record in enumerate(draw_shapes(16, size=SIZE, seed=3)):
        shapes = plan(np.random.default_rng([3, index]), SIZE)
        found.append((shapes, [inside(shape.curves, SIZE) for shape in shapes], record))
    return found


def test_the_same_seed_draws_the_same_and_a_longer_list_starts_with_the_shorter():
    assert same(draw_shapes(3, size=SIZE, seed=7), draw_shapes(6, size=SIZE, seed=7)[:3])


def test_other_seeds_and_other_indices_draw_other_pictures():
    pictures = [record.image.tobytes() for seed in (0, 1, 2) for record in draw_shapes(5, size=SIZE, seed=seed)]
    assert len(set(pictures)) == 15


@pytest.mark.parametrize("size", [64, 97, 192])
def test_records_have_the_types_of_the_contract(size):
    for image, boxes, labels, difficult in draw_shapes(4, size=size):
        assert image.dtype == np.uint8 and image.shape == (size, size, 3) and image.flags.c_contiguous
        assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4)
        assert labels.dtype == np.int64 and difficult.dtype == bool and labels.shape == difficult.shape


def test_every_record_has_shapes_and_every_class_appears_about_as_often(records):
    assert len(SHAPE_CLASSES) >= 8 and all(1 <= len(record.labels) <= MAX_SHAPES for record in records)
    counts = np.bincount(np.concatenate([record.labels for record in records]), minlength=len(SHAPE_CLASSES))
    assert len(counts) == len(SHAPE_CLASSES) and counts.min() > 0.4 * counts.mean()


def test_boxes_lie_within_the_picture_and_have_an_area(records):
    boxes = np.concatenate([record.boxes for record in records])
    assert boxes.min() >= 0 and boxes.max() <= SIZE
    assert (boxes[:, 2:] - boxes[:, :2]).min() > 2


def test_sides_span_an_eightfold_range():
    boxes = np.concatenate([record.boxes for record in draw_shapes(150, size=64, seed=2)])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / 64
    assert SIDES[1] / SIDES[0] == pytest.approx(8) and sides.max() <= SIDES[1] + 1e-6
    assert np.quantile(sides, 0.98) / np.quantile(sides, 0.02) > 6


def test_boxes_are_tight_around_the_pixels_of_the_whole_shape(scenes):
    for _, masks, record in scenes:
        for mask, box in zip(masks, record.boxes, strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)) / 3, np.flatnonzero(mask.any(axis=0)) / 3
            extent = columns[0], rows[0], columns[-1] + 1 / 3, rows[-1] + 1 / 3
            np.testing.assert_allclose(box, extent, atol=1)


def test_difficult_marks_what_is_mostly_hidden_and_nothing_else(scenes):
    marked = 0
    for shapes, masks, record in scenes:
        front = np.zeros_like(masks[0])
        for shape, mask, difficult in zip(shapes, masks, record.difficult, strict=True):
            visible = (mask & ~front).sum() / mask.sum()
            assert visible == pytest.approx(shape.visible, abs=0.06) and visible > MIN_VISIBLE_FRACTION - 0.06
            assert difficult == (shape.visible < DIFFICULT_BELOW)
            marked += difficult
            front |= mask
    assert marked > 0


def test_the_picture_has_edges_where_the_frontmost_shapes_end(scenes):
    at_edges, elsewhere = [], []
    for _, masks, record in scenes:
        mask = masks[0][1::3, 1::3]  # the middles of the pixels
        edge = mask[2:] != mask[:-2]
        steps = np.abs(record.image[2:].astype(int) - record.image[:-2]).sum(axis=2)
        at_edges.append(steps[edge])
        elsewhere.append(steps[~edge])
    assert np.median(np.concatenate(at_edges)) > 4 * np.median(np.concatenate(elsewhere))


@pytest.mark.parametrize(("arguments", "word"), [({"count": -1}, "count"), ({"count": 1, "size": 63}, "size")])
def test_arguments_without_a_meaning_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        draw_shapes(**arguments)


def test_none_asked_for_is_an_empty_list():
    assert draw_shapes(0) == []
