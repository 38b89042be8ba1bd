"""Draw on images: boxes with labels, in one colour per class, and heatmaps."""

import colorsys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.serving.predictor import Detections

# Pillow searches the system for them:
SYSTEM_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")
LABEL_SCALES = (1, 0.85, 0.7)  # of the font, tried in this order

# The first seven are by Okabe and Ito (2008, https://jfly.uni-koeln.de/color), for any colour
# vision. Each of the others has the largest distance in Oklab to those before it, for normal,
# red-blind and green-blind vision.
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (120, 15, 75), (0, 0, 255), (120, 255, 255), (60, 45, 150), (150, 105, 255),
    (120, 75, 0), (105, 210, 150), (180, 45, 120), (210, 15, 195), (255, 75, 105), (105, 255, 150),
    (15, 105, 75), (255, 180, 210),
)  # fmt: skip


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Return one RGB colour (0..255) per class, the same in every figure.

    A longer list starts with the shorter one. The first 20 are easy to tell apart; the hues of the
    others differ by the golden ratio.
    """
    colours = [*COLOURS[:count]]
    for i in range(count - len(COLOURS)):
        colour = colorsys.hls_to_rgb(0.618034 * i % 1, (0.7, 0.4)[i % 2], 0.7)
        colours.append(tuple(round(255 * channel) for channel in colour))
    return colours


def label_colours(labels: Sequence[int], classes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return the colour of each label."""
    colours = class_colours(len(classes))
    return [colours[label] for label in labels]


def _contrast(colour: Sequence[int]) -> tuple[int, int, int]:
    """Return black if the relative luminance of the colour (WCAG 2) is above 0.18, else white."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in colour)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    colours: Sequence[tuple[int, int, int]],
    texts: Sequence[str] = (),
    dashed: bool = False,
    font_size: float = 0,
) -> np.ndarray:
    """Draw boxes [n, 4] (xyxy in pixels) on a copy of uint8 [H, W, 3] RGB. The first box is on top.

    colours, texts: one per box. A thin border in black or white makes a box visible on any
        background. A text is left out if it would be over another text, wherever it is placed.
    dashed: for ground truth.
    font_size: in pixels, by default 1/30 of the long side and at least 9. The line width follows.
    """
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    font_size = font_size or max(9, max(drawn.size) / 30)
    line = max(1, round(0.15 * font_size))
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):
        _draw_box(draw, box, colour, line, drawn.size)
    if dashed:
        rows, columns = np.indices(image.shape[:2])
        gaps = (rows + columns) // (4 * line) % 2 == 1
        drawn = Image.fromarray(np.where(gaps[..., None], image, drawn))
        draw = ImageDraw.Draw(drawn)
    labels = np.zeros((0, 4))
    for number, (text, colour) in enumerate(zip(texts, colours, strict=False)):
        place = place_label(text, number, boxes, labels, drawn.size, font_size)
        if place:
            labels = np.vstack([labels, place[0]])
            _draw_label(draw, *place, text, colour)
    return np.asarray(drawn)


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    classes: Sequence[str],
    labels: bool = True,
    rows: Sequence[int] | None = None,
    font_size: float = 0,
) -> np.ndarray:
    """Draw detections on a copy of uint8 [H, W, 3] RGB, with class and confidence if `labels`.

    rows: the detections to draw, by default all. font_size: see `draw_boxes`.
    """
    rows = np.arange(len(detections)) if rows is None else np.asarray(rows, dtype=int)
    colours = label_colours(detections.labels[rows], classes)
    names = zip(detections.labels[rows], detections.scores[rows], strict=True)
    texts = [f"{classes[label]} {100 * score:.0f}%" for label, score in names] if labels else ()
    return draw_boxes(image, detections.boxes[rows], colours, texts, font_size=font_size)


@cache
def _font(size: float, is_ascii: bool) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font for ASCII, which is nearly all that it has, or one of the system."""
    for name in () if is_ascii else SYSTEM_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _draw_box(
    draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple, line: int, size: tuple[int, int]
) -> None:
    """Draw one box: a coloured line between two thin lines of the contrasting brightness."""
    edge = max(1, line // 3)
    x1, y1 = np.floor(box[:2]).clip(0, np.array(size) - 1)
    x2, y2 = np.ceil(box[2:]).clip(
        (x1 + 1, y1 + 1), np.maximum(np.array(size) - 1, (x1 + 1, y1 + 1))
    )
    draw.rectangle(
        (x1 - edge, y1 - edge, x2 + edge, y2 + edge),
        outline=_contrast(colour),
        width=2 * edge + line,
    )
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def place_label(
    text: str,
    number: int,
    boxes: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    font_size: float,
) -> tuple[np.ndarray, ImageFont.FreeTypeFont] | None:
    """Find a rectangle (xyxy) and a font for the label of boxes[number].

    The first place that covers no box is taken: above the box, below, at its sides, then with
    smaller text. Otherwise the place that covers the least, its own box only if there is no other.
    labels: rectangles [m, 4] that are never covered. Returns None if there is no place.
    """
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).clip(min=1)  # [n]
    best = None
    lowest_cost = np.inf
    for scale in LABEL_SCALES:
        font = _font(max(8.0, scale * font_size), text.isascii())
        extent = np.array([font.getlength(text) + font_size / 3, 1.1 * sum(font.getmetrics())])
        corners = _label_corners(boxes[number], *extent)
        corners = np.clip(corners, 0, np.maximum(np.array(size) - extent, 0))
        places = np.hstack([corners, corners + extent])  # [16, 4]
        covered = _overlaps(places, boxes) / areas  # [16, n]
        cost = covered.sum(axis=1) + 10 * (covered[:, number] > 0)
        cost[_overlaps(places, labels).any(axis=1)] = np.inf
        place = cost.argmin()
        if cost[place] == 0:
            return places[place], font
        if cost[place] - scale < lowest_cost:
            best = places[place], font
            lowest_cost = cost[place] - scale
    return best


def _label_corners(box: np.ndarray, width: float, height: float) -> list[tuple[float, float]]:
    """Return places (left, top) for a label of a box: around it, a line away, and inside."""
    x1, y1, x2, y2 = box
    left_and_right = (x1, x2 - width)
    top_and_bottom = (y1, y2 - height)
    rows = (y1 - height, y2, y1 - 2 * height, y2 + height)
    corners = [(x, y) for y in rows[:2] for x in left_and_right]
    corners += [(x, y) for x in (x2, x1 - width) for y in top_and_bottom]
    corners += [(x, y) for y in rows[2:] for x in left_and_right]
    return corners + [(x, y) for y in top_and_bottom for x in left_and_right]


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the areas [n, m] that rectangles a [n, 4] share with b [m, 4], all xyxy."""
    a = a[:, None]
    sides = np.minimum(a[..., 2:], b[:, 2:]) - np.maximum(a[..., :2], b[:, :2])
    return sides.clip(min=0).prod(axis=2)


def _draw_label(
    draw: ImageDraw.ImageDraw, rectangle: np.ndarray, font, text: str, colour: tuple
) -> None:
    """Draw a text on a filled rectangle."""
    ink = _contrast(colour)
    draw.rectangle((*rectangle[:2], *rectangle[2:] - 1), fill=colour, outline=ink)
    draw.text(tuple(rectangle.reshape(2, 2).mean(axis=0)), text, fill=ink, font=font, anchor="mm")


def draw_heatmap(image: np.ndarray, heatmap: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Blend uint8 [H, W, 3] RGB, in grey, with the colours of a heatmap [H, W] in 0..1.

    opacity: 0..1, the weight of the heatmap where it is 1; where it is 0, a quarter of that.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    levels = np.rint(heatmap * 255).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]  # BGR -> RGB
    weight = opacity * (0.25 + 0.75 * heatmap[..., None])
    return np.rint(grey * (1 - weight) + colours * weight).astype(np.uint8)


def draw_explanation(
    image: np.ndarray, explanation, classes: Sequence[str], opacity: float = 0.6
) -> np.ndarray:
    """Draw an Explanation on a copy of uint8 [H, W, 3] RGB: heatmap, and the explained boxes."""
    return draw_detections(
        draw_heatmap(image, explanation.heatmap, opacity),
        explanation.detections,
        classes,
        labels=explanation.is_candidate,
        rows=explanation.explained,
    )
