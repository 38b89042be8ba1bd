"""VOCdevkit trees, valid and broken, and the download."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import VOC_CLASSES, Config
from src.data.check import check, main
from src.data.datamodule import DetectionDataModule
from src.data.datasets import read_records
from src.data.records import ImageRecord
from src.data.voc import VOCReader, download_voc

BOX = "<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>50</xmax><ymax>60</ymax></bndbox>"


def obj(name: str = "cat", box: str = BOX, difficult: str = "<difficult>0</difficult>") -> str:
    return f"<object><name>{name}</name>{difficult}{box}</object>"


def write_tree(root: Path, year: str, splits: dict[str, dict[str, str]]) -> Path:
    """Write a VOCdevkit of {split: {stem: content of its annotation}}."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(images) + "\n")
        for stem, inside in images.items():
            Image.new("RGB", (100, 80)).save(folder / "JPEGImages" / f"{stem}.jpg")
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation>{inside}</annotation>"
            )
    return root


def read_voc(
    root: Path | str, splits: tuple[str, ...], classes: tuple[str, ...] = VOC_CLASSES, **options
) -> list[ImageRecord]:
    config = Config(data_root=str(root), classes=classes, **options)
    return read_records(VOCReader(root), splits, config)[0]


def small_data(root: Path, classes: tuple[str, ...], **changes) -> DetectionDataModule:
    splits = {"train_splits": ("2007/train",), "val_splits": ("2007/val",)}
    data = DetectionDataModule(
        Config(data_root=str(root), classes=classes, cache_gb=0, **splits | changes)
    )
    data.setup()
    return data


def test_years_in_separate_archives_in_the_order_of_the_lists(tmp_path):
    both = obj() + obj("person", difficult="<difficult>1</difficult>")
    write_tree(tmp_path / "VOCtest_06-Nov-2007", "2007", {"test": {"2": "", "photo 1": ""}})
    write_tree(tmp_path / "VOCtrainval", "2012", {"trainval": {"3": both}, "cat_trainval": {}})
    records = read_voc(tmp_path, ("2007/test", "2012/trainval"))
    assert [Path(record.image).stem for record in records] == ["2", "photo 1", "3"]
    assert records[2].labels.tolist() == [VOC_CLASSES.index("cat"), VOC_CLASSES.index("person")]
    assert records[2].difficult.tolist() == [False, True]
    # counted from 0, right and bottom exclusive
    assert records[2].boxes.tolist() == [[10, 20, 50, 60]] * 2
    assert [column.dtype for column in records[2][1:]] == [np.float32, np.int64, bool]
    message = (
        r"split '2007/val' in the format 'voc'\. Its splits are \['2007/test', '2012/trainval'\]"
    )
    with pytest.raises(FileNotFoundError, match=message + ".*set Config.*VOC_ROOT.*shapes"):
        read_voc(tmp_path, ("2007/val",))


@pytest.mark.parametrize("owner", ["", "datasets/ada/"])
@pytest.mark.parametrize(
    "folder", ["", "VOCdevkit/", "VOC_dataset/VOCdevkit/", "a/VOCtest_06-Nov-2007/VOCdevkit/"]
)
def test_layouts_of_kaggle_data_sets(tmp_path, monkeypatch, owner, folder):
    """Inputs are mounted at NAME or at datasets/OWNER/NAME, with any folders in between.

    They complete the default folder, but no other.
    """
    write_tree(tmp_path / "made", "2007", {"test": {"1": obj()}})
    monkeypatch.setattr("src.data.voc.KAGGLE_INPUTS", tmp_path / "input")
    target = tmp_path / "input" / f"{owner}pascal-voc/{folder}VOC2007"
    target.parent.mkdir(parents=True)
    (tmp_path / "made/VOCdevkit/VOC2007").rename(target)
    monkeypatch.chdir(tmp_path)
    assert Path(read_voc("data", ("2007/test",))[0].image).parents[1] == target
    assert VOCReader("made").splits == []


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (obj() + obj("dog", box=""), "'no xmin'"),
        (obj(box=BOX.replace("60", "sixty")), "'sixty'"),
        (obj(difficult="<difficult>yes</difficult>"), "'yes'"),
        ("<object>", "mismatched tag"),
    ],
)
def test_bad_annotations_name_the_file(tmp_path, inside, message):
    write_tree(tmp_path, "2007", {"test": {"000007": inside, "1": obj()}})
    with pytest.raises(
        ValueError, match=r"(?s)1 of 2 images of 2007/test can't.*000007\.xml: .*" + message
    ):
        read_voc(tmp_path, ("2007/test",))
    assert len(read_voc(tmp_path, ("2007/test",), skip_bad_files=True)) == 1


def test_objects_of_other_classes_are_left_out_and_counted(tmp_path, capsys):
    """A detector of some of VOC's classes. An image without any of them is background."""
    images = {"1": obj("person") + obj("dog") + obj("car"), "2": obj("dog"), "3": obj("cat")}
    write_tree(tmp_path, "2007", {"train": images, "val": {"4": obj("car")}})
    data = small_data(tmp_path, ("person", "car"))
    labels = [record.labels.tolist() for record in data.train_records + data.val_records]
    assert labels == [[0, 1], [], [], [1]] and data.train_records[1].boxes.shape == (0, 4)
    train, val = capsys.readouterr().out.splitlines()
    assert train.startswith("2007/train: 3 images, 2 objects; 3 objects of other classes left out")
    assert train.endswith("({'dog': 2, 'cat': 1})") and val == "2007/val: 1 images, 1 objects"
    message = "has no objects of cra, but of {'dog': 2, 'person': 1, 'car': 1, 'cat': 1}. Correct"
    with pytest.raises(ValueError, match=message):
        small_data(tmp_path, ("person", "cra"))


def box_text(*edges: float) -> str:
    return "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>".format(
        *edges
    )


def test_boxes_and_sizes_that_do_not_fit_are_counted(tmp_path, capsys):
    boxes = [(-9, 0, 50, 600), (0.95, 1, 100.05, 80), (51, 21, 50, 60), (101, 1, 200, 80)]
    boxes.append((1, 1, math.nan, 80))
    inside = "".join(obj(box=box_text(*box)) for box in boxes)
    size = "<size><width>{}</width><height>{}</height></size>".format
    others = {"2": size(9, 9), "3": size(0, 0), "4": size(100, 80)}
    write_tree(tmp_path, "2007", {"test": {"1": size(80, 100) + inside} | others})
    record, *_ = read_voc(tmp_path, ("2007/test",))
    np.testing.assert_allclose(record.boxes, [[0, 0, 50, 80], [0, 0, 100, 80]], atol=1e-5)
    line = capsys.readouterr().out
    assert "1 boxes clipped to the image (such as " in line and "1.xml: object 1 (cat): " in line
    assert "3 boxes left out, empty or outside the image (such as " in line and "object 3" in line
    assert line.count("\n") == 1 and "2 images of another size than stated (such as " in line
    assert "1.xml: 80.0 x 100.0 is stated, 100 x 80 found" in line


def bad_tree(root: Path) -> Path:
    """Write seven images. Four can't be used, and one has two cases that don't matter."""
    good, other = obj(), obj("unicorn") + obj("dog", box=BOX.replace("60", "600"))
    trainval = {"1": good, "2": other, "3": good, "4": good}
    write_tree(root, "2007", {"trainval": trainval, "test": {"5": "<object>", "6": good}})
    folder = write_tree(root, "2007", {"cat_trainval": {"7": good}}) / "VOCdevkit" / "VOC2007"
    complete = (folder / "JPEGImages" / "4.jpg").read_bytes()
    (folder / "JPEGImages" / "4.jpg").write_bytes(complete[:400])
    (folder / "JPEGImages" / "3.jpg").unlink()
    (folder / "Annotations" / "1.xml").unlink()
    return root


def test_check_lists_every_case(tmp_path, capsys):
    assert len(check(bad_tree(tmp_path), ("dog",))) == 4
    lines = capsys.readouterr().out.splitlines()
    for name, case in (
        ("2007/trainval: 1 images, 1 objects", "'unicorn': 1"),
        ("2007/test: 1 images, 0 objects", "'cat': 1"),
        ("  ", "2.xml: object 2 (dog)"),
        ("  ", "3.xml: FileNotFoundError: [Errno 2] No such file"),
        ("  ", "1.xml: FileNotFoundError: [Errno 2] No such file"),
        ("  ", "4.jpg can't be read as an image"),
        ("  ", "5.xml: ParseError: mismatched tag"),
    ):
        assert sum(line.startswith(name) and case in line for line in lines) == 1, case


@pytest.mark.parametrize(("name", "classes", "status"), [("good", "gnu", 0), ("bad", "dog", 1)])
def test_exit_status_of_the_command(tmp_path, monkeypatch, name, classes, status):
    write_tree(tmp_path / "good", "2012", {"train": {"1": obj("gnu")}})
    bad_tree(tmp_path / "bad")
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path / name), "--classes", classes])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == status


def test_a_folder_without_data_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path)])
    with pytest.raises(SystemExit, match="no VOCdevkit folder, no data.yaml and no COCO file"):
        main()


def test_training_refuses_bad_files_or_leaves_them_out(tmp_path, capsys):
    root = bad_tree(tmp_path / "a tree")
    splits = {"train_splits": ("2007/trainval",), "val_splits": ("2007/test",)}
    message = r"(?s)3 of 4 images of 2007/trainval.*1\.xml.*3\.jpg.*4\.jpg.*check '.*a tree'.*=True"
    with pytest.raises(ValueError, match=message):
        small_data(root, ("dog",), **splits)
    data = small_data(root, ("dog",), **splits, skip_bad_files=True)
    assert (len(data.train_records), len(data.val_records)) == (1, 1)
    assert "; 3 images left out, missing or not readable (such as " in capsys.readouterr().out


@pytest.fixture
def requests(monkeypatch) -> list[str]:
    """Replace torchvision's download by one of a single image: a list of what was downloaded."""
    downloaded = []

    def download(root, year, image_set, download):
        lists = ("test",) if image_set == "test" else ("train", "val", "trainval")
        write_tree(Path(root), year, {name: {"1": obj()} for name in lists})
        downloaded.append(f"{year}/{image_set}")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", download)
    return downloaded


def test_only_missing_splits_are_downloaded_into_the_default_folder(
    tmp_path, monkeypatch, requests
):
    monkeypatch.chdir(tmp_path)
    write_tree(Path("data"), "2007", {"trainval": {"1": obj()}})
    splits = {"train_splits": ("2007/trainval", "2012/train", "2012/mine"), "val_splits": ()}
    for _ in range(2):
        DetectionDataModule(Config(data_root="data", **splits)).prepare_data()
        DetectionDataModule(Config(data_root="mistyped")).prepare_data()
        assert requests == ["2012/train"]
    assert VOCReader("data").splits == ["2007/trainval", "2012/train", "2012/trainval", "2012/val"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError("no route to host"), RuntimeError, "VOC 2012/train.*no route.*VOC_ROOT.*shapes"),
    ],
)
def test_a_failed_download_is_repeated(tmp_path, monkeypatch, requests, error, raised, message):
    """The lists are there before all photographs are."""

    def fail(root, **_):
        write_tree(Path(root), "2012", {"train": {"1": obj()}})
        raise error

    with monkeypatch.context() as context:
        context.setattr("torchvision.datasets.VOCDetection", fail)
        with pytest.raises(raised, match=message):
            download_voc(("2012/train",), tmp_path)
    assert VOCReader(tmp_path).splits == []
    download_voc(("2012/train",), tmp_path)
    assert requests == ["2012/train"] and len(VOCReader(tmp_path).splits) == 3


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="VOC_ROOT is not set")
def test_a_real_tree():
    reader = VOCReader(os.environ["VOC_ROOT"])
    records = read_voc(reader.root, tuple(reader.splits))
    assert records
    for record in records[::50]:
        with Image.open(record.image) as image:
            assert (record.boxes >= 0).all() and (record.boxes[:, 2:] <= image.size).all()
