"""TODO."""

import os

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

PAD = 114  # grey of the letterbox's bars


Image.init()  # PIL's other formats are no photographs; EPS is even drawn by a program


FORMATS = tuple({"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"} & Image.OPEN.keys())
UNREADABLE = (  # what PIL raises of files and things that are no picture
    UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, TypeError, AttributeError,
)  # fmt: skip


def load_image(source, side: int = 0, max_pixels: int = 0) -> np.ndarray:
    """Any picture (FORMATS) as uint8 [H, W, 3] RGB, upright (EXIF), its first frame, transparency on white.

    source: a path, a PIL image or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. With `side` a JPEG may be decoded at
    1/2, 1/4 or 1/8 as long as its long side stays at least that many pixels. A picture of more than `max_pixels`
    (0: what PIL allows) is refused before it is decoded.
    Raises ValueError that names the file where it is no picture, is truncated or has too many pixels.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8:
            raise ValueError(f'the image is an array of {source.dtype}; give uint8, of 0..1 by (255 * image).astype("uint8")')
        source = Image.fromarray(source)
    name = source if isinstance(source, str | os.PathLike) else "the image"
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        if max_pixels and image.width * image.height > max_pixels:
            size = f"{image.width:,} x {image.height:,} pixels"
            raise ValueError(f"{size} are more than {max_pixels / 1e6:.0f} million")
        if side:
            image.draft("RGB", (side, side) if image.width == image.height else _reduced(image.size, side))
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return np.asarray(_as_rgb(image))
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{name} can't be read as a picture ({error}); use a JPEG or PNG file") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB, transparency on white."""
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: bring its range to 0..255
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        image = Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        seen = image.convert("RGBA")
        image = Image.new("RGB", seen.size, "white")
        image.paste(seen, mask=seen)
    return image if image.mode == "RGB" else image.convert("RGB")


def _reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The smallest size a JPEG may be decoded at: its long side keeps `side` pixels."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def image_size_of(source) -> tuple[int, int]:
    """(width, height) of what `load_image` gives for a path or an array, without decoding its pixels."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    with Image.open(source, formats=FORMATS) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return image.size[::-1] if turned else image.size


def resize_long_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] so that the long side has `side` pixels, keeping the shape."""
    height, width = image.shape[:2]
    size = _inner_size(width, height, side)
    if size == (width, height):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if max(height, width) > side else cv2.INTER_LINEAR)


def _inner_size(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def letterbox_placement(width: int, height: int, side: int) -> np.ndarray:
    """Where `letterbox` puts a picture: float32 (scale x, scale y, left, top); x in the square = x * scale x + left."""
    inner = _inner_size(width, height, side)
    return np.float32([inner[0] / width, inner[1] / height, (side - inner[0]) // 2, (side - inner[1]) // 2])


def letterbox(image: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the shape, pad with grey 114 to a square: uint8 [H, W, 3] -> uint8 [side, side, 3], and its placement."""
    placement = letterbox_placement(image.shape[1], image.shape[0], side)
    inner = resize_long_side(image, side)
    left, top = placement[2:].astype(int)
    square = np.full((side, side, 3), PAD, dtype=np.uint8)
    square[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return square, placement


def to_network_input(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> what the network takes: float 0..1, channels last in memory."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last) / 255
