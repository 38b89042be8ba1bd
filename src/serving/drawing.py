"""Draw on images: boxes with labels, in one colour per class, and heatmaps."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.serving.predictor import Detections

SYSTEM_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "Arial.ttf", "arial.ttf")

# The first seven are by Okabe and Ito (2008, https://jfly.uni-koeln.de/color), for any colour
# vision. Each of the others has the largest distance in Oklab to those before it, for normal,
# red-blind and green-blind vision.
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (120, 15, 75), (0, 0, 255), (120, 255, 255), (60, 45, 150), (150, 105, 255),
    (120, 75, 0), (105, 210, 150), (180, 45, 120), (210, 15, 195), (255, 75, 105), (105, 255, 150),
    (15, 105, 75), (255, 180, 210),
)  # fmt: skip


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the RGB colour (0..255) of a class, the same in every figure. They repeat after 20."""
    return COLOURS[label % len(COLOURS)]


def _contrast(colour: Sequence[int]) -> tuple[int, int, int]:
    """Return black if the relative luminance of the colour (WCAG 2) is above 0.18, else white."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in colour)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    colours: Sequence[tuple[int, int, int]],
    texts: Sequence[str] = (),
    font_size: float = 0,
) -> np.ndarray:
    """Draw boxes [n, 4] (xyxy in pixels) on a copy of uint8 [H, W, 3] RGB. The first box is on top.

    colours, texts: one per box. A thin border in black or white makes a box visible on any
        background. A text is left out if it would be over another text, wherever it is placed.
    font_size: in pixels, by default 1/30 of the long side and at least 9. The line width follows.
    """
    drawn = Image.fromarray(image)
    draw = ImageDraw.Draw(drawn)
    font_size = font_size or max(9, max(drawn.size) / 30)
    line = max(1, round(0.15 * font_size))
    for box, colour in reversed(list(zip(boxes, colours, strict=True))):
        _draw_box(draw, box, colour, line, drawn.size)
    labels = np.zeros((0, 4))
    for number, text in enumerate(texts):
        font = _font(font_size, text.isascii())
        extent = np.array([font.getlength(text) + font_size / 3, 1.1 * sum(font.getmetrics())])
        label = place_label(extent, number, boxes, labels, drawn.size)
        if label is not None:
            labels = np.vstack([labels, label])
            ink = _contrast(colours[number])
            draw.rectangle((*label[:2], *label[2:] - 1), fill=colours[number], outline=ink)
            centre = tuple((label[:2] + label[2:]) / 2)
            draw.text(centre, text, fill=ink, font=font, anchor="mm")
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
    colours = [class_colour(label) for label in detections.labels[rows]]
    texts = [f"{classes[detections.labels[n]]} {100 * detections.scores[n]:.0f}%" for n in rows]
    return draw_boxes(image, detections.boxes[rows], colours, texts if labels else (), font_size)


def _draw_box(
    draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple, line: int, size: tuple[int, int]
) -> None:
    """Draw one box: a coloured line between two thin lines of the contrasting brightness."""
    edge = max(1, line // 3)
    corners = np.clip([np.floor(box[:2]), np.ceil(box[2:])], 0, np.array(size) - 1)
    draw.rectangle(
        (*corners[0] - edge, *corners[1] + edge), outline=_contrast(colour), width=2 * edge + line
    )
    draw.rectangle((*corners[0], *corners[1]), outline=colour, width=line)


def place_label(
    extent: np.ndarray, number: int, boxes: np.ndarray, labels: np.ndarray, size: tuple[int, int]
) -> np.ndarray | None:
    """Find a rectangle [4] (xyxy) for the label of boxes[number].

    The first place that covers no box is taken: above the box, below, or at its sides. Otherwise
    the place that covers the least, its own box only if there is no other.
    extent: width and height of the label. size: those of the image.
    labels: rectangles [m, 4] that are never covered. Returns None if there is no place.
    """
    corners = np.clip(_label_corners(boxes[number], *extent), 0, np.maximum(size - extent, 0))
    rectangles = np.hstack([corners, corners + extent])  # [20, 4]
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).clip(min=1)  # [n]
    covered = _overlaps(rectangles, boxes) / areas  # [20, n]
    cost = covered.sum(axis=1) + 10 * (covered[:, number] > 0)
    cost[_overlaps(rectangles, labels).any(axis=1)] = np.inf
    best = cost.argmin()
    return rectangles[best] if cost[best] < np.inf else None


@cache
def _font(size: float, is_ascii: bool) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, or for other than ASCII letters a font of the system."""
    for name in () if is_ascii else SYSTEM_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _label_corners(box: np.ndarray, width: float, height: float) -> list[tuple[float, float]]:
    """Return places (left, top) for a label of a box: around it, one or two lines away, inside."""
    x1, y1, x2, y2 = box
    around = [(x, y) for y in (y1 - height, y2) for x in (x1, x2 - width)]
    around += [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
    rows = (y1 - 2 * height, y2 + height, y1 - 3 * height, y2 + 2 * height, y1, y2 - height)
    return around + [(x, y) for y in rows for x in (x1, x2 - width)]


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the areas [n, m] that rectangles a [n, 4] share with b [m, 4], all xyxy."""
    sides = np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2])
    return sides.clip(min=0).prod(axis=2)


def draw_heatmap(image: np.ndarray, heatmap: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Blend uint8 [H, W, 3] RGB, in grey, with the colours of a heatmap [H, W] in 0..1.

    opacity: 0..1, the weight of the heatmap where it is 1; where it is 0, a quarter of that.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    colours = cv2.applyColorMap(np.rint(heatmap * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    weight = opacity * (0.25 + 0.75 * heatmap[..., None])
    return np.rint(grey * (1 - weight) + colours[..., ::-1] * weight).astype(np.uint8)  # BGR -> RGB


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
