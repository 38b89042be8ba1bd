"""Image records, and the one policy for what people's data sets contain."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from src.serving.images import get_image_size, load_image

ROUNDING = 0.1  # pixels that a box may reach beyond its image without being counted
MIN_SIDE = 1 - ROUNDING  # pixels; boxes with a shorter side are empty
BAD_FILES = "images left out, missing or not readable"
OTHER_CLASSES = "objects of other classes left out"


class ImageRecord(NamedTuple):
    """An image and its ground truth."""

    image: str | np.ndarray  # a path, or uint8 [H, W, 3] RGB
    boxes: np.ndarray  # float32 [n, 4] xyxy in pixels, left and top counted from 0
    labels: np.ndarray  # int64 [n]
    difficult: np.ndarray  # bool [n]: hard to see; VOC's average precision ignores these objects


def make_record(image: str | np.ndarray, boxes: list, labels: list, difficult: list) -> ImageRecord:
    """Convert lists to an ImageRecord; they may be empty."""
    return ImageRecord(
        image,
        boxes=np.asarray(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.asarray(labels, dtype=np.int64),
        difficult=np.asarray(difficult, dtype=bool),
    )


def make_records(
    reader, split: str, items, classes: tuple[str, ...], check: bool = False
) -> tuple[list[ImageRecord], dict[str, list[str]]]:
    """Read the images of a split, apply the policy to them, and print one line that counts changes.

    - Objects of other classes are left out; an image without any other object is background.
    - Boxes are clipped to the image. Those that are empty or outside are left out.
    - A stated size that differs from the image's is a warning.
    - Images that are missing or can't be read, or whose annotation can't, are left out.

    items: (image, annotation) pairs of `reader.list_images`.
    check: decode each image completely, and print each case.
    Returns the records, and the cases by kind: texts, or the class names for OTHER_CLASSES.
    """
    records, cases = [], defaultdict(list)
    for image, source in tqdm(items, split, leave=False, disable=None, unit="image"):
        try:
            size = read_size(image, decode=check)
            objects, stated_size = reader.read(source, size)
        except Exception as error:  # decoders and parsers raise any type on damaged files
            cases[BAD_FILES].append(f"{image}, {source}: {type(error).__name__}: {error}")
            continue
        if stated_size and all(stated_size) and tuple(stated_size) != size:
            text = "{}: {} x {} is stated, {} x {} found".format(source, *stated_size, *size)
            cases["images of another size than stated"].append(f"{text} (after EXIF rotation)")
        kept = keep_objects(objects, size, classes, source, cases)
        records.append(make_record(str(image), *(zip(*kept, strict=True) if kept else 3 * [[]])))
    counts = f"{len(records):,} images, {sum(len(record.labels) for record in records):,} objects"
    print(f"{split}: {counts}{summarize(cases)}")
    if check:
        texts = (text for kind in cases if kind != OTHER_CLASSES for text in cases[kind])
        print("".join(f"  {text}\n" for text in texts), end="")
    return records, cases


def keep_objects(objects: list, size: tuple, classes: tuple, source, cases: dict) -> list[tuple]:
    """Return (box, label, difficult) of the usable ones of an image's objects.

    objects: (class name, box xyxy in pixels, difficult). The other ones are added to `cases`.
    """
    kept = []
    for number, (name, box, difficult) in enumerate(objects, start=1):
        if name not in classes:
            cases[OTHER_CLASSES].append(name)
            continue
        clipped = np.clip(box, 0, size * 2)
        case = f"{source}: object {number} ({name[:40]}): {box} in {size} pixels"
        if not (clipped[2:] - clipped[:2]).min() >= MIN_SIDE:  # also true of NaN
            cases["boxes left out, empty or outside the image"].append(case)
            continue
        if np.abs(clipped - box).max() > ROUNDING:
            cases["boxes clipped to the image"].append(case)
        kept.append((clipped, classes.index(name), difficult))
    return kept


def summarize(cases: dict[str, list[str]]) -> str:
    """Return for example "; 3 boxes clipped to the image (such as ...)", or ""."""
    details = {kind: f"such as {texts[0]}" for kind, texts in cases.items()}
    details[OTHER_CLASSES] = dict(Counter(cases.get(OTHER_CLASSES)).most_common())
    return "".join(f"; {len(cases[kind]):,} {kind} ({details[kind]})" for kind in cases)


def read_size(path: Path, decode: bool = False) -> tuple[int, int]:
    """Return the (width, height) of an image that is not truncated. Raises any exception if not.

    A file that ends with a JPEG's end marker counts as complete. Others are decoded; with
    `decode`, all are.
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - 1024))
        if decode or b"\xff\xd9" not in file.read():
            load_image(path)
    return get_image_size(path)


def first_existing(paths: list[Path]) -> Path:
    """Return the first path that exists, or else the first."""
    return next((path for path in paths if path.exists()), paths[0])


def read_list(path: Path) -> list[str]:
    """Return the lines of a text file, without empty ones."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.split("\n") if line.strip()]
