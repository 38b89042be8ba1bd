"""COCO data sets: JSON files with images, annotations and categories."""

import json
from collections import defaultdict
from pathlib import Path

from src.data.records import Problem, Result, check_image, clip_box, is_hidden, make_result

SECTIONS = ("images", "annotations", "categories")
OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_")
UNNAMED = (
    "_annotations.coco",
    "annotations",
    "labels",
    "instances",
    "coco",
)  # the folder names the split


def find_files(root: str | Path) -> dict[str, Path]:
    """Return the COCO files in a folder by split: "train2017" is instances_train2017.json, "valid" is valid/labels.json.

    root: a folder, or a single JSON file.
    """
    root, files = Path(root).absolute(), {}
    paths = [*sorted(root.glob("*.json")), *sorted(root.glob("*/*.json"))]
    for path in (
        [root] if root.suffix == ".json" else [path for path in paths if not is_hidden(path, root)]
    ):
        if path.is_file() and not path.name.startswith(OTHER_TASKS) and has_sections(path):
            split = (
                path.parent.name if path.stem in UNNAMED else path.stem.removeprefix("instances_")
            )
            files.setdefault(split, path)
    return files


def has_sections(path: Path) -> bool:
    """Return whether the text of a file names the sections of a COCO file."""
    content = path.read_bytes()
    return all(f'"{section}"'.encode() in content for section in SECTIONS)


def list_splits(root: str | Path) -> list[str]:
    """Return the names of the splits, see `find_files`."""
    return list(find_files(root))


def _load(path: Path) -> tuple[dict, dict[int, str]]:
    """Return the content of a COCO file, and its class names by category id. Raises ValueError if it is not valid."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    for section in SECTIONS:
        items = data.get(section) if isinstance(data, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{path}: `{section}` must be a list of objects.")
    try:
        return data, {category["id"]: category["name"].strip() for category in data["categories"]}
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{path}: each of `categories` needs an `id` and a `name`.") from None


def class_names(root: str | Path) -> tuple[str, ...]:
    """Return the category names of all files, without the parent category that Roboflow adds. Raises ValueError."""
    names = {}
    for path in find_files(root).values():
        data, _ = _load(path)
        parents = {str(category.get("supercategory")) for category in data["categories"]} - {"none"}
        for category in data["categories"]:
            name = category["name"].strip()
            if not (category.get("supercategory") == "none" and name in parents):
                names[name] = None
    if not names:
        raise ValueError(
            f"{root} has no COCO file with categories. Set Config.data_root to the folder that contains it."
        )
    return tuple(names)


def list_images(root: str | Path, splits: tuple[str, ...]) -> list[tuple]:
    """Return (image, file and image id for messages, `images` entry, annotations, categories) of each image.

    Images without annotations are included. Raises FileNotFoundError or ValueError that names the file.
    """
    files, result = find_files(root), []
    for split in splits:
        if split not in files:
            raise FileNotFoundError(
                f"{root} has no COCO file for the split {split!r}. It has {list(files)}."
            )
        path = files[split]
        data, categories = _load(path)
        annotations = defaultdict(list)
        for annotation in data["annotations"]:
            annotations[str(annotation.get("image_id"))].append(annotation)
        entries = {str(entry.get("id")): entry for entry in data["images"]}
        if len(entries) < len(data["images"]):
            raise ValueError(f"{path}: each of `images` needs its own `id`.")
        base = path.parent.parent if path.parent.name == "annotations" else path.parent
        folders = [base, base / split, base / "images", base / "images" / split, base / "data"]
        for image_id in entries | annotations:
            entry = entries.get(image_id, {})
            places = [folder / str(entry.get("file_name")) for folder in folders]
            image = next((place for place in places if place.exists()), places[0])
            result.append(
                (
                    image,
                    f"{path}: image {image_id}",
                    entry,
                    annotations.get(image_id, []),
                    categories,
                )
            )
    if not result:
        raise ValueError(f"The splits {tuple(splits)} of {root} list no images.")
    return result


def read_image_record(
    image: Path,
    where: str,
    entry: dict,
    annotations: list[dict],
    categories: dict,
    classes: tuple[str, ...],
    decode=False,
) -> Result:
    """Read the record of an image. Crowd annotations (`iscrowd`) become difficult objects."""
    if not isinstance(entry.get("file_name"), str):
        return None, [Problem("annotation", f"{where} has no `file_name` in `images`.")]
    size, problems = check_image(image, decode)
    stated = entry.get("width"), entry.get("height")
    if size and all(stated) and stated != size:
        actual = f"{image} has {size[0]} x {size[1]} pixels (after EXIF rotation)"
        problems.append(Problem("size", f"{where} is {stated[0]} x {stated[1]}, but {actual}."))
    labelled = [
        (annotation, f"{where}: annotation {annotation.get('id')}")
        for annotation in annotations
        if size
    ]
    return make_result(
        image, [_read_annotation(*item, categories, classes, size) for item in labelled], problems
    )


def _read_annotation(
    annotation: dict, where: str, categories: dict, classes: tuple, size: tuple
) -> tuple | Problem:
    """Read (box xyxy, label, difficult) of an annotation. COCO counts pixels from 0; its boxes are x, y, width, height."""
    try:
        x, y, width, height = (float(value) for value in annotation["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return Problem(
            "annotation",
            f"{where}: `bbox` is {str(annotation.get('bbox'))[:60]}, not x, y, width, height.",
        )
    number = annotation.get("category_id")
    name = categories.get(number) if isinstance(number, int | str) else None
    if name is None:
        return Problem(
            "class", f"{where}: `category_id` {str(number)[:20]} is not in `categories`."
        )
    if name not in classes:
        return Problem("class", f"{where} has class {name[:40]!r}, which is not in Config.classes.")
    box = clip_box((x, y, x + width, y + height), size)
    if box is None:
        image = f"the image of {size[0]} x {size[1]} pixels"
        return Problem(
            "box",
            f"{where} ({name[:40]}): `bbox` {annotation['bbox']} is empty or outside {image}.",
        )
    return box, classes.index(name), bool(annotation.get("iscrowd"))
