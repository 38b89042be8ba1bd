"""YOLO data sets as ultralytics and Roboflow write them: data.yaml, images and label files."""

from pathlib import Path

import yaml

from src.data.records import first_existing, is_hidden, read_list, to_number
from src.serving.images import IMAGE_SUFFIXES

YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")


class YOLOReader:
    """Reader of the data.yaml in a folder, or of a YAML file. Raises ValueError if it is not valid.

    Without such a file, the reader has no splits.
    """

    format = "yolo"
    classes = ()
    splits = ()

    def __init__(self, root: str | Path):
        paths = [Path(root), *(Path(root) / name for name in YAML_NAMES)]
        files = [path for path in paths if path.suffix in (".yaml", ".yml") and path.is_file()]
        if files:
            self._load(files[0])

    def _load(self, path: Path) -> None:
        try:  # BaseLoader: all values are text, so the class "no" stays "no"
            data = yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
            names = data["names"]
            pairs = enumerate(names) if isinstance(names, list) else names.items()
            self.names = {int(index): name.strip() for index, name in pairs}
        except Exception as error:  # of many types: a YAML file can contain anything
            text = " ".join(str(error).split())
            raise ValueError(
                f"{path} is not a YAML file with `names`, a list of class names or a mapping from "
                f"index to name ({type(error).__name__}: {text})."
            ) from None
        if data.get("nc", str(len(names))) != str(len(names)):
            raise ValueError(
                f"{path}: `nc` is {data['nc']}, but `names` has {len(names)} classes. "
                "Correct one of them."
            )
        if "kpt_shape" in data:
            raise ValueError(
                f"{path} has `kpt_shape`: keypoint labels are not supported. Export the data set "
                "for detection."
            )
        self.path = path
        self.data = data
        self.classes = tuple(dict.fromkeys(self.names[index] for index in sorted(self.names)))
        empty = (None, "", [], "null", "~")
        self.splits = [name for name in ("train", "val", "test") if data.get(name) not in empty]

    def list_images(self, split: str) -> list[tuple[Path, Path]]:
        """Return (image, label file) of each image of a split. Raises FileNotFoundError."""
        entry = self.data[split] if split in self.splits else []
        entries = entry if isinstance(entry, list) else [entry]
        images = [image for entry in entries for image in self._find_images(str(entry))]
        return [(image, label_path(image)) for image in images]

    def _find_images(self, entry: str) -> list[Path]:
        """Return the images of a folder, or of a .txt list, also if the data set was moved."""
        bases = (self.path.parent / str(self.data.get("path", "")), self.path.parent)
        names = (entry, entry.removeprefix("../"))  # Roboflow writes one ../ too many
        place = first_existing([base / name for name in names for base in bases])
        if not place.exists():
            raise FileNotFoundError(f"{self.path} names {entry}, but {place} is missing.")
        if place.is_dir():
            files = (path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            return sorted(path for path in files if not is_hidden(path, place))
        bases = (place.parent, *bases)
        return [first_existing([base / line for base in bases]) for line in read_list(place)]

    def read(self, path: Path, size: tuple[int, int]) -> tuple[list[tuple], None]:
        """Read a label file: objects (class name, box, difficult). None are in a missing file.

        Raises an exception if the file is not valid.
        """
        lines = path.read_text(encoding="utf-8-sig").split("\n") if path.exists() else []
        rows = [(line.split(), number) for number, line in enumerate(lines, 1) if line.strip()]
        return [self._read_line(fields, f"line {number}", size) for fields, number in rows], None

    def _read_line(self, fields: list[str], where: str, size: tuple[int, int]) -> tuple:
        """Read "class cx cy w h", or "class x1 y1 x2 y2 ...", a polygon. Raises ValueError.

        Coordinates are fractions of the image's size.
        """
        is_polygon = len(fields) >= 7 and len(fields) % 2 == 1
        if len(fields) != 5 and not is_polygon:
            raise ValueError(
                f"{where} has {len(fields)} values, not class, cx, cy, w, h or a polygon."
            )
        index, *values = (to_number(field, f"{where}: a value") for field in fields)
        if index not in self.names:
            raise ValueError(f"{where} has class {fields[0][:20]}, which is no index of `names`.")
        if is_polygon:
            xs, ys = values[::2], values[1::2]
            edges = (min(xs), min(ys), max(xs), max(ys))
        else:
            cx, cy, w, h = values
            edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        box = tuple(edge * length for edge, length in zip(edges, size * 2, strict=True))
        return self.names[index], box, False


def label_path(image: Path) -> Path:
    """Return the label file: in `labels` instead of the last folder `images`, or beside it."""
    head, _, tail = image.as_posix().rpartition("/images/")
    labels = [Path(head, "labels", tail)] if head else []
    return first_existing([path.with_suffix(".txt") for path in (*labels, image)])
