"""TODO."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.serving.images import image_size_of, load_image


class Problem(NamedTuple):
    """Why a picture of a tree can't be used."""

    kind: str  # to count by: "missing file", "annotation", "class", "box", "size" or "picture"
    text: str  # names the file and the field


class ImageRecord(NamedTuple):
    """One picture and its objects."""

    image: str | np.ndarray  # a path, or uint8 [H, W, 3] RGB
    boxes: np.ndarray  # float32 [n, 4] xyxy in pixels, left and top counted from 0
    labels: np.ndarray  # int64 [n]
    difficult: np.ndarray  # bool [n]: hard to see; neither counted nor punished by VOC's average precision


def make_record(image: str | np.ndarray, boxes: list, labels: list, difficult: list) -> ImageRecord:
    """A record of the right types, whatever the number of objects."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return ImageRecord(image, boxes, np.asarray(labels, dtype=np.int64), np.asarray(difficult, dtype=bool))


def read_size(path: Path, decode: bool = False) -> tuple[int, int]:
    """(width, height) of a picture that can be read to its end.

    A JPEG is taken for whole where its end mark is there; every other file, and with `decode` all, is decoded.
    Raises FileNotFoundError, or ValueError that names the file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(max(0, file.seek(0, 2) - 1024))
            whole = start == b"\xff\xd8" and b"\xff\xd9" in file.read()
        if decode or not whole:
            load_image(path)
        return image_size_of(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise anything where bytes are damaged
        text = str(error) if str(path) in str(error) else f"{path} can't be read as a picture ({error})"
        raise ValueError(text) from None
