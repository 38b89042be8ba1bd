"""The built-in data set: textured scenes with ten shapes, drawn on the spot, nothing to download.

Colours, sizes, angles and textures are random, so a shape can only be told by its form. Scenes are planned front to
back (what is in front decides how much of the next shape is seen) and painted back to front.
"""
from typing import NamedTuple

import cv2
import numpy as np

from src.voc import Record

SIDES = (0.08, 0.64)       # longer side of a shape's box, as a fraction of the picture
MOST_SHAPES = 6            # in one picture
LEAST_VISIBLE = 0.2        # a shape that would show less of itself is placed elsewhere, or not at all
DIFFICULT_BELOW = 0.4      # visible fraction under which a shape is marked difficult
TRIES = 6                  # places tried for one shape
SUPERSAMPLE = 4            # sub-pixels a side when edges are drawn
PATTERNS = ("clouds", "marble", "stripes", "checks", "dots")


class Shape(NamedTuple):
    """One shape of a scene: its label, closed curves float64 [k, 2] in pixels (even-odd fill), visible 0..1."""
    label: int
    curves: list
    visible: float


# ---- forms ----------------------------------------------------------------------------------------------------

def _arc(start, stop, radius=1.0, centre=(0.0, 0.0), points=96):
    """Points of a circle's arc between two angles in degrees, [points, 2]."""
    angle = np.radians(np.linspace(start, stop, points))
    return np.array(centre) + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _rounded(corners, radius=0.12, points=240):
    """A closed polygon [n, 2] resampled evenly and averaged along itself, so its corners are soft, [points, 2]."""
    corners = np.asarray(corners, dtype=float)
    closed = np.concatenate([corners, corners[:1]])
    along = np.concatenate([[0], np.hypot(*np.diff(closed, axis=0).T).cumsum()])
    at = np.linspace(0, along[-1], points, endpoint=False)
    curve = np.stack([np.interp(at, along, axis) for axis in closed.T], axis=1)
    reach = max(1, round(radius / along[-1] * points))
    return np.mean([np.roll(curve, k, axis=0) for k in range(-reach, reach + 1)], axis=0)


def _star():
    angle = np.radians(np.arange(10) * 36 - 90)
    return np.where(np.arange(10) % 2, 0.44, 1.0)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _heart():
    t = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 16


CROSS = [(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
         (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]
ARROW = [(1, 0), (.1, -.85), (.1, -.27), (-1, -.27), (-1, .27), (.1, .27), (.1, .85)]
BOLT = [(.0, -1.1), (-.75, .2), (-.12, .2), (-.4, 1.1), (.75, -.3), (.1, -.3), (.5, -1.1)]
FORMS = {  # curves in units of about one radius, y downwards
    "circle": [_arc(0, 360)],
    "square": [_rounded([(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)])],
    "triangle": [_rounded(_arc(-90, 150, points=3))],
    "star": [_rounded(_star(), radius=0.07)],
    "ring": [_arc(0, 360), _arc(0, 360, radius=0.5)],
    "cross": [_rounded(CROSS)],
    "crescent": [_rounded(np.concatenate([_arc(45, 315), _arc(-70, -290, radius=0.752, centre=(0.45, 0))]), 0.05)],
    "heart": [_heart()],
    "arrow": [_rounded(ARROW, radius=0.09)],
    "bolt": [_rounded(BOLT, radius=0.07)],
}
SHAPE_CLASSES = tuple(FORMS)


# ---- planning -------------------------------------------------------------------------------------------------

def _pose(rng, curves, side):
    """Curves turned by any angle, squeezed a little as if seen aslant, `side` pixels at the longer side of their box
    and centred on the origin."""
    (c, s), (d, t) = ((np.cos(a), np.sin(a)) for a in rng.uniform(0, 2 * np.pi, 2))
    squeeze = np.array([[c, -s], [s, c]]) * (1, rng.uniform(0.8, 1)) @ np.array([[d, -t], [t, d]])
    curves = [curve @ squeeze.T for curve in curves]
    low, high = curves[0].min(axis=0), curves[0].max(axis=0)
    return [(curve - (low + high) / 2) * (side / (high - low).max()) for curve in curves]


def _fill(curves, window, scale=1):
    """Coverage of the curves in a window (x1, y1, x2, y2 in pixels), float32 0..1, [y2 - y1, x2 - x1]."""
    x1, y1, x2, y2 = window
    mask = np.zeros(((y2 - y1) * scale, (x2 - x1) * scale), np.uint8)
    fixed = [np.rint(((curve - (x1, y1)) * scale - 0.5) * 16).astype(np.int32) for curve in curves]
    cv2.fillPoly(mask, fixed, 255, shift=4)
    if scale > 1:
        mask = cv2.resize(mask, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA)
    return mask.astype(np.float32) / 255


def _box(curves, size):
    """The box around the curves, xyxy in pixels, clipped to the picture, [4]."""
    return np.concatenate([curves[0].min(axis=0), curves[0].max(axis=0)]).clip(0, size)


def _window(curves, size, margin):
    """The box with a margin in pixels around it, as whole pixels within the picture."""
    low, high = curves[0].min(axis=0) - margin, curves[0].max(axis=0) + margin
    return (*np.floor(low).clip(0, size).astype(int), *np.ceil(high).clip(0, size).astype(int))


def plan(rng, size):
    """The shapes of one scene, front to back; each shows at least LEAST_VISIBLE of what lies within the picture."""
    shapes, taken = [], np.zeros((size, size), np.float32)
    for _ in range(rng.integers(1, MOST_SHAPES + 1)):
        label = int(rng.integers(len(FORMS)))
        side = size * SIDES[0] * (SIDES[1] / SIDES[0]) ** rng.random()
        posed = _pose(rng, FORMS[SHAPE_CLASSES[label]], side)
        for _ in range(TRIES):
            centre = rng.uniform(0.3 * side, size - 0.3 * side, 2)
            curves = [curve + centre for curve in posed]
            window = x1, y1, x2, y2 = _window(curves, size, 0)
            mask, front = _fill(curves, window), taken[y1:y2, x1:x2]
            visible = 1 - float((mask * front).sum() / mask.sum())
            if visible >= LEAST_VISIBLE:
                np.maximum(front, mask, out=front)
                shapes.append(Shape(label, curves, visible))
                break
    return shapes


# ---- painting -------------------------------------------------------------------------------------------------
# Pictures in the making are planes, float32 [3, height, width] in 0..1.

def _oklch(lightness, chroma, hue):
    """Perceptual colour (hue in degrees) to RGB [3, 1, 1]: equal steps look equal, so that palettes stay calm."""
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    lms = np.array([lightness + 0.3963 * a + 0.2158 * b, lightness - 0.1056 * a - 0.0639 * b,
                    lightness - 0.0895 * a - 1.2915 * b]) ** 3
    rgb = np.array([[4.0767, -3.3077, 0.2310], [-1.2684, 2.6098, -0.3413], [-0.0042, -0.7034, 1.7076]]) @ lms
    return (rgb.clip(0, 1) ** (1 / 2.2)).astype(np.float32)[:, None, None]


def _clouds(rng, size):
    """Noise of six octaves around 0 with a spread of about 1, [size, size]."""
    field = np.zeros((2, 2), np.float32)
    for octave in range(6):
        side = 3 * 2 ** octave
        field = cv2.resize(field, (side, side), interpolation=cv2.INTER_CUBIC)
        field += rng.standard_normal((side, side), dtype=np.float32) * 0.55 ** octave
    return cv2.resize(field, (size, size), interpolation=cv2.INTER_LINEAR)


def _grid(window):
    """Pixel coordinates in a window, float32: x [1, w] and y [h, 1]."""
    x1, y1, x2, y2 = window
    return np.arange(x1, x2, dtype=np.float32)[None], np.arange(y1, y2, dtype=np.float32)[:, None]


def _pattern(rng, clouds, x, y, period):
    """A random texture in 0..1, [h, w]; `period` in pixels is one stripe, check or dot with its gap."""
    kind = PATTERNS[rng.integers(len(PATTERNS))]
    angle, bend, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.5), 2 * np.pi / period
    c, s = np.float32(turn * np.cos(angle)), np.float32(turn * np.sin(angle))
    along, across = x * c + y * s + np.float32(bend) * clouds, y * c - x * s
    if kind == "clouds":
        return (0.5 + 0.25 * clouds).clip(0, 1)
    if kind == "marble":
        return 0.5 + 0.5 * np.sin(2 * clouds + 0.5 * along)
    if kind == "stripes":
        wave = np.sin(along)
    elif kind == "checks":
        wave = np.sin(along) * np.sin(across) * 2
    else:
        wave = np.cos(along) + np.cos(across) - 0.7
    return (0.5 + wave * np.float32(period / 6)).clip(0, 1)  # edges one or two pixels soft


def _backdrop(rng, clouds, hue):
    """A calm two-colour texture, lit from one side, [3, size, size]."""
    size = len(clouds)
    x, y = _grid((0, 0, size, size))
    lightness = rng.uniform(0.75, 0.93) if rng.random() < 0.65 else rng.uniform(0.34, 0.46)
    chroma, contrast = rng.uniform(0.015, 0.07), rng.uniform(0.03, 0.12)
    dark = _oklch(lightness - contrast / 2, chroma, hue)
    light = _oklch(lightness + contrast / 2, chroma, hue + rng.uniform(-40, 40))
    blend = _pattern(rng, clouds, x, y, size * rng.uniform(0.06, 0.25))
    slope = (rng.uniform(-0.16, 0.16, 2) / size).astype(np.float32)
    lit = 1 + 0.03 * clouds + slope[0] * (x - size / 2) + slope[1] * (y - size / 2)
    return (dark + blend * (light - dark)) * lit


def _paint(rng, picture, shape, clouds, hue, light):
    """Paint one shape and its shadow over the picture [3, size, size]; `light` is the unit vector towards the light."""
    side = np.ptp(shape.curves[0], axis=0).max()
    window = x1, y1, x2, y2 = _window(shape.curves, picture.shape[1], 0.22 * side + 2)
    mask = _fill(shape.curves, window, SUPERSAMPLE)
    blur = 2 * int(0.05 * side + 1) + 1
    swell = cv2.GaussianBlur(mask, (blur, blur), 0)  # as if the shape were a cushion
    slope = np.outer([1, 2, 1], [1, 0, -1]) * light[0] + np.outer([1, 0, -1], [1, 2, 1]) * light[1]
    relief = cv2.filter2D(swell, -1, slope) * np.float32(0.05 * blur)
    shadow = _fill([curve - light * 0.06 * side for curve in shape.curves], window)
    shadow = cv2.GaussianBlur(shadow, (2 * blur + 1, 2 * blur + 1), 0) * np.float32(0.45)

    x, y = _grid(window)
    lightness, chroma = rng.uniform(0.58, 0.85), rng.uniform(0.1, 0.17)
    base = _oklch(lightness, chroma, hue)
    accent = _oklch(lightness + rng.choice([-0.09, 0.08]), chroma, hue + rng.uniform(-25, 25))
    blend = _pattern(rng, clouds[y1:y2, x1:x2], x, y, side * rng.uniform(0.2, 0.5) + 2)
    ramp = ((x - x.mean()) * np.float32(light[0]) + (y - y.mean()) * np.float32(light[1])) * np.float32(0.3 / side)
    tone = 0.9 + 0.12 * swell + 0.25 * relief + ramp
    face = (base + blend * (accent - base)) * tone + np.float32(0.3) * relief.clip(0, 1) ** 2
    region = picture[:, y1:y2, x1:x2]
    region *= 1 - shadow
    region += mask * (face - region)


def _scene(seed, index, size):
    """Record number `index` of a seed."""
    rng = np.random.default_rng([seed, index])
    shapes, clouds, hue = plan(rng, size), _clouds(rng, size), rng.uniform(0, 360)
    light = np.radians(rng.uniform(200, 300))
    light = np.array([np.cos(light), np.sin(light)])
    picture = _backdrop(rng, clouds, hue)
    for shape in reversed(shapes):
        _paint(rng, picture, shape, clouds, hue + rng.uniform(50, 310), light)
    picture += rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(0, 0.022))
    image = np.rint(picture * 255).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Record(image=cv2.GaussianBlur(np.ascontiguousarray(image), (3, 3), rng.uniform(0.2, 0.7)),
                  boxes=np.array([_box(shape.curves, size) for shape in shapes], np.float32),
                  labels=np.array([shape.label for shape in shapes], np.int64),
                  difficult=np.array([shape.visible < DIFFICULT_BELOW for shape in shapes], bool))


def draw_shapes(count, size=192, seed=0):
    """`count` records with uint8 pictures [size, size, 3], RGB. Record i depends on (seed, i, size) alone, so a longer
    list starts with the shorter one; give held-out pictures a seed of their own."""
    if count < 0:
        raise ValueError(f"count must be 0 or more, not {count}")
    if size < 64:
        raise ValueError(f"size must be at least 64 pixels, not {size}: smaller shapes cannot be told apart")
    return [_scene(seed, index, size) for index in range(count)]
