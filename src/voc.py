"""Records read from a VOCdevkit tree, and the tree's download."""

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import numpy as np

PUBLISHED = tuple(f"{year}/{name}" for year in (2007, 2012) for name in ("train", "val", "trainval")) + ("2007/test",)
KAGGLE_INPUTS = Path("/kaggle/input")


class Record(NamedTuple):
    """One picture and its objects."""

    image: str | np.ndarray  # a path, or uint8 [H, W, 3] RGB
    boxes: np.ndarray  # float32 [n, 4] xyxy in pixels, left and top counted from 0
    labels: np.ndarray  # int64 [n]
    difficult: np.ndarray  # bool [n]: hard to see; neither counted nor punished by VOC's average precision


def make_record(image: str | np.ndarray, boxes: list, labels: list, difficult: list) -> Record:
    """A record of the right types, whatever the number of objects."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return Record(image, boxes, np.asarray(labels, dtype=np.int64), np.asarray(difficult, dtype=bool))


def read_annotation(path: Path, classes: tuple[str, ...]) -> tuple[list, list, list]:
    """Boxes, labels and difficult flags of one annotation file; VOC counts pixels from 1, both ends included.

    Raises ValueError that names the file and the field.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, but its split lists it; download the tree again") from None
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError(f"{path}: DOCTYPE and entities have no place in a VOC annotation; remove them")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is not an XML annotation: {error}") from None
    boxes, labels, difficult = [], [], []
    for number, item in enumerate(root.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        if name not in classes:
            raise ValueError(f"{path}: object {number} is a {name!r}, which is not in Config.classes {classes}")
        labels.append(classes.index(name))
        boxes.append(_read_box(item.find("bndbox"), f"{path}: object {number} ({name})"))
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    return boxes, labels, difficult


def _read_box(box: ElementTree.Element | None, where: str) -> tuple[float, ...]:
    """(left, top, right, bottom) from 0. Raises ValueError that says where and which field."""
    if box is None:
        raise ValueError(f"{where} has no <bndbox>; give it one, or remove the object")
    sides = []
    for field in ("xmin", "ymin", "xmax", "ymax"):
        text = box.findtext(field)
        try:
            sides.append(float(text))
        except (TypeError, ValueError):
            raise ValueError(f"{where}: <{field}> is {text!r}, not a number of pixels") from None
    left, top, right, bottom = sides[0] - 1, sides[1] - 1, sides[2], sides[3]
    if not (0 <= left < right < 1e6 and 0 <= top < bottom < 1e6):
        raise ValueError(f"{where}: box xmin, ymin, xmax, ymax = {sides} is empty or lies outside the picture")
    return left, top, right, bottom


def split_folder(root: str | Path, split: str) -> Path:
    """The folder VOC2007 or VOC2012 that lists a "year/split": under `root`, or among Kaggle's inputs.

    The published archives may lie side by side, each with its own VOCdevkit, up to three folders down.
    """
    year, _, name = split.partition("/")
    for place in (Path(root), KAGGLE_INPUTS):
        for depth in ("", "*/", "*/*/", "*/*/*/"):
            for listed in sorted(place.glob(f"{depth}VOCdevkit/VOC{year}/ImageSets/Main/{name}.txt")):
                return listed.parents[2]
    return Path(root) / "VOCdevkit" / f"VOC{year}"


def read_voc(root: str | Path, splits: tuple[str, ...], classes: tuple[str, ...]) -> list[Record]:
    """Records of the listed splits, each "year/split" such as "2007/trainval", in the order of their lists.

    root: the folder that holds VOCdevkit. Raises FileNotFoundError where a list, an annotation or a photograph
    is missing and ValueError where an annotation is wrong; both name the file and the way out.
    """
    records = []
    for split in splits:
        folder = split_folder(root, split)
        listed = folder / "ImageSets" / "Main" / f"{split.partition('/')[2]}.txt"
        if not listed.exists():
            raise FileNotFoundError(
                f"{listed} is missing. Set Config.voc_root or the environment variable VOC_ROOT to the folder that "
                'holds VOCdevkit, or use Config(data="shapes"), which needs no download'
            )
        images = set(os.listdir(folder / "JPEGImages"))
        for line in listed.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            stem = line.split()[0]
            if f"{stem}.jpg" not in images:
                raise FileNotFoundError(f"{folder / 'JPEGImages' / stem}.jpg is missing, but {listed} lists it")
            annotation = read_annotation(folder / "Annotations" / f"{stem}.xml", classes)
            records.append(make_record(str(folder / "JPEGImages" / f"{stem}.jpg"), *annotation))
    if not records:
        raise ValueError(f"the splits {splits} under {root} list no picture")
    return records


def download_voc(root: str | Path, splits: tuple[str, ...]) -> None:
    """Fetch, through torchvision and with progress, those published splits whose lists are not there.

    Raises RuntimeError that names the folder where the server can't be reached.
    """
    from torchvision.datasets import VOCDetection

    for split in splits:
        year, _, name = split.partition("/")
        if split not in PUBLISHED or (split_folder(root, split) / "ImageSets" / "Main" / f"{name}.txt").exists():
            continue
        print(f"VOC {split} is not under {root}: downloading it")
        try:
            VOCDetection(root, year=year, image_set=name, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"VOC {split} is not under {Path(root).resolve()} and can't be downloaded ({error}). Set Config.voc_root "
                'or VOC_ROOT to the folder that holds VOCdevkit, or use Config(data="shapes")'
            ) from error
