"""VOCdevkit trees: reader and download."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.config import DATA_ROOT, VOC_CLASSES
from src.data.records import first_existing, read_list, to_number
from src.serving.images import IMAGE_SUFFIXES

# First those that are likely:
SUFFIXES = (".jpg", ".JPG", *IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
# Each published archive may have its own VOCdevkit; a hidden folder is an unfinished download:
DEPTHS = ("", "[!.]*/", "[!.]*/*/", "[!.]*/*/*/")
EDGES = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
KAGGLE_INPUTS = Path("/kaggle/input")


class VOCReader:
    """Reader of VOCdevkit trees. Splits are "year/name", and "year/*" without any list."""

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
        text = path.read_bytes()
        if b"<!DOCTYPE" in text.replace(b"\0", b""):  # its entities can be endless
            raise ValueError("a DOCTYPE is not allowed. Remove it.")
        root = ElementTree.fromstring(text)
        if root.tag != "annotation":
            raise ValueError(f"the root element is <{root.tag[:40]}>, not <annotation>.")
        objects = []
        for number, element in enumerate(root.findall("object"), start=1):
            where = f"object {number}"
            name = _text(element, "name", where)
            left, top, right, bottom = _numbers(element, EDGES, where)
            has_flag = element.find("difficult") is not None
            difficult = has_flag and _numbers(element, ["difficult"], where) != [0]
            objects.append((name, (left - 1, top - 1, right, bottom), difficult))
        sizes = [_numbers(item, ("width", "height"), "its size") for item in root.findall("size")]
        return objects, sizes[0] if sizes else None


def _text(parent: ElementTree.Element, field: str, where: str) -> str:
    texts = [(element.text or "").strip() for element in parent.findall(field)]
    if len(texts) != 1 or not texts[0]:
        raise ValueError(f"{where} has {len(texts)} <{field}>, but needs exactly one with a value.")
    return texts[0]


def _numbers(parent: ElementTree.Element, fields: Iterable[str], where: str) -> list[float]:
    return [to_number(_text(parent, field, where), f"{where}: <{field}>") for field in fields]


def _find_image(folder: Path, name: str) -> tuple[Path, Path]:
    images = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in SUFFIXES]
    return first_existing(images), folder / "Annotations" / f"{name}.xml"


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
        published = re.fullmatch(r"(2007|2012)/(train|val|trainval)|2007/test", split)
        if not published or not archive.isdisjoint(path.stem for path in lists):
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
        unfinished = root / f".VOC{year}-{'test' if name == 'test' else 'trainval'}"
        try:
            VOCDetection(unfinished, year=year, image_set=name, download=True)
            unfinished.rename(root / unfinished.name[1:])
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"VOC {split} can't be downloaded into {root.resolve()} ({error}). Set Config."
                "data_root or VOC_ROOT to the folder that contains VOCdevkit, or use "
                'Config(dataset="shapes").'
            ) from error
