"""Draw on images: boxes with labels, in one colour per class, and heatmaps."""

import colorsys
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.serving.predictor import Detections

SYSTEM_FONTS = (
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "Arial.ttf",
    "arial.ttf",
)  # Pillow searches the system for them

# The first seven are by Okabe and Ito (2008, https://jfly.uni-koeln.de/color), for any colour vision. Each of the others has
# the largest distance in Oklab to those before it, for normal, red-blind and green-blind vision.
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (120, 15, 75), (0, 0, 255), (120, 255, 255), (60, 45, 150), (150, 105, 255),
    (120, 75, 0), (105, 210, 150), (180, 45, 120), (210, 15, 195), (255, 75, 105), (105, 255, 150),
    (15, 105, 75), (255, 180, 210),
)  # fmt: skip


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Return one RGB colour (0..255) per class, the same in every figure.

    A longer list starts with the shorter one. The first 20 are easy to tell apart; the hues of the others differ by the
    golden ratio.
    """
    others = [
        colorsys.hls_to_rgb(0.618034 * i % 1, (0.7, 0.4)[i % 2], 0.7)
        for i in range(count - len(COLOURS))
    ]
    return [
        *COLOURS[:count],
        *(tuple(round(255 * channel) for channel in colour) for colour in others),
    ]


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

    colours, texts: one per box. Each box has a thin border in black or white, so that it is visible on any background.
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
    occupied = []
    for box, colour, text in zip(boxes, colours, texts, strict=False):
        _draw_label(
            draw, box, text, colour, _font(font_size, text.isascii()), line, drawn.size, occupied
        )
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
    """Return Pillow's own font, which has hardly any letters besides ASCII's, or a font of the system for other texts."""
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


def _draw_label(
    draw: ImageDraw.ImageDraw,
    box: np.ndarray,
    text: str,
    colour: tuple,
    font,
    line: int,
    size: tuple,
    occupied: list,
) -> None:
    """Draw the text on a filled rectangle above the box, or inside if there is no space above.

    It moves down if it overlaps one of the rectangles in `occupied`, and is added to them.
    """
    pad = max(2, line)
    width = draw.textlength(text, font=font) + 2 * pad
    height = sum(font.getmetrics()) + pad
    left = float(np.clip(box[0] - line // 2, 0, max(0, size[0] - width)))
    top = float(box[1] - height if box[1] >= height else box[1])
    for _ in range(8):
        if not any(
            left < x2 and x1 < left + width and top < y2 and y1 < top + height
            for x1, y1, x2, y2 in occupied
        ):
            break
        top += height
    top = float(np.clip(top, 0, max(0, size[1] - height)))
    occupied.append((left, top, left + width, top + height))
    draw.rectangle(
        (left - 1, top - 1, left + width, top + height), fill=colour, outline=_contrast(colour)
    )
    draw.text((left + pad, top + pad / 2), text, fill=_contrast(colour), font=font)


def draw_heatmap(image: np.ndarray, heatmap: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Blend uint8 [H, W, 3] RGB, in grey, with the colours of a heatmap [H, W] in 0..1.

    opacity: 0..1, the weight of the heatmap where it is 1. Where it is 0, the weight is a quarter of that.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    levels = np.rint(heatmap * 255).astype(np.uint8)
    colours = cv2.cvtColor(
        cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB
    ).astype(np.float32)
    weight = opacity * (0.25 + 0.75 * heatmap[..., None])
    return np.rint(grey * (1 - weight) + colours * weight).astype(np.uint8)
