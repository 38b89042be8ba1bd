"""VOCdevkit trees: annotations, splits, download."""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.config import DATA_ROOT, VOC_CLASSES
from src.data.coco import has_sections
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

UNKNOWN_SIZE = (1e6, 1e6)  # pixels; stands in for the size of an image that can't be read
SUFFIXES = (
    ".jpg",
    ".JPG",
    *IMAGE_SUFFIXES,
    *map(str.upper, IMAGE_SUFFIXES),
)  # first those that are likely
PUBLISHED_SPLITS = tuple(
    f"{year}/{name}" for year in (2007, 2012) for name in ("train", "val", "trainval")
) + ("2007/test",)
DEPTHS = ("", "*/", "*/*/", "*/*/*/")  # each published archive may have its own VOCdevkit
KAGGLE_INPUTS = Path("/kaggle/input")
KAGGLE_DEPTHS = tuple(
    "*/" * depth for depth in range(1, 7)
)  # datasets/OWNER/NAME/ANY/VOCdevkit/, or NAME/ without VOCdevkit


class _NoDoctype(ElementTree.TreeBuilder):
    """Tree builder that refuses a DOCTYPE, and with it all entities, in any encoding."""

    def doctype(self, *_) -> None:
        raise ValueError("A DOCTYPE is not allowed. Remove it.")


def read_annotation(
    path: Path, classes: tuple[str, ...], size: tuple[float, float] = UNKNOWN_SIZE
) -> list[tuple | Problem]:
    """Read an annotation: a tuple (box xyxy, label, difficult) or a problem per object, and other problems. Does not raise.

    VOC counts pixels from 1, both ends included; the boxes returned count from 0, with right and bottom exclusive.
    size: the image's (width, height).
    """
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except FileNotFoundError:
        return [Problem("missing file", f"{path} is missing, but its split lists it.")]
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        return [Problem("annotation", f"{path} is not an XML annotation: {error}")]
    if root.tag != "annotation":
        return [
            Problem(
                "annotation", f"{path}: the root element is <{root.tag[:40]}>, not <annotation>."
            )
        ]
    items = enumerate(root.findall("object"), start=1)
    objects = [
        _read_object(item, classes, size, f"{path}: object {number}") for number, item in items
    ]
    return [*_check_size(root, size, str(path)), *objects]


def _check_size(root: ElementTree.Element, size: tuple, where: str) -> list[Problem]:
    """Compare <size>, if there is one, with the image. Tools write 0 if they don't know it."""
    if root.find("size") is None:
        return []
    try:
        stated = tuple(_number(root, f"size/{name}", where) for name in ("width", "height"))
    except ValueError as error:
        return [Problem("annotation", str(error))]
    if min(stated) <= 0 or size in (stated, UNKNOWN_SIZE):
        return []
    actual = f"the image has {size[0]} x {size[1]} pixels (after EXIF rotation)"
    return [Problem("size", f"{where}: <size> is {stated[0]:g} x {stated[1]:g}, but {actual}.")]


def _read_object(
    item: ElementTree.Element, classes: tuple, size: tuple, where: str
) -> tuple | Problem:
    """Return (box, label, difficult) of an <object>, or its first problem."""
    try:
        name = _text(item, "name", where).strip()
        if name not in classes:
            return Problem(
                "class", f"{where} has class {name[:40]!r}, which is not in Config.classes."
            )
        where = f"{where} ({name[:40]})"
        difficult = (
            "0" if item.find("difficult") is None else _text(item, "difficult", where).strip()
        )
        if difficult not in ("0", "1"):
            raise ValueError(f"{where}: <difficult> is {difficult[:40]!r}, not 0 or 1.")
        _text(item, "bndbox", where)
        edges = [
            _number(item, f"bndbox/{edge}", where) for edge in ("xmin", "ymin", "xmax", "ymax")
        ]
    except ValueError as error:
        return Problem("annotation", str(error))
    box = clip_box((edges[0] - 1, edges[1] - 1, *edges[2:]), size, min_side=1)
    if box is None:
        image = (
            "the image" if size == UNKNOWN_SIZE else f"the image of {size[0]} x {size[1]} pixels"
        )
        return Problem(
            "box", f"{where}: box xmin, ymin, xmax, ymax = {edges} is empty or outside {image}."
        )
    return box, classes.index(name), difficult == "1"


def _text(parent: ElementTree.Element, field: str, where: str) -> str:
    """Return the text of the element `field`. Raises ValueError if there is not exactly one."""
    elements = parent.findall(field)
    if len(elements) != 1:
        raise ValueError(f"{where} has {len(elements) or 'no'} <{field}>, but needs exactly one.")
    return elements[0].text or ""


def _number(parent: ElementTree.Element, field: str, where: str) -> float:
    """Return the number in the element `field`. Raises ValueError if there is none."""
    text = _text(parent, field, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"{where}: <{field}> is {text[:40]!r}, not a number of pixels.")
    return value


def read_image_record(
    folder: Path, stem: str, classes: tuple[str, ...], decode: bool = False
) -> Result:
    """Read the record of an image in a folder VOC2007 or VOC2012. decode: see `check_image`."""
    candidates = (folder / "JPEGImages" / f"{stem}{suffix}" for suffix in SUFFIXES)
    image = next(
        (path for path in candidates if path.exists()), folder / "JPEGImages" / f"{stem}.jpg"
    )
    size, problems = check_image(image, decode)
    objects = read_annotation(folder / "Annotations" / f"{stem}.xml", classes, size or UNKNOWN_SIZE)
    return make_result(image, objects, problems)


def find_in_trees(root: str | Path, pattern: str) -> Iterator[Path]:
    """Find files of VOCdevkit trees under `root` (up to three folders down), or of VOC... folders among Kaggle's inputs."""
    for depth in DEPTHS:
        yield from sorted(Path(root).glob(f"{depth}VOCdevkit/{pattern}"))
    for depth in KAGGLE_DEPTHS:
        yield from sorted(KAGGLE_INPUTS.glob(f"{depth}{pattern}"))


def has_tree(root: str | Path) -> bool:
    """Return whether there is a VOCdevkit with a folder VOC... under `root`, up to three folders down."""
    return any(next(Path(root).glob(f"{depth}VOCdevkit/VOC*"), None) for depth in DEPTHS)


def class_names(root: str | Path) -> tuple[str, ...]:
    """Return VOC's classes; a tree has no list of its own."""
    return VOC_CLASSES


def list_splits(root: str | Path) -> list[str]:
    """Return each list of the trees once, as "year/name", or "year/*" (all annotations) if there are no lists."""
    lists = [
        f"{path.parents[2].name[3:]}/{path.stem}"
        for path in find_in_trees(root, "VOC*/ImageSets/Main/*.txt")
    ]
    return list(
        dict.fromkeys(
            lists
            or [f"{path.parent.name[3:]}/*" for path in find_in_trees(root, "VOC*/Annotations")]
        )
    )


def split_folder(root: str | Path, split: str) -> Path:
    """Return the folder VOC2007 or VOC2012 that has the list of a split "year/name"."""
    year, _, name = split.partition("/")
    pattern, level = ("Annotations", 0) if name == "*" else (f"ImageSets/Main/{name}.txt", 2)
    for path in find_in_trees(root, f"VOC{year}/{pattern}"):
        return path.parents[level]
    return Path(root) / "VOCdevkit" / f"VOC{year}"


def list_images(root: str | Path, splits: Iterable[str]) -> list[tuple[Path, str]]:
    """Return (folder VOC2007 or VOC2012, file name without suffix) of each image, in the order of the lists.

    Raises FileNotFoundError if a list is missing, ValueError if it is not a text file or if the lists are empty.
    """
    images = []
    for split in splits:
        folder = split_folder(root, split)
        if split.endswith("/*"):
            images += [
                (folder, path.stem) for path in sorted((folder / "Annotations").glob("[!.]*.xml"))
            ]
            continue
        path = folder / "ImageSets" / "Main" / f"{split.partition('/')[2]}.txt"
        if not path.exists():
            others = ", ".join(
                split for split in list_splits(root) if "_" not in split
            )  # without lists of single classes
            raise FileNotFoundError(
                f"{path} is missing. "
                + (
                    f"There are {others}: set Config.train_splits and Config.val_splits to some of them. "
                    if others
                    else ""
                )
                + "Set Config.data_root (or, before Python starts, the environment variable VOC_ROOT) to the folder that "
                'contains VOCdevkit, data.yaml or COCO files, or use Config(dataset="shapes"), which needs no download.'
            )
        images += [(folder, _image_name(folder, line)) for line in read_list(path)]
    if not images:
        raise ValueError(f"The splits {tuple(splits)} under {root} list no images.")
    return images


def _image_name(folder: Path, line: str) -> str:
    """Return the file name in a line of a list. In the lists of single classes -1, 0 or 1 follows it."""
    flagged = re.fullmatch(r"(.*\S)\s+-?[01]", line)
    return flagged[1] if flagged and not (folder / "Annotations" / f"{line}.xml").exists() else line


def check_download_folder(root: Path) -> None:
    """Raise FileNotFoundError if `root`, unless it is the default, is missing or has another data set (two folders down)."""
    if root == Path(DATA_ROOT):
        return
    if not root.exists():
        raise FileNotFoundError(
            f"The folder {root.resolve()} does not exist. Correct Config.data_root or VOC_ROOT if it is mistyped. "
            "To download VOC (2.9 GB) into this folder, create it."
        )
    files = (
        path for depth in DEPTHS[:3] for path in sorted(root.glob(f"{depth}*")) if path.is_file()
    )
    for path in (path for path in files if not is_hidden(path, root)):
        is_yolo = path.suffix in (".yaml", ".yml") and re.search(
            rb"^names\s*:", path.read_bytes(), re.MULTILINE
        )
        if is_yolo or (path.suffix == ".json" and has_sections(path)):
            raise FileNotFoundError(
                f"{root} has no VOCdevkit, but {path}. For a YOLO data set, set Config.data_root to its YAML file; for a COCO "
                "data set, to the folder of its JSON files. To download VOC (2.9 GB), set it to another folder."
            )


def download_voc(root: str | Path, splits: tuple[str, ...]) -> None:
    """Download the published splits that are missing, through torchvision, with progress.

    An archive is not unpacked over a folder that has one of its lists: the folder may hold the user's own data.
    Raises FileNotFoundError as `check_download_folder`, RuntimeError if the download fails.
    """
    from torchvision.datasets import VOCDetection

    for split in splits:
        year, _, name = split.partition("/")
        archive = ("test",) if name == "test" else ("train", "val", "trainval")
        folder = split_folder(root, split) / "ImageSets" / "Main"
        marker = (
            Path(root) / f".{year}-{archive[-1]}.incomplete"
        )  # an unpacking that was interrupted is repeated
        lists = [folder / f"{other}.txt" for other in archive]
        if split not in PUBLISHED_SPLITS or (
            any(path.exists() for path in lists) and not marker.exists()
        ):
            continue
        check_download_folder(Path(root))
        print(f"VOC {split} is not under {root}, or not complete. Downloading it.")
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            VOCDetection(root, year=year, image_set=name, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            if marker.exists() and not any(path.exists() for path in lists):
                marker.unlink()
            raise RuntimeError(
                f"VOC {split} is not under {Path(root).resolve()} and can't be downloaded ({error}). Set Config.data_root or "
                'VOC_ROOT to the folder that contains VOCdevkit, or use Config(dataset="shapes").'
            ) from error
        marker.unlink()
