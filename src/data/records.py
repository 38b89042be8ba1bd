"""Image records, problems of data files, and the checks that all data set formats share."""

import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.config import VOC_CLASSES
from src.serving.images import get_image_size, load_image

MAX_OUTSIDE = 1.0  # pixels that a box may extend beyond its image; it is clipped
MAX_SHOWN = 10  # problems listed in an error


class Problem(NamedTuple):
    """Reason why an image of a data set can't be used."""

    kind: str  # to count by: "missing file", "annotation", "class", "box", "size" or "image"
    text: str  # names the file and the field


class ImageRecord(NamedTuple):
    """An image and its ground truth."""

    image: str | np.ndarray  # a path, or uint8 [H, W, 3] RGB
    boxes: np.ndarray  # float32 [n, 4] xyxy in pixels, left and top counted from 0
    labels: np.ndarray  # int64 [n]
    difficult: np.ndarray  # bool [n]: hard to see; VOC's average precision ignores these objects


Result = tuple[
    ImageRecord | None, list[Problem]
]  # of reading an image: its record, or None and the problems


def make_record(image: str | np.ndarray, boxes: list, labels: list, difficult: list) -> ImageRecord:
    """Convert lists to an ImageRecord; they may be empty."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return ImageRecord(
        image, boxes, np.asarray(labels, dtype=np.int64), np.asarray(difficult, dtype=bool)
    )


def make_result(image: Path, objects: list[tuple | Problem], problems: list[Problem]) -> Result:
    """Return the record of an image with objects (box xyxy, label, difficult), or None and all problems."""
    problems = problems + [item for item in objects if isinstance(item, Problem)]
    if problems:
        return None, problems
    return make_record(str(image), *([item[column] for item in objects] for column in range(3))), []


def check_image(path: Path, decode: bool = False) -> tuple[tuple[int, int] | None, list[Problem]]:
    """Return the (width, height) of an image that is not truncated, or None and the problem.

    A JPEG with its end marker counts as complete. Other files are decoded; with `decode`, all are.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            file.seek(max(0, file.seek(0, 2) - 1024))
            complete = start == b"\xff\xd8" and b"\xff\xd9" in file.read()
        if decode or not complete:
            load_image(path)
        return get_image_size(path), []
    except FileNotFoundError:
        return None, [Problem("missing file", f"{path} is missing, but its split lists it.")]
    except Exception as error:  # decoders raise any type of exception on damaged files
        text = (
            str(error)
            if str(path) in str(error)
            else f"{path} can't be read as an image ({error})."
        )
        return None, [Problem("image", text)]


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether a file, or a folder between `folder` and it, is hidden: macOS's ._a.jpg, Jupyter's .ipynb_checkpoints."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_list(path: Path) -> list[str]:
    """Return the lines of a list of images, without empty ones. Raises ValueError if it is not a text file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a list of images in UTF-8: {error}.") from None
    return [line.strip() for line in lines if line.strip()]


def clip_box(box: tuple, size: tuple[float, float], min_side: float = 0.1) -> tuple | None:
    """Clip a box xyxy to an image of (width, height) pixels.

    Returns None if a side is shorter than `min_side`, or if the box extends more than MAX_OUTSIDE beyond the image.
    """
    left, top, right, bottom = box
    inside = (
        min(left, top) >= -MAX_OUTSIDE
        and right <= size[0] + MAX_OUTSIDE
        and bottom <= size[1] + MAX_OUTSIDE
    )
    clipped = max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])
    return (
        clipped
        if inside and clipped[2] - clipped[0] >= min_side and clipped[3] - clipped[1] >= min_side
        else None
    )


def usable_records(
    results: list[Result],
    root: str | Path,
    splits: tuple[str, ...],
    classes: tuple[str, ...],
    skip_bad: bool,
) -> list[ImageRecord]:
    """Return the records of a data set whose images were read one by one.

    skip_bad: leave out images with problems and print how many, instead of raising.
    Raises ValueError that lists the problems and what to do.
    """
    records = [record for record, _ in results if record is not None]
    if len(records) == len(results):
        return records
    problems = [problem for _, image_problems in results for problem in image_problems]
    options = () if classes == VOC_CLASSES else ("--classes", ",".join(classes))
    command = shlex.join(("python", "-m", "src.data.check", str(root), *options))
    bad = f"{len(results) - len(records):,} of {len(results):,} images of {', '.join(splits)}"
    if skip_bad and records:
        print(
            f"{bad} can't be used ({count_kinds(problems)}) and are left out. `{command}` lists them."
        )
        return records
    lines = [f"{bad} can't be used ({count_kinds(problems)}):"]
    lines += [f"  {problem.text}" for problem in problems[:MAX_SHOWN]]
    if len(problems) > MAX_SHOWN:
        lines.append(f"and {len(problems) - MAX_SHOWN:,} more problems.")
    lines.append(
        f"List all with `{command}`. Leave these images out with Config(skip_bad_files=True)."
        if records
        else "No image is left."
    )
    raise ValueError("\n".join(lines))


def count_kinds(problems: list[Problem]) -> str:
    """Return counts per kind, for example "2 box, 1 missing file"."""
    kinds = Counter(problem.kind for problem in problems)
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
