"""Reading VOCdevkit trees, good and bad."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import VOC_CLASSES, Config
from src.data.datamodule import DetectionDataModule
from src.data.voc import check, download_voc, main, read_annotation, read_voc

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
    monkeypatch.setattr("src.data.voc.KAGGLE_INPUTS", tmp_path)
    assert [Path(r.image).stem for r in read_voc("nowhere", wanted, VOC_CLASSES)] == ["1", "2"]


def test_a_missing_tree_names_the_list_and_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"VOC2007.ImageSets.Main.test\.txt is missing.*VOC_ROOT.*shapes"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (obj("unicorn"), r"object 1 is a 'unicorn', which is not in Config.classes"),
        (obj() + obj("dog", box=""), r"object 2 \(dog\): no <bndbox> where one is wanted"),
        (obj(box=BOX.replace("<xmin>11</xmin>", "")), r"no <bndbox/xmin> where one is wanted"),
        (obj(box=BOX.replace("60", "sixty")), r"<bndbox/ymax> is 'sixty'"),
        (obj(box=BOX.replace("11", "51")), r"is empty or lies outside"),
        (obj(box=BOX.replace("11", "-9")), r"is empty or lies outside"),
        (obj(box=BOX.replace("60", "90")), r"lies outside the picture of 100 x 80 pixels"),
        (obj(box=BOX.replace("60", "nan")), r"<bndbox/ymax> is 'nan', not a number"),
        (obj(box=BOX.replace("60", "inf")), r"is empty or lies outside"),
        ("<object>", r"is not an XML annotation"),
        (obj(difficult="<difficult>yes</difficult>"), r"<difficult> is 'yes', not 0 or 1"),
        ("<size><width>80</width><height>100</height></size>", r"<size> is 80 x 100, but the picture has 100 x 80"),
    ],
)
def test_bad_annotations_name_file_and_field(tmp_path, inside, message):
    write_tree(tmp_path, "2007", {"test": {"000007": inside}})
    with pytest.raises(ValueError, match=r"000007\.xml.*" + message):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


def test_entities_are_refused_in_any_encoding(tmp_path):
    for encoding in ("utf-8", "utf-16"):
        file = tmp_path / f"{encoding}.xml"
        file.write_bytes('<!DOCTYPE a [<!ENTITY x "ha">]><annotation>&x;</annotation>'.encode(encoding))
        assert "DOCTYPE" in read_annotation(file, VOC_CLASSES)[1][0].text


def test_a_box_one_pixel_too_far_is_cut(tmp_path):
    box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>101</xmax><ymax>81</ymax></bndbox>"
    write_tree(tmp_path, "2007", {"test": {"1": obj(box=box)}})
    assert read_voc(tmp_path, ("2007/test",), VOC_CLASSES)[0].boxes.tolist() == [[0, 0, 100, 80]]


def bad_tree(root: Path) -> Path:
    """Seven pictures, five of them bad, in six ways."""
    good, wrong = obj(), obj("unicorn") + obj("dog", box=BOX.replace("60", "600"))
    trainval = {"1": good, "2": wrong, "3": good, "4": good}
    write_tree(root, "2007", {"trainval": trainval, "test": {"5": "<object>", "6": good}})
    folder = write_tree(root, "2007", {"cat_trainval": {"7": good}}) / "VOCdevkit" / "VOC2007"
    whole = (folder / "JPEGImages" / "4.jpg").read_bytes()
    (folder / "JPEGImages" / "4.jpg").write_bytes(whole[:400])
    (folder / "JPEGImages" / "3.jpg").unlink()
    (folder / "Annotations" / "3.xml").unlink()
    return root


def test_everything_wrong_is_listed_at_once(tmp_path, capsys):
    assert len(check(bad_tree(tmp_path), VOC_CLASSES)) == 6
    *lines, last = capsys.readouterr().out.splitlines()
    for name, what in (("2.xml: object 1", "unicorn"), ("2.xml: object 2 (dog)", "600.0"), ("3.jpg", "missing"),
                       ("3.xml", "missing"), ("4.jpg", "be read as a picture"), ("5.xml", "not an XML")):  # fmt: skip
        assert sum(name in line and what in line for line in lines) == 1, name
    assert last.startswith("6 pictures in 2 lists: 2 good, with 2 boxes; 4 bad: 2 missing file, 1 ")


def test_the_command_ends_with_a_status(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "good", "2012", {"train": {"1": obj("gnu")}})
    for folder, status in ((tmp_path / "good", 0), (bad_tree(tmp_path / "bad"), 1)):
        monkeypatch.setattr("sys.argv", ["voc", "check", str(folder), "--classes", "gnu, cat"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == status
    monkeypatch.setattr("sys.argv", ["voc", "check", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="list no picture"):
        main()


def test_training_refuses_a_bad_tree_or_leaves_bad_pictures_out(tmp_path, capsys):
    splits = {"train_splits": ("2007/trainval",), "val_splits": ("2007/test",)}
    config = Config(voc_root=str(bad_tree(tmp_path)), cache_gb=0, **splits)
    with pytest.raises(ValueError, match=r"(?s)1 of 2 pictures of 2007/test.*5\.xml.*src.data.voc check .*skip_bad_files=True"):
        DetectionDataModule(config).setup()
    with pytest.raises(ValueError, match=r"(?s)3 of 4 pictures of 2007/trainval.*2\.xml.*3\.jpg.*3\.xml.*4\.jpg"):
        DetectionDataModule(config.replace(val_splits=("2007/cat_trainval",))).setup()
    data = DetectionDataModule(config.replace(skip_bad_files=True))
    data.setup()
    assert (len(data.train_records), len(data.val_records)) == (1, 1)
    assert "3 of 4 pictures of 2007/trainval can't be used" in capsys.readouterr().out


def test_a_long_refusal_shows_ten_and_the_number(tmp_path):
    write_tree(tmp_path, "2007", {"test": {str(number): obj("unicorn") for number in range(40)} | {"good": obj()}})
    with pytest.raises(ValueError, match="40 of 41 pictures.*40 class") as refusal:
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 1 + 10 + 2 and lines[11] == "and 30 more problems"


def test_nothing_left_is_refused_even_so(tmp_path):
    write_tree(tmp_path, "2007", {"test": {"1": obj("unicorn")}})
    with pytest.raises(ValueError, match="no picture is left"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES, skip_bad=True)


def test_a_list_that_is_no_text(tmp_path):
    folder = write_tree(tmp_path, "2007", {"test": {"1": obj()}}) / "VOCdevkit/VOC2007/ImageSets/Main"
    (folder / "test.txt").write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(ValueError, match=r"test\.txt is not a list"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    (folder / "test.txt").write_bytes(b"\xef\xbb\xbf1\r\n")  # a byte order mark and Windows' line ends
    assert len(read_voc(tmp_path, ("2007/test",), VOC_CLASSES)) == 1


def test_download_asks_torchvision_for_what_is_missing_only(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torchvision.datasets.VOCDetection", lambda root, **what: asked.append(what))
    write_tree(tmp_path, "2007", {"trainval": {"1": obj()}})
    download_voc(tmp_path, ("2007/trainval", "2012/trainval", "2007/test", "2012/mine"))
    assert asked == [
        {"year": year, "image_set": name, "download": True} for year, name in (("2012", "trainval"), ("2007", "test"))
    ]


def test_nothing_is_unpacked_over_lists_that_are_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torchvision.datasets.VOCDetection", lambda root, **what: asked.append(what))
    write_tree(tmp_path, "2012", {"train": {"1": obj()}})
    download_voc(tmp_path, ("2012/train", "2012/val", "2012/trainval"))
    own = Config(classes=("mask",), voc_root=str(tmp_path / "mistyped"), train_splits=("2012/train",), val_splits=("2012/val",))
    DetectionDataModule(own).prepare_data()
    assert not asked
    with pytest.raises(FileNotFoundError, match="mistyped"):
        DetectionDataModule(own).setup()


def test_a_failed_download_names_the_way_out(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", refuse)
    with pytest.raises(RuntimeError, match=r"VOC 2007/test.*no route to host.*VOC_ROOT.*shapes"):
        download_voc(tmp_path, ("2007/test",))


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="VOC_ROOT names no VOCdevkit tree")
def test_a_real_tree():
    root = Path(os.environ["VOC_ROOT"])
    splits = sorted(
        f"{f.parents[2].name[3:]}/{f.stem}" for f in root.glob("VOCdevkit/VOC*/ImageSets/Main/[tv]*.txt") if "_" not in f.stem
    )
    records = read_voc(root, tuple(splits), VOC_CLASSES)
    for record in records[::50]:
        with Image.open(record.image) as image:
            assert (record.boxes >= 0).all() and (record.boxes[:, 2:] <= image.size).all()
