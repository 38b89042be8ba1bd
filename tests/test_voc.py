"""Reading VOCdevkit trees, good and bad."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import VOC_CLASSES
from src.voc import download_voc, read_annotation, read_voc

BOX = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax></bndbox>"


def obj(name: str = "cat", box: str = BOX, difficult: str = "<difficult>0</difficult>") -> str:
    return f"<object><name>{name}</name>{difficult}{box}</object>"


def write_tree(root: Path, year: str, splits: dict[str, dict[str, str]]) -> Path:
    """A VOCdevkit of {split: {stem: the inside of its annotation}}."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, pictures in splits.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(pictures) + "\n")
        for stem, inside in pictures.items():
            Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / f"{stem}.jpg")
            (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{inside}</annotation>")
    return root


def test_two_years_and_listed_splits_in_order(tmp_path):
    write_tree(tmp_path, "2007", {"trainval": {"000001": obj("dog")}, "test": {"000002": ""}})
    write_tree(tmp_path, "2012", {"trainval": {"2008_000001": obj() + obj("person", difficult="<difficult>1</difficult>")}})
    records = read_voc(tmp_path, ("2007/trainval", "2012/trainval"), VOC_CLASSES)
    assert [Path(record.image).stem for record in records] == ["000001", "2008_000001"]
    assert records[1].labels.tolist() == [VOC_CLASSES.index("cat"), VOC_CLASSES.index("person")]
    assert records[1].difficult.tolist() == [False, True]
    assert records[1].boxes.tolist() == [[10, 20, 50, 60]] * 2  # counted from 0, right and bottom edge behind the pixel
    assert [v.dtype for v in records[1][1:]] == [np.float32, np.int64, bool]


def test_a_picture_without_objects_is_fine(tmp_path):
    write_tree(tmp_path, "2007", {"test": {"000002": ""}})
    (record,) = read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    assert record.boxes.shape == (0, 4) and record.labels.shape == record.difficult.shape == (0,)


def test_other_class_names(tmp_path):
    write_tree(tmp_path, "2012", {"train": {"1": obj("gnu") + obj("yak")}})
    assert read_voc(tmp_path, ("2012/train",), ("yak", "gnu"))[0].labels.tolist() == [1, 0]


def test_archives_side_by_side_and_kaggles_inputs(tmp_path, monkeypatch):
    write_tree(tmp_path / "a" / "VOCtrainval_06-Nov-2007", "2007", {"trainval": {"1": obj()}})
    write_tree(tmp_path / "a" / "VOCtest_06-Nov-2007", "2007", {"test": {"2": obj()}})
    wanted = ("2007/trainval", "2007/test")
    assert [Path(r.image).stem for r in read_voc(tmp_path / "a", wanted, VOC_CLASSES)] == ["1", "2"]
    monkeypatch.setattr("src.voc.KAGGLE_INPUTS", tmp_path)
    assert [Path(r.image).stem for r in read_voc("nowhere", wanted, VOC_CLASSES)] == ["1", "2"]


def test_a_missing_tree_names_the_list_and_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VOC2007.ImageSets.Main.test\.txt is missing.*VOC_ROOT.*shapes"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (obj("unicorn"), r"object 1 is a 'unicorn', which is not in Config.classes"),
        (obj() + obj("dog", box=""), r"object 2 \(dog\) has no <bndbox>"),
        (obj(box=BOX.replace("<xmin>11</xmin>", "")), r"<xmin> is None"),
        (obj(box=BOX.replace("60", "sixty")), r"<ymax> is 'sixty'"),
        (obj(box=BOX.replace("11", "51")), r"is empty or lies outside"),
        (obj(box=BOX.replace("11", "-9")), r"is empty or lies outside"),
        (obj(box=BOX.replace("60", "nan")), r"is empty or lies outside"),
        (obj(box=BOX.replace("60", "inf")), r"is empty or lies outside"),
        ("<object>", r"is not an XML annotation"),
    ],
)
def test_bad_annotations_name_file_and_field(tmp_path, inside, message):
    write_tree(tmp_path, "2007", {"test": {"000007": inside}})
    with pytest.raises(ValueError, match=r"000007\.xml.*" + message):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


def test_entities_are_refused(tmp_path):
    file = tmp_path / "1.xml"
    file.write_text('<!DOCTYPE a [<!ENTITY x "ha">]><annotation>&x;</annotation>')
    with pytest.raises(ValueError, match="DOCTYPE"):
        read_annotation(file, VOC_CLASSES)


def test_listed_but_missing_files_are_named(tmp_path):
    folder = write_tree(tmp_path, "2007", {"test": {"1": obj(), "2": obj()}}) / "VOCdevkit" / "VOC2007"
    (folder / "Annotations" / "2.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.xml is missing"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    (folder / "JPEGImages" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.jpg is missing"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


def test_download_asks_torchvision_for_what_is_missing_only(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torchvision.datasets.VOCDetection", lambda root, **what: asked.append(what))
    write_tree(tmp_path, "2007", {"trainval": {"1": obj()}})
    download_voc(tmp_path, ("2007/trainval", "2012/trainval", "2007/test", "2012/mine"))
    assert asked == [{"year": year, "image_set": name, "download": True} for year, name in (("2012", "trainval"), ("2007", "test"))]


def test_a_failed_download_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", refuse)
    with pytest.raises(RuntimeError, match=r"VOC 2007/test.*no route to host.*VOC_ROOT.*shapes"):
        download_voc(tmp_path, ("2007/test",))


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="VOC_ROOT names no VOCdevkit tree")
def test_a_real_tree():
    root = Path(os.environ["VOC_ROOT"])
    splits = sorted(f"{f.parents[2].name[3:]}/{f.stem}" for f in root.glob("VOCdevkit/VOC*/ImageSets/Main/[tv]*.txt") if "_" not in f.stem)
    records = read_voc(root, tuple(splits), VOC_CLASSES)
    for record in records[::50]:
        with Image.open(record.image) as image:
            assert (record.boxes >= 0).all() and (record.boxes[:, 2:] <= image.size).all()
