"""Synthetic data set: textured scenes with shapes of eight classes, drawn when needed.

Colours, sizes, angles and textures are random, so only its outline tells the class of a shape. A scene is planned
front to back, because front shapes hide those behind them, and painted back to front.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from src.config import SHAPE_CLASSES
from src.data.records import ImageRecord, make_record

SIDE_RANGE = (0.08, 0.64)  # longer side of a shape's box, as a fraction of the image
MAX_ROTATION = (
    15  # degrees in both directions; a small network takes far longer to learn larger ones
)
MAX_SHAPES = 5  # per image
MAX_TRIES = 6  # random positions tried per shape
MIN_VISIBLE_FRACTION = 0.3  # a shape with less is moved, or left out after MAX_TRIES
DIFFICULT_BELOW = 0.4  # visible fraction
PATTERNS = ("marble", "stripes", "checks", "dots")


class Shape(NamedTuple):
    """One shape of a scene."""

    label: int
    curves: list[
        np.ndarray
    ]  # closed, float64 [k, 2] x, y in pixels: the outline, then a hole if there is one
    box: np.ndarray  # [4] xyxy in pixels, clipped to the image, hidden parts included
    visible: float  # 0..1, fraction of its pixels in the image that no other shape hides


def _arc(
    start: float, stop: float, radius: float = 1, centre: tuple = (0, 0), points: int = 96
) -> np.ndarray:
    """Return points of a circular arc between two angles in degrees, [points, 2]."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.array(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _rounded(corners: list | np.ndarray, radius: float, points: int = 240) -> np.ndarray:
    """Round the corners of a polygon [n, 2]: resample it evenly and smooth it, [points, 2]."""
    closed = np.array([*corners, corners[0]])
    lengths = np.concatenate([[0], np.hypot(*np.diff(closed, axis=0).T).cumsum()])
    positions = np.linspace(0, lengths[-1], points, endpoint=False)
    curve = np.stack([np.interp(positions, lengths, axis) for axis in closed.T], axis=1)
    window = max(1, round(radius / lengths[-1] * points))
    return np.mean([np.roll(curve, k, axis=0) for k in range(-window, window + 1)], axis=0)


ARROW = [(10, 0), (1, -8), (1, -3), (-10, -3), (-10, 3), (1, 3), (1, 8)]
BOLT = [(0, -11), (-7, 2), (-1, 2), (-4, 11), (7, -3), (1, -3), (5, -11)]
STAR = np.stack([_arc(-90, 198, points=5), _arc(-54, 234, radius=0.44, points=5)], axis=1).reshape(
    10, 2
)
CRESCENT = np.concatenate([_arc(45, 315), _arc(-70, -290, radius=0.752, centre=(0.45, 0))])
T = np.linspace(0, 2 * np.pi, 240)  # curve parameter of the heart
HEART = [
    16 * np.sin(T) ** 3,
    5 * np.cos(2 * T) + 2 * np.cos(3 * T) + np.cos(4 * T) - 13 * np.cos(T),
]
OUTLINES = {  # curves around the origin, in any unit, y downwards
    "circle": [_arc(0, 360)],
    "triangle": [_rounded(_arc(-90, 150, points=3), radius=0.12)],
    "star": [_rounded(STAR, radius=0.07)],
    "ring": [_arc(0, 360), _arc(0, 360, radius=0.5)],
    "crescent": [_rounded(CRESCENT, radius=0.05)],
    "heart": [np.transpose(HEART)],
    "arrow": [_rounded(ARROW, radius=0.9)],
    "bolt": [_rounded(BOLT, radius=0.7)],
}


def _pose(rng: Generator, curves: list[np.ndarray], side: float) -> list[np.ndarray]:
    """Rotate and squeeze curves at random. Their box is centred on the origin; its longer side has `side` pixels."""
    angle = np.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    transform = rng.uniform(0.8, 1, 2)[:, None] * rotation
    curves = [curve @ transform for curve in curves]
    low, high = curves[0].min(axis=0), curves[0].max(axis=0)
    return [(curve - (low + high) / 2) * (side / (high - low).max()) for curve in curves]


def _fill(curves: list[np.ndarray], window: tuple, scale: int = 4) -> np.ndarray:
    """Draw a mask of the curves in a window (x1, y1, x2, y2 in pixels): coverage 0..1, [h, w], antialiased by `scale`."""
    x1, y1, x2, y2 = window
    mask = np.zeros(((y2 - y1) * scale, (x2 - x1) * scale), np.uint8)
    fixed = [np.rint(((curve - (x1, y1)) * scale - 0.5) * 16).astype(np.int32) for curve in curves]
    cv2.fillPoly(mask, fixed, 255, shift=4)
    return (
        cv2.resize(mask, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    )


def _box(curves: list[np.ndarray], mask: np.ndarray, window: tuple) -> np.ndarray:
    """Return the box around the curves and their mask in the window, xyxy in pixels, [4]."""
    covered = mask > 0.2
    columns, rows = (
        np.flatnonzero(covered.any(axis=0)) + window[0],
        np.flatnonzero(covered.any(axis=1)) + window[1],
    )
    low = np.maximum(
        curves[0].min(axis=0), (columns[0], rows[0])
    )  # curves: subpixel; mask: clipped to the image
    high = np.minimum(curves[0].max(axis=0), (columns[-1] + 1, rows[-1] + 1))
    return np.concatenate([low, high])


def _window(curves: list[np.ndarray], size: int, margin: float) -> tuple:
    """Return the box of the curves plus a margin in pixels, rounded outwards and clipped to the image: x1, y1, x2, y2."""
    low, high = curves[0].min(axis=0) - margin, curves[0].max(axis=0) + margin
    return (*np.floor(low).clip(0, size).astype(int), *np.ceil(high).clip(0, size).astype(int))


def plan(rng: Generator, size: int) -> list[Shape]:
    """Place the shapes of one scene, front to back."""
    shapes, occupied = [], np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        label = int(rng.integers(len(OUTLINES)))
        side = size * SIDE_RANGE[0] * (SIDE_RANGE[1] / SIDE_RANGE[0]) ** rng.random()
        posed = _pose(rng, OUTLINES[SHAPE_CLASSES[label]], side)
        for _ in range(MAX_TRIES):
            centre = rng.uniform(0.3 * side, size - 0.3 * side, 2)
            curves = [curve + centre for curve in posed]
            window = x1, y1, x2, y2 = _window(curves, size, 0)
            mask, front = _fill(curves, window), occupied[y1:y2, x1:x2]
            visible = 1 - float((mask * front).sum() / mask.sum())
            if visible >= MIN_VISIBLE_FRACTION:
                np.maximum(front, mask, out=front)
                shapes.append(Shape(label, curves, _box(curves, mask, window), visible))
                break
    return shapes


def _colour(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """Convert a CIELAB colour (0..100, about 0..60, degrees) to RGB in 0..1, [3, 1, 1]."""
    lab = np.float32(
        [lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))]
    )
    return cv2.cvtColor(lab.reshape(1, 1, 3), cv2.COLOR_Lab2RGB).reshape(3, 1, 1)


def _clouds(rng: Generator, size: int) -> np.ndarray:
    """Return noise of six octaves, mean 0, standard deviation about 1, [size, size]."""
    field = np.zeros((2, 2), np.float32)
    for octave in range(6):
        side = 3 * 2**octave
        field = cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC)
        field += rng.standard_normal((side, side), dtype=np.float32) * 0.55**octave
    return cv2.resize(field, (size, size), interpolation=cv2.INTER_LINEAR)


def _pattern(rng: Generator, clouds: np.ndarray, window: tuple, period: float) -> np.ndarray:
    """Return a random texture of a window, 0..1, [h, w]. period: pixels per stripe, check or dot."""
    x1, y1, x2, y2 = window
    x, y = np.arange(x1, x2, dtype=np.float32), np.arange(y1, y2, dtype=np.float32)[:, None]
    clouds = clouds[y1:y2, x1:x2]
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    angle, bend, frequency = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5), 2 * np.pi / period
    c, s = np.float32(frequency * np.cos(angle)), np.float32(frequency * np.sin(angle))
    u, v = x * c + y * s + np.float32(bend) * clouds, y * c - x * s
    if kind == "marble":
        return 0.5 + 0.5 * np.sin(1.5 * clouds + 0.5 * u)
    if kind == "stripes":
        wave = np.sin(u)
    elif kind == "checks":
        wave = np.sin(u) * np.sin(v) * 2
    else:
        wave = np.cos(u) + np.cos(v) - 0.7
    return (0.5 + wave * np.float32(period / 6)).clip(0, 1)  # edges are 1 to 2 pixels wide


def _background(rng: Generator, clouds: np.ndarray, hue: float) -> np.ndarray:
    """Return a low-contrast texture in two colours, [3, size, size]."""
    size = len(clouds)
    lightness = rng.uniform(70, 92) if rng.random() < 0.75 else rng.uniform(22, 38)
    chroma, contrast = rng.uniform(4, 20), rng.uniform(4, 14)
    dark = _colour(lightness - contrast / 2, chroma, hue)
    light = _colour(lightness + contrast / 2, chroma, hue + rng.uniform(-40, 40))
    blend = _pattern(rng, clouds, (0, 0, size, size), size * rng.uniform(0.06, 0.25))
    return (dark + blend * (light - dark)) * (1 + 0.04 * clouds)


def _paint(
    rng: Generator,
    image: np.ndarray,
    shape: Shape,
    clouds: np.ndarray,
    hue: float,
    light: np.ndarray,
) -> None:
    """Paint a shape and its shadow on the image [3, size, size]. light: unit vector [2] towards the light source."""
    side = np.ptp(shape.curves[0], axis=0).max()
    window = x1, y1, x2, y2 = _window(shape.curves, image.shape[1], 0.22 * side + 2)
    mask = _fill(shape.curves, window)
    blur = 2 * int(0.05 * side + 1) + 1
    height = cv2.GaussianBlur(mask, (blur, blur), 0)  # height of a cushion-like surface
    slope = np.outer([1, 2, 1], [1, 0, -1]) * light[0] + np.outer([1, 0, -1], [1, 2, 1]) * light[1]
    relief = cv2.filter2D(height, -1, slope) * np.float32(0.05 * blur)
    shadow = _fill([curve - light * 0.06 * side for curve in shape.curves], window, scale=1)
    shadow = cv2.GaussianBlur(shadow, (2 * blur + 1, 2 * blur + 1), 0) * np.float32(0.45)
    lightness, chroma = rng.uniform(50, 82), rng.uniform(32, 60)
    base = _colour(lightness, chroma, hue)
    accent = _colour(lightness + rng.choice([-7, 7]), chroma, hue + rng.uniform(-25, 25))
    blend = _pattern(rng, clouds, window, side * rng.uniform(0.2, 0.5) + 2)
    x, y = np.linspace(-0.2, 0.2, x2 - x1), np.linspace(-0.2, 0.2, y2 - y1)[:, None]
    tone = 0.9 + 0.12 * height + 0.25 * relief + (x * light[0] + y * light[1]).astype(np.float32)
    surface = (base + blend * (accent - base)) * tone + np.float32(0.3) * relief.clip(0, 1) ** 2
    region = image[:, y1:y2, x1:x2]
    region *= 1 - shadow
    region += mask * (surface - region)


def _scene(seed: int, index: int, size: int) -> ImageRecord:
    """Draw record `index` of a seed."""
    rng = np.random.default_rng([seed, index])
    shapes, clouds, hue = plan(rng, size), _clouds(rng, size), rng.uniform(0, 360)
    canvas, light = _background(rng, clouds, hue), _arc(rng.uniform(200, 300), 0, points=1)[0]
    for shape in reversed(shapes):
        _paint(rng, canvas, shape, clouds, hue + rng.uniform(50, 310), light)
    canvas += rng.standard_normal((size, size), dtype=np.float32) * np.float32(
        rng.uniform(0, 0.022)
    )
    image = np.rint(canvas * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return make_record(
        cv2.GaussianBlur(np.ascontiguousarray(image), (3, 3), rng.uniform(0.2, 0.7)),
        [shape.box for shape in shapes],
        [shape.label for shape in shapes],
        [shape.visible < DIFFICULT_BELOW for shape in shapes],
    )


def draw_shapes(count: int, size: int = 192, seed: int = 0) -> list[ImageRecord]:
    """Draw `count` records with images uint8 [size, size, 3] RGB of one to five shapes.

    Record i depends only on (seed, i, size), so a longer list starts with the shorter one. Use another seed for
    validation images. Boxes enclose the whole shape, hidden parts included, clipped to the image.
    """
    if count < 0:
        raise ValueError(f"draw_shapes: count is {count}. Use 0 or more.")
    if size < 64:
        raise ValueError(
            f"draw_shapes: size is {size} pixels. Use at least 64: smaller shapes can't be told apart."
        )
    return [_scene(seed, index, size) for index in range(count)]
