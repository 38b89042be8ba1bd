"""The built-in data set: textured scenes with eight kinds of shapes, drawn on the spot, nothing to download.

Colours, sizes, angles and textures are random, so a shape can be told by its form only. A scene is planned front to
back, since what is in front decides how much of the next shape is seen, and painted back to front.
"""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from src.config import SHAPE_CLASSES
from src.data.records import ImageRecord

SIDES = (0.08, 0.64)  # longer side of a shape's box, as a fraction of the picture
MAX_ROTATION = 15  # degrees either way: more, and a small network takes far longer to tell the shapes apart
MAX_SHAPES = 5  # in one picture
TRIES = 6  # places tried for one shape
MIN_VISIBLE_FRACTION = 0.3  # a shape that would show less of itself is placed elsewhere, or not at all
DIFFICULT_BELOW = 0.4  # visible fraction under which a shape is marked difficult
PATTERNS = ("marble", "stripes", "checks", "dots")


class Shape(NamedTuple):
    """One shape of a scene."""

    label: int
    curves: list[np.ndarray]  # closed, float64 [k, 2] x, y in pixels, the outermost first; a second one is a hole
    box: np.ndarray  # [4] xyxy in pixels, around all of it that lies within the picture
    visible: float  # 0..1, the part of its pixels within the picture that no other shape hides


def _arc(start: float, stop: float, radius: float = 1, centre: tuple = (0, 0), points: int = 96) -> np.ndarray:
    """Points of a circle's arc between two angles in degrees, [points, 2]."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.array(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _rounded(corners: list | np.ndarray, radius: float, points: int = 240) -> np.ndarray:
    """A polygon [n, 2], resampled evenly and averaged along itself so that its corners are soft, [points, 2]."""
    closed = np.array([*corners, corners[0]])
    along = np.concatenate([[0], np.hypot(*np.diff(closed, axis=0).T).cumsum()])
    at = np.linspace(0, along[-1], points, endpoint=False)
    curve = np.stack([np.interp(at, along, axis) for axis in closed.T], axis=1)
    reach = max(1, round(radius / along[-1] * points))
    return np.mean([np.roll(curve, k, axis=0) for k in range(-reach, reach + 1)], axis=0)


ARROW = [(10, 0), (1, -8), (1, -3), (-10, -3), (-10, 3), (1, 3), (1, 8)]
BOLT = [(0, -11), (-7, 2), (-1, 2), (-4, 11), (7, -3), (1, -3), (5, -11)]
STAR = np.stack([_arc(-90, 198, points=5), _arc(-54, 234, radius=0.44, points=5)], axis=1).reshape(10, 2)
CRESCENT = np.concatenate([_arc(45, 315), _arc(-70, -290, radius=0.752, centre=(0.45, 0))])
T = np.linspace(0, 2 * np.pi, 240)  # the heart's angle
HEART = [16 * np.sin(T) ** 3, 5 * np.cos(2 * T) + 2 * np.cos(3 * T) + np.cos(4 * T) - 13 * np.cos(T)]
FORMS = {  # curves around the origin, in any unit, y downwards
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
    """Curves turned and squeezed a little. Their box is centred on the origin, `side` pixels at its longer side."""
    angle = np.radians(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    squeeze = rng.uniform(0.8, 1, 2)[:, None] * turn
    curves = [curve @ squeeze for curve in curves]
    low, high = curves[0].min(axis=0), curves[0].max(axis=0)
    return [(curve - (low + high) / 2) * (side / (high - low).max()) for curve in curves]


def _fill(curves: list[np.ndarray], window: tuple, scale: int = 4) -> np.ndarray:
    """Coverage of the curves in a window (x1, y1, x2, y2 in pixels), 0..1, [h, w]; edges as fine as 1 / scale."""
    x1, y1, x2, y2 = window
    mask = np.zeros(((y2 - y1) * scale, (x2 - x1) * scale), np.uint8)
    fixed = [np.rint(((curve - (x1, y1)) * scale - 0.5) * 16).astype(np.int32) for curve in curves]
    cv2.fillPoly(mask, fixed, 255, shift=4)
    return cv2.resize(mask, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _box(curves: list[np.ndarray], mask: np.ndarray, window: tuple) -> np.ndarray:
    """The box around what the window shows of the curves (their mask), xyxy in pixels, [4]."""
    seen = mask > 0.2
    columns, rows = np.flatnonzero(seen.any(axis=0)) + window[0], np.flatnonzero(seen.any(axis=1)) + window[1]
    low = np.maximum(curves[0].min(axis=0), (columns[0], rows[0]))  # finer than whole pixels, but
    high = np.minimum(curves[0].max(axis=0), (columns[-1] + 1, rows[-1] + 1))  # blind to the picture's border
    return np.concatenate([low, high])


def _window(curves: list[np.ndarray], size: int, margin: float) -> tuple:
    """The curves' box with a margin in pixels around it, in whole pixels within the picture: x1, y1, x2, y2."""
    low, high = curves[0].min(axis=0) - margin, curves[0].max(axis=0) + margin
    return (*np.floor(low).clip(0, size).astype(int), *np.ceil(high).clip(0, size).astype(int))


def plan(rng: Generator, size: int) -> list[Shape]:
    """The shapes of one scene, front to back."""
    shapes, taken = [], np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        label = int(rng.integers(len(FORMS)))
        side = size * SIDES[0] * (SIDES[1] / SIDES[0]) ** rng.random()
        posed = _pose(rng, FORMS[SHAPE_CLASSES[label]], side)
        for _ in range(TRIES):
            centre = rng.uniform(0.3 * side, size - 0.3 * side, 2)
            curves = [curve + centre for curve in posed]
            window = x1, y1, x2, y2 = _window(curves, size, 0)
            mask, front = _fill(curves, window), taken[y1:y2, x1:x2]
            visible = 1 - float((mask * front).sum() / mask.sum())
            if visible >= MIN_VISIBLE_FRACTION:
                np.maximum(front, mask, out=front)
                shapes.append(Shape(label, curves, _box(curves, mask, window), visible))
                break
    return shapes


def _colour(lightness: float, chroma: float, hue: float) -> np.ndarray:
    """A colour of CIELAB (0..100, about 0..60, degrees), where equal steps look equal, to RGB in 0..1, [3, 1, 1]."""
    lab = np.float32([lightness, chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))])
    return cv2.cvtColor(lab.reshape(1, 1, 3), cv2.COLOR_Lab2RGB).reshape(3, 1, 1)


def _clouds(rng: Generator, size: int) -> np.ndarray:
    """Noise of six octaves around 0 with a spread of about 1, [size, size]."""
    field = np.zeros((2, 2), np.float32)
    for octave in range(6):
        side = 3 * 2**octave
        field = cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC)
        field += rng.standard_normal((side, side), dtype=np.float32) * 0.55**octave
    return cv2.resize(field, (size, size), interpolation=cv2.INTER_LINEAR)


def _pattern(rng: Generator, clouds: np.ndarray, window: tuple, period: float) -> np.ndarray:
    """A random texture of a window, 0..1, [h, w]; `period` in pixels is one stripe, check or dot with its gap."""
    x1, y1, x2, y2 = window
    x, y = np.arange(x1, x2, dtype=np.float32), np.arange(y1, y2, dtype=np.float32)[:, None]
    clouds = clouds[y1:y2, x1:x2]
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    angle, bend, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5), 2 * np.pi / period
    c, s = np.float32(turn * np.cos(angle)), np.float32(turn * np.sin(angle))
    along, across = x * c + y * s + np.float32(bend) * clouds, y * c - x * s
    if kind == "marble":
        return 0.5 + 0.5 * np.sin(1.5 * clouds + 0.5 * along)
    if kind == "stripes":
        wave = np.sin(along)
    elif kind == "checks":
        wave = np.sin(along) * np.sin(across) * 2
    else:
        wave = np.cos(along) + np.cos(across) - 0.7
    return (0.5 + wave * np.float32(period / 6)).clip(0, 1)  # edges one or two pixels soft


def _backdrop(rng: Generator, clouds: np.ndarray, hue: float) -> np.ndarray:
    """A calm texture in two colours, [3, size, size]."""
    size = len(clouds)
    lightness = rng.uniform(70, 92) if rng.random() < 0.75 else rng.uniform(22, 38)
    chroma, contrast = rng.uniform(4, 20), rng.uniform(4, 14)
    dark = _colour(lightness - contrast / 2, chroma, hue)
    light = _colour(lightness + contrast / 2, chroma, hue + rng.uniform(-40, 40))
    blend = _pattern(rng, clouds, (0, 0, size, size), size * rng.uniform(0.06, 0.25))
    return (dark + blend * (light - dark)) * (1 + 0.04 * clouds)


def _paint(rng: Generator, picture: np.ndarray, shape: Shape, clouds: np.ndarray, hue: float, light: np.ndarray):
    """Paint one shape and its shadow over the picture [3, size, size]; light [2] is a unit vector towards the lamp."""
    side = np.ptp(shape.curves[0], axis=0).max()
    window = x1, y1, x2, y2 = _window(shape.curves, picture.shape[1], 0.22 * side + 2)
    mask = _fill(shape.curves, window)
    blur = 2 * int(0.05 * side + 1) + 1
    swell = cv2.GaussianBlur(mask, (blur, blur), 0)  # as if the shape were a cushion
    slope = np.outer([1, 2, 1], [1, 0, -1]) * light[0] + np.outer([1, 0, -1], [1, 2, 1]) * light[1]
    relief = cv2.filter2D(swell, -1, slope) * np.float32(0.05 * blur)
    shadow = _fill([curve - light * 0.06 * side for curve in shape.curves], window, scale=1)
    shadow = cv2.GaussianBlur(shadow, (2 * blur + 1, 2 * blur + 1), 0) * np.float32(0.45)
    lightness, chroma = rng.uniform(50, 82), rng.uniform(32, 60)
    base = _colour(lightness, chroma, hue)
    accent = _colour(lightness + rng.choice([-7, 7]), chroma, hue + rng.uniform(-25, 25))
    blend = _pattern(rng, clouds, window, side * rng.uniform(0.2, 0.5) + 2)
    across, down = np.linspace(-0.2, 0.2, x2 - x1), np.linspace(-0.2, 0.2, y2 - y1)[:, None]
    tone = 0.9 + 0.12 * swell + 0.25 * relief + (across * light[0] + down * light[1]).astype(np.float32)
    face = (base + blend * (accent - base)) * tone + np.float32(0.3) * relief.clip(0, 1) ** 2
    region = picture[:, y1:y2, x1:x2]
    region *= 1 - shadow
    region += mask * (face - region)


def _scene(seed: int, index: int, size: int) -> ImageRecord:
    """ImageRecord number `index` of a seed."""
    rng = np.random.default_rng([seed, index])
    shapes, clouds, hue = plan(rng, size), _clouds(rng, size), rng.uniform(0, 360)
    picture, light = _backdrop(rng, clouds, hue), _arc(rng.uniform(200, 300), 0, points=1)[0]
    for shape in reversed(shapes):
        _paint(rng, picture, shape, clouds, hue + rng.uniform(50, 310), light)
    picture += rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(0, 0.022))
    image = np.rint(picture * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return ImageRecord(
        image=cv2.GaussianBlur(np.ascontiguousarray(image), (3, 3), rng.uniform(0.2, 0.7)),
        boxes=np.array([shape.box for shape in shapes], np.float32),
        labels=np.array([shape.label for shape in shapes], np.int64),
        difficult=np.array([shape.visible < DIFFICULT_BELOW for shape in shapes], bool),
    )


def draw_shapes(count: int, size: int = 192, seed: int = 0) -> list[ImageRecord]:
    """`count` records with their pictures, uint8 [size, size, 3] RGB; one to five shapes in each.

    ImageRecord i depends on (seed, i, size) alone, so a longer list starts with the shorter one. Held-out pictures take a
    seed of their own. Boxes are tight around a shape's whole form, hidden parts included, clipped to the picture.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, not {count}")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, not {size}: smaller shapes cannot be told apart")
    return [_scene(seed, index, size) for index in range(count)]
