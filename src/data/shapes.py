"""Synthetic data set: scenes of simple shapes on blotchy backgrounds, drawn with OpenCV.

Colors, sizes and positions are random, so only its outline tells the class of a shape.
"""

import cv2
import numpy as np
from numpy.random import Generator

from src.config import SHAPE_CLASSES
from src.data.records import ImageRecord, make_record

MAX_SHAPES = 4  # per image
SIDE_RANGE = (0.25, 0.6)  # longer side of a shape's box, as a fraction of the image
MAX_ROTATION = 15  # degrees in both directions
DIFFICULT_BELOW = 0.7  # visible fraction of a shape
MIN_VISIBLE_FRACTION = 0.5  # a shape that would leave less of another one is left out


def arc(start: float, stop: float, points: int = 60) -> np.ndarray:
    """Return points of the unit circle between two angles in degrees, [points, 2]."""
    angles = np.radians(np.linspace(start, stop, points))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


T = np.linspace(0, 2 * np.pi, 60)  # parameter of the heart's curve
HEART_X = 16 * np.sin(T) ** 3
HEART_Y = 5 * np.cos(2 * T) + 2 * np.cos(3 * T) + np.cos(4 * T) - 13 * np.cos(T)
OUTLINES = {  # closed polygons in any unit, [points, 2] x, y; y downwards
    "circle": arc(0, 360),
    "square": arc(-135, 135, points=4),
    "triangle": arc(-90, 150, points=3),
    "star": arc(-90, 234, points=10) * np.array([[1], [0.45]] * 5),
    "cross": np.transpose(
        [[1, 2, 2, 3, 3, 2, 2, 1, 1, 0, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1]]
    ),
    "ring": np.concatenate([arc(0, 360), arc(360, 0) * 0.5]),
    "heart": np.stack([HEART_X, HEART_Y], axis=1),
    "arrow": np.array([(10, 0), (1, -8), (1, -3), (-10, -3), (-10, 3), (1, 3), (1, 8)]),
}


def place(rng: Generator, outline: np.ndarray, size: int) -> np.ndarray:
    """Rotate, squeeze and scale an outline at random and place it in the image, [points, 2]."""
    angle = np.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    rotation = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    side = size * np.exp(rng.uniform(*np.log(SIDE_RANGE)))
    points = outline @ rotation * rng.uniform(0.8, 1, 2)
    points -= points.min(axis=0)
    points *= side / points.max()
    return points + rng.uniform(0, size - points.max(axis=0))


def fill(points: np.ndarray, size: int, factor: int = 4) -> np.ndarray:
    """Return how much of each pixel is inside a polygon: 0..1, [size, size, 1].

    The mask is drawn `factor` times as large and then averaged, for smooth edges.
    """
    mask = np.zeros((factor * size, factor * size), np.uint8)
    corners = np.rint(points * factor - 0.5)  # OpenCV counts from centers of pixels
    cv2.fillPoly(mask, [corners.astype(np.int32)], 255)
    mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)
    return mask[..., None] / np.float32(255)


def blotches(rng: Generator, colors: np.ndarray, size: int) -> np.ndarray:
    """Blend two RGB colors [2, 3] by a random pattern, coarse or fine: [size, size, 3]."""
    cells = rng.integers(2, 16)  # 2: a gradient
    pattern = rng.random((cells, cells), np.float32)
    pattern = cv2.resize(pattern, (size, size), interpolation=cv2.INTER_LINEAR)[..., None]
    return pattern * np.float32(colors[0]) + (1 - pattern) * np.float32(colors[1])


def visible_fractions(masks: list[np.ndarray]) -> list[float]:
    """Return the fraction of each mask that no later mask covers."""
    covered = np.zeros_like(masks[0])
    fractions = []
    for mask in reversed(masks):
        fractions.append((mask * (1 - covered)).sum() / mask.sum())
        covered = np.maximum(covered, mask)
    return fractions[::-1]


def draw_scene(rng: Generator, size: int) -> ImageRecord:
    """Draw one image, back to front. Boxes enclose whole shapes, including hidden parts."""
    grayish = rng.uniform(80, 220, (2, 1)) + rng.uniform(-30, 30, (2, 3))
    image = blotches(rng, grayish, size)
    hues = rng.integers(180) + np.linspace(0, 180, MAX_SHAPES, endpoint=False)
    labels = []
    boxes = []
    masks = []
    for hue in hues[: rng.integers(1, MAX_SHAPES + 1)] % 180:
        label = rng.integers(len(SHAPE_CLASSES))
        points = place(rng, OUTLINES[SHAPE_CLASSES[label]], size)
        mask = fill(points, size)
        if min(visible_fractions([*masks, mask])) < MIN_VISIBLE_FRACTION:
            continue
        light_and_dark = [(hue, 150, 250), (hue, 250, 170)]  # hue, saturation, value
        colors = cv2.cvtColor(np.uint8([light_and_dark]), cv2.COLOR_HSV2RGB)[0]
        image += mask * (blotches(rng, colors, size) - image)
        labels.append(label)
        boxes.append(np.concatenate([points.min(axis=0), points.max(axis=0)]))
        masks.append(mask)
    difficult = np.array(visible_fractions(masks)) < DIFFICULT_BELOW
    return make_record(np.rint(image).astype(np.uint8), boxes, labels, difficult)


def draw_shapes(count: int, size: int = 192, seed: int = 0) -> list[ImageRecord]:
    """Draw `count` records with images uint8 [size, size, 3] RGB of one to four shapes.

    Record i depends only on (seed, i, size), so a longer list starts with the shorter one.
    Use another seed for validation images.
    """
    return [draw_scene(np.random.default_rng([seed, index]), size) for index in range(count)]
