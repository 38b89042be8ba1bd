"""COCO data sets: JSON files with images, annotations and categories."""

import json
from collections import defaultdict
from pathlib import Path

from src.data.records import first_existing, to_number

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
        self.images = {}  # (image, annotation) pairs by split
        paths = [*sorted(root.glob("[!.]*.json")), *sorted(root.glob("[!.]*/[!.]*.json"))]
        for path in [root] if root.is_file() else paths:
            text = b"" if path.name.startswith(OTHER_TASKS) else path.read_bytes()
            if all(section in text for section in SECTIONS):
                split = path.parent.name if path.stem in UNNAMED else path.stem
                self._load(path, text, split.removeprefix("instances_"))
        self.splits = list(self.images)

    def _load(self, path: Path, text: bytes, split: str) -> None:
        try:
            data = json.loads(text)
            names = {str(item["id"]): item["name"].strip() for item in data["categories"]}
            # Roboflow's parent of all other categories has no objects.
            parents = {item.get("supercategory") for item in data["categories"]} - {"none"}
            own = [
                item["name"].strip()
                for item in data["categories"]
                if item.get("supercategory") != "none" or item["name"] not in parents
            ]
            images = {str(item["id"]): item for item in data["images"]}
            if len(images) < len(data["images"]):
                raise ValueError("an id of `images` is there twice")
            objects = defaultdict(list)  # annotations by image
            for item in data["annotations"]:
                objects[str(item["image_id"])].append(item)
            files = {number: str(item["file_name"]) for number, item in images.items()}
        except Exception as error:  # of many types: a JSON file can contain anything
            raise ValueError(f"{path} is not a valid COCO file: {error!r}.") from None
        self.classes = tuple(dict.fromkeys((*self.classes, *own)))
        base = path.parent.parent if path.parent.name == "annotations" else path.parent
        folders = (base, base / split, base / "images", base / "images" / split, base / "data")
        self.images[split] = []
        for number, file in files.items():
            source = f"{path}: image {number}"
            image = first_existing([folder / file for folder in folders])
            self.images[split].append((image, source))
            self.content[source] = (images[number], objects[number], names)

    def list_images(self, split: str) -> list[tuple[Path, str]]:
        """Return (image, annotation) of each image of a split, also without objects."""
        return self.images.get(split, [])

    def read(self, source: str, size: tuple[int, int]) -> tuple[list[tuple], tuple]:
        """Return the objects (class name, box, difficult) of an image, and its stated size.

        COCO counts pixels from 0; its boxes are x, y, width, height. Crowds become difficult
        objects. Raises ValueError if an annotation is not valid.
        """
        entry, annotations, names = self.content[source]
        objects = []
        for annotation in annotations:
            category = str(annotation.get("category_id"))
            values = annotation.get("bbox")
            if category not in names or not isinstance(values, list) or len(values) != 4:
                raise ValueError(
                    f"`bbox` is {str(values)[:60]}, not x, y, width, height, or "
                    f"`category_id` {category[:20]} is not in `categories`."
                )
            x, y, width, height = (to_number(value, "`bbox`") for value in values)
            box = (x, y, x + width, y + height)
            objects.append((names[category], box, bool(annotation.get("iscrowd"))))
        return objects, (entry.get("width"), entry.get("height"))
