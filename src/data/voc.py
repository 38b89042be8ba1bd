"""VOCdevkit trees: reader and download."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from src.config import DATA_ROOT, VOC_CLASSES
from src.data.records import first_existing, read_list
from src.serving.images import IMAGE_SUFFIXES

# First those that are likely:
SUFFIXES = (".jpg", ".JPG", *IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
# Each published archive may have its own VOCdevkit; a hidden folder is an unfinished download:
DEPTHS = ("", "[!.]*/", "[!.]*/*/", "[!.]*/*/*/")
EDGES = ("xmin", "ymin", "xmax", "ymax")
KAGGLE_INPUTS = Path("/kaggle/input")


class VOCReader:
    """Reader of VOCdevkit trees. Splits are "year/name", by the lists in ImageSets/Main."""

    classes = ()  # a tree has no list of its classes

    def __init__(self, root: str | Path):
        self.root = Path(root)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, without lists of single classes such as cat_train.txt."""
        names = [
            f"{path.parents[2].name[3:]}/{path.stem}"
            for path in find_in_trees(self.root, "VOC*/ImageSets/Main/[!.]*.txt")
            if path.stem.rpartition("_")[0] not in VOC_CLASSES
        ]
        return list(dict.fromkeys(names))

    def list_images(self, split: str) -> list[tuple[Path, Path]]:
        """Return (image, annotation) of each image of a split, in the order of its list."""
        year, _, name = split.partition("/")
        for path in find_in_trees(self.root, f"VOC{year}/ImageSets/Main/{name}.txt"):
            return [_find_image(path.parents[2], line) for line in read_list(path)]
        return []

    def read(self, path: Path, size: tuple[int, int]) -> tuple[list[tuple], list[float]]:
        """Read an annotation: objects (class name, box, difficult), and the stated size.

        VOC counts pixels from 1, both ends included. Raises an exception if it is not valid.
        """
        root = ElementTree.parse(path).getroot()
        if root.tag != "annotation":
            raise ValueError(f"the root element is <{root.tag[:40]}>, not <annotation>.")
        objects = []
        for element in root.findall("object"):
            name = element.findtext("name", "").strip()
            edges = [element.findtext(f"bndbox/{edge}", f"no {edge}") for edge in EDGES]
            left, top, right, bottom = map(float, edges)
            is_difficult = float(element.findtext("difficult", "0")) != 0
            objects.append((name, (left - 1, top - 1, right, bottom), is_difficult))
        return objects, [float(root.findtext(f"size/{side}", "0")) for side in ("width", "height")]


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


def download_voc(splits: tuple[str, ...], root: str = DATA_ROOT) -> None:
    """Download the published splits that are missing, through torchvision, with progress.

    Each archive gets a folder of its own, under its name when it is complete.
    Raises RuntimeError if the download fails.
    """
    from torchvision.datasets import VOCDetection

    for split in splits:
        is_published = re.fullmatch(r"(2007|2012)/(train|val|trainval)|2007/test", split)
        if not is_published or split in VOCReader(root).splits:
            continue
        print(f"VOC {split} is not under {root}. Downloading it.")
        year, _, name = split.partition("/")
        unfinished = Path(root, f".VOC{year}-{'test' if name == 'test' else 'trainval'}")
        try:
            VOCDetection(unfinished, year=year, image_set=name, download=True)
            unfinished.rename(unfinished.with_name(unfinished.name[1:]))
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"VOC {split} can't be downloaded into {root} ({error}). Set Config.data_root or "
                'VOC_ROOT to the folder that contains VOCdevkit, or use Config(dataset="shapes").'
            ) from error
