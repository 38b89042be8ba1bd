"""COCO data sets: JSON files with images, annotations and categories."""

import json
from collections import defaultdict
from pathlib import Path

from src.data.records import first_existing

SECTIONS = (b'"images"', b'"annotations"', b'"categories"')
OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_")
# The folder of a file with one of these names is named after the split:
UNNAMED = ("_annotations.coco", "annotations", "labels", "instances", "coco")


class COCOReader:
    """Reader of the COCO files in a folder, or of a single one. Each is read once.

    The split "train2017" is instances_train2017.json, "valid" is valid/labels.json.
    Raises ValueError if a file that names all SECTIONS is not valid.
    """

    def __init__(self, root: str | Path):
        root = Path(root).absolute()
        self.classes = ()
        self.content = {}  # image entry, its annotations and the categories, by annotation
        self.images = defaultdict(list)  # (image, annotation) pairs by split
        paths = [*sorted(root.glob("[!.]*.json")), *sorted(root.glob("[!.]*/[!.]*.json"))]
        for path in [root] if root.is_file() else paths:
            text = b"" if path.name.startswith(OTHER_TASKS) else path.read_bytes()
            if all(section in text for section in SECTIONS):
                try:
                    self._load(path, json.loads(text))
                except Exception as error:  # of many types: a JSON file can contain anything
                    raise ValueError(f"{path} is not a valid COCO file: {error!r}.") from None
        self.splits = list(self.images)

    def _load(self, path: Path, data: dict) -> None:
        names = {item["id"]: item["name"].strip() for item in data["categories"]}
        parents = {item.get("supercategory") for item in data["categories"]} - {"none"}
        own = [  # without Roboflow's parent of all other categories, which has no objects
            item["name"].strip()
            for item in data["categories"]
            if item.get("supercategory") != "none" or item["name"] not in parents
        ]
        self.classes = tuple(dict.fromkeys((*self.classes, *own)))
        objects = defaultdict(list)  # annotations by image
        for item in data["annotations"]:
            objects[item["image_id"]].append(item)
        split = path.parent.name if path.stem in UNNAMED else path.stem.removeprefix("instances_")
        base = path.parent.parent if path.parent.name == "annotations" else path.parent
        folders = (base, base / split, base / "images", base / "images" / split, base / "data")
        for item in data["images"]:
            source = f"{path}: image {item['id']}"
            image = first_existing([folder / item["file_name"] for folder in folders])
            self.images[split].append((image, source))
            self.content[source] = (item, objects[item["id"]], names)

    def list_images(self, split: str) -> list[tuple[Path, str]]:
        """Return (image, annotation) of each image of a split, also without objects."""
        return self.images.get(split, [])

    def read(self, source: str, size: tuple[int, int]) -> tuple[list[tuple], tuple]:
        """Return the objects (class name, box, difficult) of an image, and its stated size.

        COCO counts pixels from 0; its boxes are x, y, width, height. Crowds become difficult
        objects. Raises an exception if an annotation is not valid.
        """
        entry, annotations, names = self.content[source]
        objects = []
        for annotation in annotations:
            x, y, width, height = map(float, annotation["bbox"])
            box = (x, y, x + width, y + height)
            name = names[annotation["category_id"]]
            objects.append((name, box, bool(annotation.get("iscrowd"))))
        return objects, (entry.get("width"), entry.get("height"))
