"""YOLO data sets as ultralytics and Roboflow write them: data.yaml, images and label files."""

from pathlib import Path

import yaml

from src.data.records import first_existing, read_list
from src.serving.images import IMAGE_SUFFIXES


class YOLOReader:
    """Reader of the data.yaml in a folder, or of a YAML file. Raises ValueError if it is not valid.

    Without such a file, the reader has no splits.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        self.path = root if root.suffix in (".yaml", ".yml") else root / "data.yaml"
        try:  # BaseLoader: all values are text, so the class "no" stays "no"
            is_there = self.path.is_file()
            text = self.path.read_text(encoding="utf-8-sig") if is_there else "names: []"
            self.data = yaml.load(text, yaml.BaseLoader)
            names = self.data["names"]
            pairs = enumerate(names) if isinstance(names, list) else names.items()
            self.names = {int(index): name.strip() for index, name in pairs}
        except Exception as error:  # of many types: a YAML file can contain anything
            raise ValueError(
                f"{self.path} is not a YAML file with `names`, a list of class names or a mapping "
                f"from index to name ({error!r})."
            ) from None
        self.classes = tuple(dict.fromkeys(self.names[index] for index in sorted(self.names)))
        self.splits = [name for name in ("train", "val", "test") if self.data.get(name)]

    def list_images(self, split: str) -> list[tuple[Path, Path]]:
        """Return (image, label file) of each image of a split. Raises FileNotFoundError."""
        entry = self.data.get(split) or []
        entries = entry if isinstance(entry, list) else [entry]
        return [
            (image, label_path(image)) for entry in entries for image in self._find_images(entry)
        ]

    def _find_images(self, entry: str) -> list[Path]:
        # of a folder or of a .txt list, also if the data set was moved
        bases = (self.path.parent / self.data.get("path", ""), self.path.parent)
        names = (entry, entry.removeprefix("../"))  # Roboflow writes one ../ too many
        place = first_existing([base / name for name in names for base in bases])
        if place.is_dir():
            return sorted(
                path
                for path in place.rglob("*")
                if path.suffix.lower() in IMAGE_SUFFIXES
                and "/." not in f"/{path.relative_to(place)}"  # ._a.jpg, .ipynb_checkpoints
            )
        return [
            first_existing([base / line for base in (place.parent, *bases)])
            for line in read_list(place)
        ]

    def read(self, path: Path, size: tuple[int, int]) -> tuple[list[tuple], None]:
        """Read a label file: objects (class name, box, difficult). None are in a missing file.

        Raises an exception if the file is not valid.
        """
        lines = read_list(path) if path.exists() else []
        return [self._read_row(line.split(), size) for line in lines], None

    def _read_row(self, row: list[str], size: tuple[int, int]) -> tuple:
        """Read "class cx cy w h", or "class x1 y1 x2 y2 ...", a polygon. Raises ValueError.

        Coordinates are fractions of the image's size.
        """
        index, *values = map(float, row)
        if index not in self.names or len(values) < 4 or len(values) % 2:
            raise ValueError(
                f"{' '.join(row[:7])} is not an index of `names` and cx, cy, w, h or a polygon."
            )
        if len(values) > 4:
            edges = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
        else:
            cx, cy, w, h = values
            edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        box = tuple(edge * length for edge, length in zip(edges, size * 2, strict=True))
        return self.names[index], box, False


def label_path(image: Path) -> Path:
    """Return the label file: in `labels` instead of the last folder `images`, or beside it."""
    head, _, tail = image.absolute().as_posix().rpartition("/images/")
    paths = (Path(f"{head}/labels/{tail}"), image)
    return first_existing([path.with_suffix(".txt") for path in paths])
