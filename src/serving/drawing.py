"""How detections look: one colour for each class, labelled boxes, heatmap over a photograph."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from src.serving.predictor import Detections

# The first seven are Okabe and Ito's (2008, https://jfly.uni-koeln.de/color), told apart with any colour vision; each
# further one lies farthest from those before it in Oklab, seen with normal, red-blind and green-blind eyes.
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (120, 15, 75), (0, 0, 255), (120, 255, 255), (60, 45, 150), (150, 105, 255), (120, 75, 0), (105, 210, 150),
    (180, 45, 120), (210, 15, 195), (255, 75, 105), (105, 255, 150), (15, 105, 75), (255, 180, 210),
)  # fmt: skip


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """One RGB colour (0..255) for each class, the same in every figure; a longer list starts with the shorter one.

    The first 20 are chosen to be told apart; any more are hues a golden section apart.
    """
    further = [colorsys.hls_to_rgb(0.618034 * i % 1, (0.7, 0.4)[i % 2], 0.7) for i in range(count - len(COLOURS))]
    return [*COLOURS[:count], *(tuple(round(255 * part) for part in colour) for colour in further)]


def _contrast(colour: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, whichever reads better on it: black from WCAG 2's relative luminance 0.18 on."""
    red, green, blue = ((part / 255) ** 2.2 for part in colour)
    return (0, 0, 0) if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else (255, 255, 255)


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    classes: Sequence[str],
    labels: bool = True,
    rows: Sequence[int] | None = None,
) -> np.ndarray:
    """A copy of uint8 [H, W, 3] RGB with its boxes, and class and confidence on each where `labels`.

    Lines and letters grow with the picture; an edge of the other brightness keeps them readable on any background.
    rows: which of the detections to draw, all by default. The best lies on top.
    """
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    side = max(picture.size)
    line = max(1, round(side / 200))
    font = ImageFont.load_default(size=max(9, side / 30))
    colours = class_colours(len(classes))
    chips: list[tuple[float, ...]] = []
    rows = range(len(detections)) if rows is None else rows
    for row in reversed(list(rows)):
        colour = colours[detections.labels[row]]
        _draw_box(draw, detections.boxes[row], colour, line, picture.size)
    for row in rows if labels else ():
        label = detections.labels[row]
        text = f"{classes[label]} {100 * detections.scores[row]:.0f}%"
        _draw_label(draw, detections.boxes[row], text, colours[label], font, line, picture.size, chips)
    return np.asarray(picture)


def _draw_box(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: tuple, line: int, size: tuple[int, int]) -> None:
    """One box: a coloured line between two thin ones that are dark where it is light and white where it is dark."""
    edge = max(1, line // 3)
    x1, y1 = np.floor(box[:2]).clip(0, np.array(size) - 1)
    x2, y2 = np.ceil(box[2:]).clip((x1 + 1, y1 + 1), np.maximum(np.array(size) - 1, (x1 + 1, y1 + 1)))
    draw.rectangle((x1 - edge, y1 - edge, x2 + edge, y2 + edge), outline=_contrast(colour), width=2 * edge + line)
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)


def _draw_label(
    draw: ImageDraw.ImageDraw, box: np.ndarray, text: str, colour: tuple, font, line: int, size: tuple, chips: list
) -> None:
    """The text on a chip of its class's colour: above its box, else inside, and clear of the chips before it."""
    pad = max(2, line)
    width = draw.textlength(text, font=font) + 2 * pad
    height = sum(font.getmetrics()) + pad
    left = float(np.clip(box[0] - line // 2, 0, max(0, size[0] - width)))
    top = float(box[1] - height if box[1] >= height else box[1])
    for _ in range(8):
        if not any(left < c[2] and c[0] < left + width and top < c[3] and c[1] < top + height for c in chips):
            break
        top += height
    top = float(np.clip(top, 0, max(0, size[1] - height)))
    chips.append((left, top, left + width, top + height))
    draw.rectangle((left - 1, top - 1, left + width, top + height), fill=colour, outline=_contrast(colour))
    draw.text((left + pad, top + pad / 2), text, fill=_contrast(colour), font=font)


def draw_heatmap(image: np.ndarray, heatmap: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """uint8 [H, W, 3] RGB under a heatmap map [H, W] in 0..1: the picture in grey, the hotter the less it shows.

    opacity 0..1: how much of the picture the hottest pixels hide.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    levels = np.rint(heatmap * 255).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB).astype(np.float32)
    share = opacity * (0.25 + 0.75 * heatmap[..., None])
    return np.rint(grey * (1 - share) + colours * share).astype(np.uint8)
