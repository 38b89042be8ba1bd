"""Damaged annotations and images: each gives a usable record, or a problem that names the file."""

import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import Config
from src.data.datamodule import DetectionDataModule, ValDataset
from src.data.mosaic import MosaicDataset
from src.data.records import BAD_FILES, OTHER_CLASSES, ImageRecord, make_records
from src.data.voc import VOCReader
from src.model.boxes import cxcywh_to_xyxy
from tests.test_voc import write_tree

CLASSES = ("cat", "dog", "person")
FIELDS = ("name", "difficult", "bndbox", "xmin", "ymin", "xmax", "ymax")
NUMBERS = FIELDS[3:]
WORDS = (
    "",
    " ",
    "ten",
    "1,5",
    "0x10",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e999",
    "-1e999",
    "--3",
    "None",
    "12 13",
    "é",
    "\U0001f600",
)
OBJECT = (
    "<object><name>{}</name><pose>Left</pose><truncated>1</truncated><difficult>0</difficult>"
    "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax></bndbox></object>"
)
SIZE = "<size><width>100</width><height>80</height></size>"
INSIDE = SIZE + "".join(map(OBJECT.format, CLASSES))
VALID = f"<annotation>{INSIDE}</annotation>"
CONFIG = Config(
    image_size=64, classes=CLASSES, epochs=10, close_mosaic_epochs=0, cache_gb=0, num_workers=0
)


def change(text: str, field: str, random, new) -> str:
    """Replace one random element `field` of `text` by new(element)."""
    start, end = random.choice(
        [match.span() for match in re.finditer(rf"<{field}>.*?</{field}>", text)]
    )
    return text[:start] + new(text[start:end]) + text[end:]


def with_number(field: str, random, value: str) -> str:
    return change(VALID, field, random, lambda _: f"<{field}>{value}</{field}>")


def mutations(random) -> dict:
    """Damage VALID in each way: (new text or bytes, what a case must name; "" if optional)."""
    field, number, raw = random.choice(FIELDS), random.choice(NUMBERS), VALID.encode()
    place, flipped = int(random.integers(len(raw))), bytearray(raw)
    for _ in range(random.integers(1, 9)):
        flipped[random.integers(len(raw))] ^= 1 << random.integers(8)
    low, high = (61, 70) if number.endswith("min") else (1, 10)
    twisted = f"<{number}>{random.integers(low, high)}</{number}>"
    encoding = random.choice(
        ["utf-16", "utf-8-sig", "utf-16-le", "utf-7", "ebcdic-cp-be", "latin-1", "no-such-encoding"]
    )
    declared = f'<?xml version="1.0" encoding="{encoding}"?>{VALID.replace("Left", "é")}'
    return {
        "missing field": (
            change(VALID, field, random, lambda _: ""),
            {"difficult": "", "name": OTHER_CLASSES, "bndbox": "no xmin"}.get(field, f"no {field}"),
        ),
        "repeated field": (change(VALID, field, random, lambda old: old * 2), ""),
        "empty field": (
            change(VALID, field, random, lambda _: f"<{field}/>"),
            {"bndbox": "no xmin", "name": OTHER_CLASSES}.get(field, "to float: ''"),
        ),
        "no number": (with_number(number, random, random.choice(WORDS)), "to float|boxes"),
        "negative": (with_number(number, random, str(-random.integers(1, 1000))), "boxes"),
        "swapped": (change(VALID, number, random, lambda _: twisted), "boxes left out"),
        "zero area": (
            with_number(
                number, random, {"xmin": "51", "xmax": "10", "ymin": "61", "ymax": "20"}[number]
            ),
            "boxes left out",
        ),
        "outside": (with_number(number, random, str(random.integers(103, 10**6))), "boxes"),
        "huge": (with_number(number, random, "9" * int(random.integers(7, 4000))), "boxes"),
        "fraction": (with_number(number, random, f"{random.uniform(-3, 110):.3f}"), ""),
        "other class": (
            with_number(
                "name",
                random,
                random.choice(["Cat", "unicorn", "cat dog", "a" * 5000, "&lt;b&gt;", "猫"]),
            ),
            OTHER_CLASSES,
        ),
        "wrong size": (
            with_number("width", random, str(random.integers(101, 4000))),
            "another size",
        ),
        "size no number": (with_number("height", random, random.choice(WORDS[:5])), "to float"),
        "other element": (VALID.replace(f"<{field}>", f"<{field}><b/>"), ""),
        "other encoding": (
            declared.encode("utf-8" if encoding.startswith(("no", "eb")) else encoding),
            "",
        ),
        "outside file": (
            f'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>{VALID.replace("cat", "&x;")}',
            "undefined entity",
        ),
        "cut": (raw[:place], "xml"),
        "bits": (bytes(flipped), ""),
        "no XML": (
            random.choice(
                ["", "{}", "null", "a,b\n1,2", "\x00" * 99, "<" * 999, "%PDF-1.4", "<html></html>"]
            ),
            "xml",
        ),
        "noise": (random.bytes(place), "xml"),
        "deep": (
            "<annotation>" + "<object>" * 20_000 + "</object>" * 20_000 + "</annotation>",
            "no xmin",
        ),
        "other root": (VALID.replace("annotation", f"a{place}"), "root element"),
        "name space": (
            VALID.replace("<annotation>", '<annotation xmlns="http://a.b/c">'),
            "root element",
        ),
        "joined": (raw[: -len("</annotation>")] + raw, "xml"),
    }


def check_sample(boxes, labels, note) -> None:
    """Check that boxes cxcywh are within 0..1 and not empty, and that labels are valid."""
    edges = cxcywh_to_xyxy(boxes)
    assert boxes.isfinite().all() and (boxes[:, 2:] > 0).all(), note
    assert (edges >= -1e-6).all() and (edges <= 1 + 1e-6).all(), note
    assert ((labels >= 0) & (labels < len(CLASSES))).all(), note


def visible_boxes(text: str) -> list[list[float]]:
    """Boxes of the objects of VALID with other numbers, by their definition."""
    boxes = []
    for box in re.findall(r"<bndbox>.*?</bndbox>", text):
        left, top, right, bottom = (float(number) for number in re.findall(r">([^<>]+)<", box))
        columns = [x for x in range(100) if left - 1 < x + 1 and x < right]  # pixels that it meets
        rows = [y for y in range(80) if top - 1 < y + 1 and y < bottom]
        if columns and rows and min(right - left, bottom - top) >= 0:
            edges = (max(left - 1, columns[0]), max(top - 1, rows[0]))
            boxes.append([*edges, min(right, columns[-1] + 1), min(bottom, rows[-1] + 1)])
    return boxes


def read(folder: Path, stem: str, decode: bool = False) -> tuple[ImageRecord | None, dict]:
    """Return the record of an image, or None, and the cases of the policy."""
    item = folder / "JPEGImages" / f"{stem}.jpg", folder / "Annotations" / f"{stem}.xml"
    records, cases = make_records(VOCReader(folder), "split", [item], CLASSES, check=decode)
    assert len(records) + len(cases[BAD_FILES]) == 1
    return (records[0] if records else None), cases


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A folder VOC2007 with a valid image "valid" of 100 x 80 pixels."""
    root = write_tree(tmp_path_factory.mktemp("tree"), "2007", {"train": {"valid": INSIDE}})
    folder = root / "VOCdevkit" / "VOC2007"
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "JPEGImages" / "valid.jpg")
    return folder


@pytest.mark.parametrize("seed", range(4))
def test_damaged_annotations(tree, seed):
    """1,152 in total: each gives the boxes that it has, or a problem that names the file."""
    random, usable, refused = np.random.default_rng(seed), 0, 0
    file = tree / "Annotations" / "valid.xml"
    for _ in range(12):
        for way, (content, named) in mutations(random).items():
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
            record, cases = read(tree, "valid")
            note = way, content[:2000], cases
            texts = [
                f"{kind}: {file if kind == OTHER_CLASSES else text}"
                for kind in cases
                for text in cases[kind]
            ]
            assert all(str(file) in text and len(text) < 400 + 2 * len(str(file)) for text in texts)
            assert re.search(named, "\n".join(texts)), note
            if record is None:
                refused += 1
                continue
            if way in ("negative", "swapped", "zero area", "outside", "huge", "fraction"):
                np.testing.assert_allclose(record.boxes, visible_boxes(content), err_msg=way)
            check_sample(*ValDataset([record], CONFIG)[0][1:3], note)
            check_sample(*MosaicDataset([record], CONFIG)[usable % 10][1:], note)
            usable += 1
    file.write_text(VALID)
    assert usable + refused == 288 and usable > 80 and refused > 150


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def image_files(valid: bytes) -> dict[str, tuple[bytes, bool | None]]:
    """Return contents of .jpg files: (bytes, whether they are usable; None: both acceptable)."""
    random = np.random.default_rng(0)
    opened = Image.open(io.BytesIO(valid))
    rotated, wide = Image.Exif(), Image.new("RGB", (20_000, 3), "red")
    rotated[0x0112] = 6
    bomb = encode(Image.new("1", (1, 1)), "PNG").replace(
        b"\x00\x00\x00\x01\x00\x00\x00\x01", b"\x00\x01\x00\x00\x00\x01\x00\x00"
    )
    files = {
        "empty": (b"", False),
        "text": (b"not an image", False),
        "page": (b"<html>404</html>", False),
        "bomb": (bomb, False),
        "start only": (valid[:2], False),
        "end only": (valid[:2] + b"\xff\xd9", False),
        "zeros": (bytes(5000), False),
        "trailing bytes": (valid + bytes(3000), True),
        "no end mark": (valid[:-2], None),
        "CMYK": (encode(opened.convert("CMYK")), True),
        "grey": (encode(opened.convert("L")), True),
        "progressive": (encode(opened, progressive=True), True),
        "rotated": (encode(opened, exif=rotated), True),
        "1 x 1": (encode(opened.resize((1, 1))), True),
        "wide": (encode(wide), True),
        "tall": (encode(wide.rotate(90, expand=True)), True),
        "16 bits": (encode(opened.convert("I;16"), "PNG"), True),
        "PNG": (encode(opened, "PNG"), True),
        "GIF": (encode(opened, "GIF"), True),
        "BMP": (encode(opened, "BMP"), True),
        "cut PNG": (encode(opened, "PNG")[:-300], False),
        "palette": (encode(opened.quantize(4), "PNG", transparency=1), True),
    }
    for cut in random.integers(3, len(valid) - 600, 20):
        files[f"cut at {cut}"] = valid[:cut], False
    for number in range(100):
        flipped = bytearray(valid if number % 2 else files["rotated"][0])
        for _ in range(random.integers(1, 6)):
            flipped[random.integers(len(flipped) if number % 4 else 300)] ^= 1 << random.integers(8)
        files[f"bits {number}"] = bytes(flipped), None
    return files


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings(
    "ignore:(Truncated File Read|Corrupt EXIF data|Possibly corrupt EXIF data|Metadata Warning)"
)
def test_damaged_images(tree):
    """142: each gives samples, or a problem that names the file, when it is checked or loaded."""
    (tree / "Annotations" / "some.xml").write_text("<annotation/>")
    file = tree / "JPEGImages" / "some.jpg"
    for way, (content, usable) in image_files(
        (tree / "JPEGImages" / "valid.jpg").read_bytes()
    ).items():
        file.write_bytes(content)
        record, cases = read(tree, "some")
        decoded, all_cases = read(tree, "some", decode=True)
        assert all(str(file) in text for text in cases[BAD_FILES] + all_cases[BAD_FILES]), way
        assert usable is None or (record is not None) == (decoded is not None) == usable, way
        assert record is not None or decoded is None, way
        for dataset in (ValDataset, MosaicDataset) if record else ():
            if decoded:
                assert dataset([record], CONFIG)[0][0].shape == (3, 64, 64), way
                continue
            with pytest.raises(ValueError, match=re.escape(str(file))):  # only decoding finds it
                dataset([record], CONFIG)[0]


@pytest.mark.parametrize(("stated", "differs"), [((100, 80), True), ((80, 100), False)])
def test_annotations_apply_to_the_rotated_image(tree, stated, differs):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown 80 x 100
    Image.new("RGB", (100, 80)).save(tree / "JPEGImages" / "rotated.jpg", exif=exif)
    text = VALID.replace("100</w", f"{stated[0]}</w").replace("80</h", f"{stated[1]}</h")
    (tree / "Annotations" / "rotated.xml").write_text(text)
    record, cases = read(tree, "rotated")
    assert len(record.boxes) == 3
    assert ("100.0 x 80.0 is stated, 80 x 100 found" in str(dict(cases))) == differs


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_damaged_during_training_is_named(tree, tmp_path, workers):
    root = shutil.copytree(tree.parents[1], tmp_path / "a tree")
    folder = root / "VOCdevkit" / "VOC2007"
    data = DetectionDataModule(
        CONFIG.replace(
            data_root=str(root),
            train_splits=("2007/train",),
            val_splits=("2007/train",),
            num_workers=workers,
            batch_size=1,
        )
    )
    data.setup()
    with open(folder / "JPEGImages" / "valid.jpg", "r+b") as file:
        file.truncate(500)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(ValueError, match=r"valid\.jpg can't be read as an image"):
            next(iter(loader))
