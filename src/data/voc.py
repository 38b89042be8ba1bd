"""One annotation file: its objects, and everything that is wrong with it."""

import argparse
import math
import shlex
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from src.config import VOC_CLASSES
from src.data.records import ImageRecord, Problem, make_record, read_size

SLACK = 1.0  # pixels that a box may stick out of its picture, and is cut: tools count from 0 or from 1
LARGEST = 1e6  # pixels


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses entities before the first is read, in whatever encoding they come."""

    def doctype(self, *_) -> None:
        raise ValueError("DOCTYPE and entities have no place in it; remove them")


def read_annotation(
    path: Path, classes: tuple[str, ...], size: tuple[float, float] = (LARGEST, LARGEST)
) -> tuple[list[tuple], list[Problem]]:
    """The objects, each (box xyxy, label, difficult), and the problems; use the objects only where there is none.

    VOC counts pixels from 1, both ends included; boxes come back counted from 0, right and bottom edge behind the
    pixel. size: the picture's (width, height), if it can be read. Raises nothing.
    """
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except FileNotFoundError:
        return [], [Problem("missing file", f"{path} is missing, but its split lists it")]
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
        return [], [Problem("annotation", f"{path} is not an XML annotation: {error}")]
    if root.tag != "annotation":
        return [], [Problem("annotation", f"{path}: the outermost element is <{root.tag[:40]}>, not <annotation>")]
    problems: list[Problem] = []
    if root.find("size") is not None:
        _check_size(root, size, str(path), problems)
    items = enumerate(root.findall("object"), start=1)
    return [_read_object(item, classes, size, f"{path}: object {number}", problems) for number, item in items], problems


def _check_size(root: ElementTree.Element, size: tuple, where: str, problems: list[Problem]) -> None:
    """Whether <size> is the picture's; tools write 0 where they don't know it."""
    said = tuple(_number(root, f"size/{side}", where, problems) for side in ("width", "height"))
    if min(said) > 0 and said != size and size != (LARGEST, LARGEST):
        seen = f"the picture has {size[0]} x {size[1]} pixels (turned upright, if its EXIF data say so)"
        problems.append(Problem("size", f"{where}: <size> is {said[0]:g} x {said[1]:g}, but {seen}"))


def _read_object(item: ElementTree.Element, classes: tuple, size: tuple, where: str, problems: list[Problem]) -> tuple:
    """(box, label, difficult) of an <object>, or nothing and another problem."""
    known = len(problems)
    name = _text(item, "name", where, problems).strip()
    if len(problems) == known and name not in classes:
        problems.append(Problem("class", f"{where} is a {name[:40]!r}, which is not in Config.classes"))
    where = f"{where} ({name[:40]})"
    difficult = "0" if item.find("difficult") is None else _text(item, "difficult", where, problems).strip()
    if difficult not in ("0", "1"):
        problems.append(Problem("annotation", f"{where}: <difficult> is {difficult[:40]!r}, not 0 or 1"))
    sides = [math.nan] * 4
    if item.find("bndbox") is None:
        _text(item, "bndbox", where, problems)
    else:
        sides = [_number(item, f"bndbox/{side}", where, problems) for side in ("xmin", "ymin", "xmax", "ymax")]
    (left, top), (right, bottom) = (v - 1 for v in sides[:2]), sides[2:]
    box = max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1])
    inside = min(left, top) >= -SLACK and right <= size[0] + SLACK and bottom <= size[1] + SLACK
    if not any(map(math.isnan, sides)) and not (inside and box[2] - box[0] >= 1 and box[3] - box[1] >= 1):
        picture = "the picture" if size == (LARGEST, LARGEST) else f"the picture of {size[0]} x {size[1]} pixels"
        text = f"box xmin, ymin, xmax, ymax = {sides} is empty or lies outside {picture}"
        problems.append(Problem("box", f"{where}: {text}"))
    return () if len(problems) > known else (box, classes.index(name), difficult == "1")


def _text(parent: ElementTree.Element, field: str, where: str, problems: list[Problem]) -> str:
    """What stands in the one element of this name."""
    found = parent.findall(field)
    if len(found) != 1:
        problems.append(Problem("annotation", f"{where}: {len(found) or 'no'} <{field}> where one is wanted"))
        return ""
    return found[0].text or ""


def _number(parent: ElementTree.Element, field: str, where: str, problems: list[Problem]) -> float:
    """The number in the one element of this name; NaN, and a problem, where there is none."""
    known, text, value = len(problems), _text(parent, field, where, problems), math.nan
    try:
        value = float(text)
    except ValueError:
        pass
    if math.isnan(value) and len(problems) == known:
        problems.append(Problem("annotation", f"{where}: <{field}> is {text[:40]!r}, not a number of pixels"))
    return value


PUBLISHED_SPLITS = tuple(f"{year}/{name}" for year in (2007, 2012) for name in ("train", "val", "trainval")) + ("2007/test",)
KAGGLE_INPUTS = Path("/kaggle/input")
SHOWN = 10  # problems that a refusal lists


def read_image_record(
    folder: Path, stem: str, classes: tuple[str, ...], decode: bool = False
) -> tuple[ImageRecord | None, list[Problem]]:
    """The record of one picture of a folder VOC2007 or VOC2012, or None and what is wrong with it."""
    image, annotation = folder / "JPEGImages" / f"{stem}.jpg", folder / "Annotations" / f"{stem}.xml"
    try:
        objects, problems = read_annotation(annotation, classes, read_size(image, decode))
    except (FileNotFoundError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        text = f"{image} is missing, but its split lists it" if missing else str(error)
        problems = [Problem("missing file" if missing else "picture", text), *read_annotation(annotation, classes)[1]]
    if problems:
        return None, problems
    return make_record(str(image), *([item[column] for item in objects] for column in range(3))), []


def _find(root: str | Path, pattern: str) -> Iterator[Path]:
    """Files of VOCdevkit trees under `root`, or among Kaggle's inputs.

    The published archives may lie side by side, each with its own VOCdevkit, up to three folders down.
    """
    for place in (Path(root), KAGGLE_INPUTS):
        for depth in ("", "*/", "*/*/", "*/*/*/"):
            yield from sorted(place.glob(f"{depth}VOCdevkit/{pattern}"))


def split_folder(root: str | Path, split: str) -> Path:
    """The folder VOC2007 or VOC2012 that lists a "year/split"."""
    year, _, name = split.partition("/")
    for listed in _find(root, f"VOC{year}/ImageSets/Main/{name}.txt"):
        return listed.parents[2]
    return Path(root) / "VOCdevkit" / f"VOC{year}"


def list_images(root: str | Path, splits: Iterable[str]) -> list[tuple[Path, str]]:
    """(the folder VOC2007 or VOC2012, name without ending) of each listed picture, in the order of the lists.

    Raises FileNotFoundError where a list is missing, ValueError where it is no text or lists nothing.
    """
    pictures = []
    for split in splits:
        folder = split_folder(root, split)
        listed = folder / "ImageSets" / "Main" / f"{split.partition('/')[2]}.txt"
        if not listed.exists():
            raise FileNotFoundError(
                f"{listed} is missing. Set Config.voc_root or the environment variable VOC_ROOT to the folder that "
                'holds VOCdevkit, or use Config(dataset="shapes"), which needs no download'
            )
        try:
            lines = listed.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{listed} is not a list of pictures in UTF-8: {error}") from None
        pictures += [(folder, line.split()[0]) for line in lines if line.strip()]
    if not pictures:
        raise ValueError(f"the splits {tuple(splits)} under {root} list no picture")
    return pictures


def read_voc(root: str | Path, splits: tuple[str, ...], classes: tuple[str, ...], skip_bad: bool = False) -> list[ImageRecord]:
    """Records of the listed splits, each "year/split" such as "2007/trainval", in the order of their lists.

    root: the folder that holds VOCdevkit. skip_bad: go on without pictures that can't be used, saying how many.
    Raises FileNotFoundError where a list is missing, and ValueError that lists what is wrong and the way out.
    """
    found = [read_image_record(*picture, classes) for picture in list_images(root, splits)]
    records = [record for record, _ in found if record is not None]
    problems = [problem for _, wrong in found for problem in wrong]
    bad = len(found) - len(records)
    named = () if classes == VOC_CLASSES else ("--classes", ",".join(classes))
    command = shlex.join(("python", "-m", "src.data.voc", "check", str(root), *named))
    says = f"{bad:,} of {len(found):,} pictures of {', '.join(splits)} can't be used ({count(problems)})"
    if bad and not (skip_bad and records):
        shown = "\n  ".join(problem.text for problem in problems[:SHOWN])
        more = f"and {len(problems) - SHOWN:,} more problems\n" if len(problems) > SHOWN else ""
        way = f"`{command}` lists all; Config(skip_bad_files=True) goes on without these pictures"
        raise ValueError(f"{says}:\n  {shown}\n{more}{way if records else 'no picture is left'}")
    if bad:
        print(f"{says} and are left out; `{command}` lists them")
    return records


def count(problems: list[Problem]) -> str:
    """For example "2 box, 1 missing file"."""
    kinds = Counter(problem.kind for problem in problems)
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())


def check(root: str | Path, classes: tuple[str, ...]) -> list[Problem]:
    """Everything that is wrong with the listed pictures of a tree, each decoded in full; printed, with counts.

    Lists of one class, such as cat_train.txt, are not read. Raises what `list_images` raises.
    """
    named = {*classes, *VOC_CLASSES}
    lists = [f for f in _find(root, "VOC*/ImageSets/Main/*.txt") if f.stem.rpartition("_")[0] not in named]
    pictures = dict.fromkeys(list_images(root, [f"{f.parents[2].name[3:]}/{f.stem}" for f in lists]))
    problems, boxes, good = [], 0, 0
    for folder, stem in tqdm(pictures, unit="picture", leave=False, disable=None):
        record, wrong = read_image_record(folder, stem, classes, decode=True)
        problems += wrong
        good, boxes = good + (record is not None), boxes + (len(record.labels) if record else 0)
        for problem in wrong:
            tqdm.write(problem.text, file=sys.stdout)
    bad = f"{len(pictures) - good:,} bad: {count(problems)}" if problems else "none bad"
    print(f"{len(pictures):,} pictures in {len(lists)} lists: {good:,} good, with {boxes:,} boxes; {bad}")
    return problems


def download_voc(root: str | Path, splits: tuple[str, ...]) -> None:
    """Fetch, through torchvision and with progress, those published splits whose archive is not there.

    Nothing is unpacked over a folder that has a list of that archive already: it may be somebody's own.
    Raises RuntimeError that names the folder where the server can't be reached.
    """
    from torchvision.datasets import VOCDetection

    for split in splits:
        year, _, name = split.partition("/")
        archive = ("test",) if name == "test" else ("train", "val", "trainval")
        lists = split_folder(root, split) / "ImageSets" / "Main"
        if split not in PUBLISHED_SPLITS or any((lists / f"{other}.txt").exists() for other in archive):
            continue
        print(f"VOC {split} is not under {root}: downloading it")
        try:
            VOCDetection(root, year=year, image_set=name, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise RuntimeError(
                f"VOC {split} is not under {Path(root).resolve()} and can't be downloaded ({error}). Set "
                'Config.voc_root or VOC_ROOT to the folder that holds VOCdevkit, or use Config(dataset="shapes")'
            ) from error


def main() -> None:
    """The command above; ends with status 1 where a picture can't be used."""
    parser = argparse.ArgumentParser(prog="python -m src.data.voc", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("check", help="list everything that is wrong with a tree's pictures, with counts")
    command.add_argument("folder", help="the folder that holds VOCdevkit")
    command.add_argument("--classes", default=",".join(VOC_CLASSES), help="names, with commas between; left out: VOC's")
    given = parser.parse_args()
    try:
        sys.exit(bool(check(given.folder, tuple(name.strip() for name in given.classes.split(",")))))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
