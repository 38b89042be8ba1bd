"""VOCdevkit trees: reader and download."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from src.config import DATA_ROOT, VOC_CLASSES
from src.data.records import first_existing, read_list, to_number
from src.serving.images import IMAGE_SUFFIXES

# First those that are likely:
SUFFIXES = (".jpg", ".JPG", *IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
# Each published archive may have its own VOCdevkit; a hidden folder is an unfinished download:
DEPTHS = ("", "[!.]*/", "[!.]*/*/", "[!.]*/*/*/")
KAGGLE_INPUTS = Path("/kaggle/input")
PUBLISHED = re.compile(r"(2007|2012)/(train|val|trainval)|2007/test")


class VOCReader:
    """Reader of VOCdevkit trees. Splits are "year/name", and "year/*" without any list."""

    format = "voc"
    classes = ()  # a tree has no list of its classes

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, without lists of single classes such as cat_train.txt."""
        lists = [
            f"{path.parents[2].name[3:]}/{path.stem}"
            for path in find_in_trees(self.root, "VOC*/ImageSets/Main/[!.]*.txt")
            if path.stem.rpartition("_")[0] not in VOC_CLASSES
        ]
        folders = find_in_trees(self.root, "VOC*/Annotations")
        return list(dict.fromkeys(lists or [f"{path.parent.name[3:]}/*" for path in folders]))

    def list_images(self, split: str) -> list[tuple[Path, Path]]:
        """Return (image, annotation) of each image of a split, in the order of its list."""
        year, _, name = split.partition("/")
        if name == "*":
            files = find_in_trees(self.root, f"VOC{year}/Annotations/[!.]*.xml")
            return [_find_image(path.parents[1], path.stem) for path in files]
        for path in find_in_trees(self.root, f"VOC{year}/ImageSets/Main/{name}.txt"):
            return [_find_image(path.parents[2], line) for line in read_list(path)]
        return []

    def read(self, path: Path, size: tuple[int, int]) -> tuple[list[tuple], list[float] | None]:
        """Read an annotation: objects (class name, box, difficult), and the stated size.

        VOC counts pixels from 1, both ends included. Raises an exception if it is not valid.
        """
        parser = ElementTree.XMLParser(target=_NoDoctype())
        root = ElementTree.fromstring(path.read_bytes(), parser)
        if root.tag != "annotation":
            raise ValueError(f"the root element is <{root.tag[:40]}>, not <annotation>.")
        objects = []
        for number, element in enumerate(root.findall("object"), start=1):
            where = f"object {number}"
            name = _text(element, "name", where)
            has_flag = element.find("difficult") is not None
            flag = _text(element, "difficult", where) if has_flag else "0"
            if not name or flag not in ("0", "1"):
                fields = f"<name> is {name[:40]!r} and <difficult> {flag[:40]!r}"
                raise ValueError(f"{where}: {fields}, not a name and 0 or 1.")
            edges = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
            left, top, right, bottom = _numbers(element, edges, where)
            objects.append((name, (left - 1, top - 1, right, bottom), flag == "1"))
        has_size = root.find("size") is not None
        return objects, _numbers(root, ("size/width", "size/height"), "it") if has_size else None


class _NoDoctype(ElementTree.TreeBuilder):
    """Tree builder that refuses a DOCTYPE, and with it all entities, in any encoding."""

    def doctype(self, *_) -> None:
        raise ValueError("A DOCTYPE is not allowed. Remove it.")


def _text(parent: ElementTree.Element, field: str, where: str) -> str:
    """Return the text of the element `field`. Raises ValueError if there is not exactly one."""
    elements = parent.findall(field)
    if len(elements) != 1:
        raise ValueError(f"{where} has {len(elements) or 'no'} <{field}>, but needs exactly one.")
    return (elements[0].text or "").strip()


def _numbers(parent: ElementTree.Element, fields: tuple[str, ...], where: str) -> list[float]:
    return [to_number(_text(parent, field, where), f"{where}: <{field}>") for field in fields]


def _find_image(folder: Path, line: str) -> tuple[Path, Path]:
    """Return the image and the annotation of a line of a list, in a folder VOC2007 or VOC2012.

    In lists of single classes -1, 0 or 1 follows the name.
    """
    flagged = re.fullmatch(r"(.*\S)\s+-?[01]", line)
    if flagged and not (folder / "Annotations" / f"{line}.xml").exists():
        line = flagged[1]
    images = [folder / "JPEGImages" / f"{line}{suffix}" for suffix in SUFFIXES]
    return first_existing(images), folder / "Annotations" / f"{line}.xml"


def find_in_trees(root: Path, pattern: str) -> Iterator[Path]:
    """Find files of VOCdevkit trees under `root`; the default stands for Kaggle's inputs, too."""
    places = [(root, f"{depth}VOCdevkit/") for depth in DEPTHS]
    if root == Path(DATA_ROOT):  # NAME/VOC2007 to datasets/OWNER/NAME/ANY/VOCdevkit/VOC2007
        places += [(KAGGLE_INPUTS, "*/" * depth) for depth in range(1, 7)]
    for folder, depth in places:
        yield from sorted(folder.glob(f"{depth}{pattern}"))


def download_voc(root: str | Path, splits: tuple[str, ...]) -> None:
    """Download the published splits that are missing, through torchvision, with progress.

    Each archive gets a folder of its own, under its name when it is complete. A year of which
    another list is there is left alone. Raises FileNotFoundError if `root` is missing or has other
    data, unless it is the default; RuntimeError if the download fails.
    """
    from torchvision.datasets import VOCDetection

    root = Path(root)
    for split in splits:
        year, _, name = split.partition("/")
        archive = {"test"} if name == "test" else {"train", "val", "trainval"}
        lists = find_in_trees(root, f"VOC{year}/ImageSets/Main/*.txt")
        if not PUBLISHED.fullmatch(split) or not archive.isdisjoint(path.stem for path in lists):
            continue
        other_data = [p.name for p in root.glob("*") if not p.name.startswith((".", "VOC"))]
        if root != Path(DATA_ROOT) and (other_data or not root.exists()):
            raise FileNotFoundError(
                f"VOC {split} is not under {root.resolve()}, which is missing or has other data: "
                f"{other_data[:3]}. Its VOC splits are {VOCReader(root).splits}: set Config."
                "train_splits and val_splits to some of them, or Config.data_root or VOC_ROOT to "
                "the folder that contains VOCdevkit, data.yaml or COCO files, or to the YAML file "
                "of a YOLO data set. To download VOC (2.9 GB), set it to an empty folder."
            )
        print(f"VOC {split} is not under {root}. Downloading it.")
        folder = root / f"VOC{year}-{'test' if name == 'test' else 'trainval'}"
        unfinished = root / f".{folder.name}"
        try:
            VOCDetection(unfinished, year=year, image_set=name, download=True)
            unfinished.rename(folder)
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"VOC {split} can't be downloaded into {root.resolve()} ({error}). Set Config."
                "data_root or VOC_ROOT to the folder that contains VOCdevkit, or use "
                'Config(dataset="shapes").'
            ) from error
