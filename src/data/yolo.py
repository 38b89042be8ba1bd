"""YOLO data sets as ultralytics and Roboflow write them: data.yaml, images and label files."""

import math
from pathlib import Path

import yaml

from src.data.records import (
    Problem,
    Result,
    check_image,
    clip_box,
    is_hidden,
    make_result,
    read_list,
)
from src.serving.images import IMAGE_SUFFIXES

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


def find_yaml(root: str | Path) -> Path | None:
    """Return the data.yaml of a folder, or `root` itself if it is a YAML file. Returns None if there is none."""
    root = Path(root)
    paths = [root] if root.suffix in (".yaml", ".yml") else [root / name for name in YAML_NAMES]
    return next((path for path in paths if path.is_file()), None)


def _load(root: str | Path) -> tuple[Path, dict, dict[int, str]]:
    """Return the path and content of data.yaml, and the class names by index. Raises ValueError if it is not valid."""
    path = find_yaml(root)
    if not path:
        raise FileNotFoundError(
            f"{root} has no data.yaml. Set Config.data_root to the folder that contains it."
        )
    try:
        data = yaml.load(
            path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader
        )  # all text: the class "no" stays "no"
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}.") from None
    names = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        names = {int(index): name for index, name in names.items()}
    except (AttributeError, ValueError):  # no mapping, or an index that is not a number
        names = {}
    if not names or not all(name and isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"{path}: `names` must be a list of class names, or a mapping from index to name."
        )
    if data.get("nc", str(len(names))) != str(len(names)):
        raise ValueError(
            f"{path}: `nc` is {data['nc']}, but `names` has {len(names)} classes. Correct one of them."
        )
    if "kpt_shape" in data:
        raise ValueError(
            f"{path} has `kpt_shape`: keypoint labels are not supported. Export the data set for detection."
        )
    return path, data, names


def class_names(root: str | Path) -> tuple[str, ...]:
    """Return the class names of data.yaml in the order of their indices."""
    names = _load(root)[2]
    return tuple(dict.fromkeys(names[index] for index in sorted(names)))


def list_splits(root: str | Path) -> list[str]:
    """Return which of "train", "val" and "test" data.yaml has."""
    data = _load(root)[1]
    return [
        split
        for split in ("train", "val", "test")
        if data.get(split) not in (None, "", [], "null", "~")
    ]


def list_images(root: str | Path, splits: tuple[str, ...]) -> list[tuple[Path, Path, dict]]:
    """Return (image, label file, class names by index) of each image of the splits.

    Raises FileNotFoundError if a folder or list is missing, ValueError if data.yaml is not valid or a split is empty.
    """
    path, data, names = _load(root)
    items = []
    for split in splits:
        if split not in list_splits(root):
            raise ValueError(f"{path} has no split {split!r}. It has {list_splits(root)}.")
        entries = data[split] if isinstance(data[split], list) else [data[split]]
        images = [
            image for entry in entries for image in _entry_images(path, data, split, str(entry))
        ]
        if not images:
            raise ValueError(
                f"{path}: `{split}` has no images. Config(val_splits=()) takes a part of the training images."
            )
        items += [(image, label_path(image), names) for image in images]
    if not any(label.exists() for _, label, _ in items):
        example = f", such as {items[0][1]}" if items else ""
        raise FileNotFoundError(f"{path}: the splits {tuple(splits)} have no label files{example}.")
    return items


def _entry_images(path: Path, data: dict, split: str, entry: str) -> list[Path]:
    """Return the images of a folder, sorted, or of a .txt list. Also finds them if the data set was moved."""
    bases = path.parent / str(data.get("path", "")), path.parent
    places = [
        base / name for name in (entry, entry.removeprefix("../")) for base in bases
    ]  # Roboflow writes one ../ too many
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise FileNotFoundError(
            f"{path}: `{split}` is {entry}, but {places[0]} is missing. Correct `path` or `{split}`."
        )
    if place.is_dir():
        images = (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        return sorted(image for image in images if not is_hidden(image, place))
    candidates = [[base / line for base in (place.parent, *bases)] for line in read_list(place)]
    return [next((image for image in images if image.exists()), images[0]) for images in candidates]


def label_path(image: Path) -> Path:
    """Return the label file of an image: in `labels` instead of the last folder `images`, or beside the image."""
    parts, label = list(image.parts), image.with_suffix(".txt")
    if "images" not in parts or label.exists():
        return label
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_image_record(
    image: Path, label: Path, names: dict, classes: tuple[str, ...], decode: bool = False
) -> Result:
    """Read the record of an image. An empty or missing label file means that the image has no objects."""
    size, problems = check_image(image, decode)
    try:
        lines = label.read_text(encoding="utf-8-sig").split("\n") if label.exists() else []
    except (UnicodeDecodeError, OSError) as error:
        lines, problems = (
            [],
            [*problems, Problem("annotation", f"{label} is not a label file: {error}.")],
        )
    rows = [
        (line.split(), f"{label}: line {number}")
        for number, line in enumerate(lines, start=1)
        if size and line.strip()
    ]
    return make_result(image, [_read_line(*row, names, classes, size) for row in rows], problems)


def _read_line(
    fields: list[str], where: str, names: dict, classes: tuple, size: tuple[int, int]
) -> tuple | Problem:
    """Read (box xyxy in pixels, label, difficult) of "class cx cy w h", or of "class x1 y1 x2 y2 ...", a polygon to enclose."""
    polygon = len(fields) >= 7 and len(fields) % 2
    if len(fields) != 5 and not polygon:
        return Problem(
            "annotation", f"{where} has {len(fields)} values, not class, cx, cy, w, h or a polygon."
        )
    try:
        index, *values = map(float, fields)
    except ValueError:
        return Problem(
            "annotation", f"{where} is {' '.join(fields)[:60]!r}, but needs numbers only."
        )
    if index not in names:
        return Problem(
            "class",
            f"{where} has class {fields[0][:20]}, which is not an index of `names` in data.yaml.",
        )
    if names[index] not in classes:
        return Problem(
            "class", f"{where} has class {names[index][:40]!r}, which is not in Config.classes."
        )
    if polygon:
        xs, ys = values[::2], values[1::2]
        edges = min(xs), min(ys), max(xs), max(ys)
    else:
        cx, cy, w, h = values
        edges = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    box = clip_box(tuple(edge * length for edge, length in zip(edges, size * 2, strict=True)), size)
    if box is None or any(map(math.isnan, values)):
        text = f"{where}: {' '.join(fields)[:80]} is empty or outside the image. Coordinates are fractions of its size."
        return Problem("box", text)
    return box, classes.index(names[index]), False
