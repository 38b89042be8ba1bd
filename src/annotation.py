"""One annotation file: its objects, and everything that is wrong with it."""

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

SLACK = 1.0  # pixels that a box may stick out of its picture, and is cut: tools count from 0 or from 1
LARGEST = 1e6  # pixels


class Problem(NamedTuple):
    """Why a picture of a tree can't be used."""

    kind: str  # to count by: "missing file", "annotation", "class", "box", "size" or "picture"
    text: str  # names the file and the field


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
