"""Reading of images and the letterbox."""

import os

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

PAD = 114  # grey value of the letterbox's bars
LICENSES = "LICENSES.txt"  # in a folder of images: author, licence and source of each

Image.init()
# Without EPS, which runs a program:
FORMATS = tuple(
    {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"} & Image.OPEN.keys()
)
IMAGE_SUFFIXES = tuple(
    suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS
)
# What PIL raises for files and objects that are not images:
UNREADABLE = (OSError, Image.DecompressionBombError, SyntaxError, TypeError, AttributeError)


def load_image(source, min_size: int = 0) -> np.ndarray:
    """Load an image as uint8 [H, W, 3] RGB: upright (EXIF), first frame, transparency on white.

    source: a path (FORMATS), a PIL image, or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. Of 16
        bits per pixel the upper 8 are used.
    min_size: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 scale, to a long side of at least
        min_size pixels.
    Raises ValueError with the file's name if it is missing, not an image, truncated or too large,
    or if an array has another type or shape.
    """
    if isinstance(source, np.ndarray | Tensor):
        source = _from_array(source)
    name = source if isinstance(source, str | os.PathLike) else "The image"
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
        if min_size:
            image.draft("RGB", _scaled_size(*image.size, min_size))
        return np.asarray(_convert_to_rgb(ImageOps.exif_transpose(image)))
    except (*UNREADABLE, ValueError) as error:
        raise ValueError(
            f"{name} can't be read as an image ({error}). Use a JPEG or PNG file."
        ) from None


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    """Convert an array to a PIL image. Raises ValueError for other types and shapes."""
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if fits and array.dtype == np.uint8:
        return Image.fromarray(array)
    raise ValueError(
        f"The image is {type(array).__name__} {array.dtype} {list(array.shape)}, not a uint8 numpy "
        "array [H, W], [H, W, 3] or [H, W, 4]. Channels come last: tensor.permute(1, 2, 0).numpy() "
        'or array.transpose(1, 2, 0). Values 0..1 become uint8 by (255 * array).astype("uint8").'
    )


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB, transparency to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def get_image_size(source: str | os.PathLike | np.ndarray) -> tuple[int, int]:
    """Return (width, height) as `load_image` would give it; files are not decoded."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    with Image.open(source, formats=FORMATS) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        rotated = orientation >= 5 and image.format != "TIFF"  # Pillow rotates TIFFs itself
        return image.size[::-1] if rotated else image.size


def _scaled_size(width: int, height: int, long_side: int) -> tuple[int, int]:
    scale = long_side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def resize_long_side(image: np.ndarray, long_side: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] or float32 [H, W] to `long_side` pixels on its long side.

    Bilinear with antialiasing: downscaling takes torch a third of the time of OpenCV's INTER_AREA.
    """
    width, height = _scaled_size(image.shape[1], image.shape[0], long_side)
    channels = torch.tensor(np.ascontiguousarray(np.atleast_3d(image))).permute(2, 0, 1)[None]
    resized = interpolate(channels, (height, width), mode="bilinear", antialias=True)[0].numpy()
    return cv2.merge([*resized])  # [H, W, 3], or [H, W] of one channel


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Resize with the aspect ratio kept and pad with grey 114.

    uint8 [H, W, 3] -> uint8 [size, size, 3], and its placement, float32 (scale x, scale y, left,
    top): coordinates move as x -> x * scale x + left, y likewise.
    """
    inner = resize_long_side(image, size)
    height, width = inner.shape[:2]
    left, top = (size - width) // 2, (size - height) // 2
    square = np.full((size, size, 3), PAD, dtype=np.uint8)
    square[top : top + height, left : left + width] = inner
    return square, np.float32([width / image.shape[1], height / image.shape[0], left, top])


def to_network_input(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 in 0..1, channels last in memory."""
    return images.to(dtype=torch.float32, memory_format=torch.channels_last) / 255
