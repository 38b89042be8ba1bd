"""VOCdevkit trees, valid and broken, and the download."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import VOC_CLASSES, Config
from src.data.check import check, main
from src.data.datamodule import DetectionDataModule
from src.data.formats import read_records
from src.data.records import ImageRecord
from src.data.voc import download_voc, list_splits, read_annotation

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
    root: Path | str, splits: tuple[str, ...], classes: tuple[str, ...], **options
) -> list[ImageRecord]:
    return read_records(Config(data_root=str(root), classes=classes, **options), splits)


def test_two_years_and_listed_splits_in_order(tmp_path):
    write_tree(tmp_path, "2007", {"trainval": {"000001": obj("dog")}, "test": {"000002": ""}})
    write_tree(
        tmp_path,
        "2012",
        {"trainval": {"2008_000001": obj() + obj("person", difficult="<difficult>1</difficult>")}},
    )
    records = read_voc(tmp_path, ("2007/trainval", "2012/trainval"), VOC_CLASSES)
    assert [Path(record.image).stem for record in records] == ["000001", "2008_000001"]
    assert records[1].labels.tolist() == [VOC_CLASSES.index("cat"), VOC_CLASSES.index("person")]
    assert records[1].difficult.tolist() == [False, True]
    assert (
        records[1].boxes.tolist() == [[10, 20, 50, 60]] * 2
    )  # counted from 0, right and bottom exclusive
    assert [v.dtype for v in records[1][1:]] == [np.float32, np.int64, bool]


def test_an_image_without_objects_is_kept(tmp_path):
    write_tree(tmp_path, "2007", {"test": {"000002": ""}})
    (record,) = read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    assert record.boxes.shape == (0, 4) and record.labels.shape == record.difficult.shape == (0,)


def test_lists_of_single_classes_and_names_with_spaces(tmp_path):
    write_tree(tmp_path, "2012", {"train": {"photo one": obj(), "photo 1": obj(), "000001": obj()}})
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Main"
    (lists / "cat_train.txt").write_text("photo one -1\nphoto 1\n000001  1\nphoto 1  0\n")
    names = [
        Path(record.image).stem for record in read_voc(tmp_path, ("2012/cat_train",), VOC_CLASSES)
    ]
    assert names == ["photo one", "photo 1", "000001", "photo 1"]


def test_other_class_names(tmp_path):
    write_tree(tmp_path, "2012", {"train": {"1": obj("gnu") + obj("yak")}})
    assert read_voc(tmp_path, ("2012/train",), ("yak", "gnu"))[0].labels.tolist() == [1, 0]


def test_separate_archives_and_kaggle_inputs(tmp_path, monkeypatch):
    write_tree(tmp_path / "a" / "VOCtrainval_06-Nov-2007", "2007", {"trainval": {"1": obj()}})
    write_tree(tmp_path / "a" / "VOCtest_06-Nov-2007", "2007", {"test": {"2": obj()}})
    splits = ("2007/trainval", "2007/test")
    assert [Path(r.image).stem for r in read_voc(tmp_path / "a", splits, VOC_CLASSES)] == ["1", "2"]
    monkeypatch.setattr("src.data.voc.KAGGLE_INPUTS", tmp_path)
    assert [Path(r.image).stem for r in read_voc("nowhere", splits, VOC_CLASSES)] == ["1", "2"]
    assert list_splits(tmp_path / "a") == [
        "2007/test",
        "2007/trainval",
    ]  # each once, though both searches find it


@pytest.mark.parametrize("owner", ["", "datasets/ada/"])
@pytest.mark.parametrize(
    "folder", ["", "VOCdevkit/", "VOC_dataset/VOCdevkit/", "a/VOCtest_06-Nov-2007/VOCdevkit/"]
)
def test_layouts_of_kaggle_data_sets(tmp_path, monkeypatch, owner, folder):
    """Inputs are mounted at NAME or at datasets/OWNER/NAME. Uploaders keep, add and leave out folders."""
    write_tree(tmp_path / "made", "2007", {"test": {"1": obj()}})
    monkeypatch.setattr("src.data.voc.KAGGLE_INPUTS", tmp_path / "input")
    target = tmp_path / "input" / f"{owner}pascal-voc/{folder}VOC2007"
    target.parent.mkdir(parents=True)
    (tmp_path / "made/VOCdevkit/VOC2007").rename(target)
    assert Path(read_voc("nowhere", ("2007/test",), VOC_CLASSES)[0].image).parents[1] == target


def test_a_missing_tree_names_the_list_and_the_solution(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"VOC2007.ImageSets.Main.test\.txt is missing.*VOC_ROOT.*shapes"
    ):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    write_tree(tmp_path, "2012", {"train": {"1": obj()}, "cat_train": {}})
    with pytest.raises(
        FileNotFoundError,
        match=r"test\.txt is missing\. There are 2012/train: set Config.train_splits and",
    ):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (obj("unicorn"), r"object 1 has class 'unicorn', which is not in Config.classes"),
        (obj() + obj("dog", box=""), r"object 2 \(dog\) has no <bndbox>, but needs exactly one"),
        (
            obj(box=BOX.replace("<xmin>11</xmin>", "")),
            r"has no <bndbox/xmin>, but needs exactly one",
        ),
        (obj(box=BOX.replace("60", "sixty")), r"<bndbox/ymax> is 'sixty'"),
        (obj(box=BOX.replace("11", "51")), r"is empty or outside"),
        (obj(box=BOX.replace("11", "-9")), r"is empty or outside"),
        (obj(box=BOX.replace("60", "90")), r"outside the image of 100 x 80 pixels"),
        (obj(box=BOX.replace("60", "nan")), r"<bndbox/ymax> is 'nan', not a number"),
        (obj(box=BOX.replace("60", "inf")), r"is empty or outside"),
        ("<object>", r"is not an XML annotation"),
        (obj(difficult="<difficult>yes</difficult>"), r"<difficult> is 'yes', not 0 or 1"),
        (
            "<size><width>80</width><height>100</height></size>",
            r"<size> is 80 x 100, but the image has 100 x 80",
        ),
    ],
)
def test_bad_annotations_name_file_and_field(tmp_path, inside, message):
    write_tree(tmp_path, "2007", {"test": {"000007": inside}})
    with pytest.raises(ValueError, match=r"000007\.xml.*" + message):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)


def test_entities_are_refused_in_any_encoding(tmp_path):
    for encoding in ("utf-8", "utf-16"):
        file = tmp_path / f"{encoding}.xml"
        file.write_bytes(
            '<!DOCTYPE a [<!ENTITY x "ha">]><annotation>&x;</annotation>'.encode(encoding)
        )
        assert "DOCTYPE" in read_annotation(file, VOC_CLASSES)[0].text


def test_a_box_one_pixel_outside_is_clipped(tmp_path):
    box = "<bndbox><xmin>0</xmin><ymin>0</ymin><xmax>101</xmax><ymax>81</ymax></bndbox>"
    write_tree(tmp_path, "2007", {"test": {"1": obj(box=box)}})
    assert read_voc(tmp_path, ("2007/test",), VOC_CLASSES)[0].boxes.tolist() == [[0, 0, 100, 80]]


def bad_tree(root: Path) -> Path:
    """Write seven images, five of them bad, with six problems."""
    good, wrong = obj(), obj("unicorn") + obj("dog", box=BOX.replace("60", "600"))
    trainval = {"1": good, "2": wrong, "3": good, "4": good}
    write_tree(root, "2007", {"trainval": trainval, "test": {"5": "<object>", "6": good}})
    folder = write_tree(root, "2007", {"cat_trainval": {"7": good}}) / "VOCdevkit" / "VOC2007"
    complete = (folder / "JPEGImages" / "4.jpg").read_bytes()
    (folder / "JPEGImages" / "4.jpg").write_bytes(complete[:400])
    (folder / "JPEGImages" / "3.jpg").unlink()
    (folder / "Annotations" / "3.xml").unlink()
    return root


def test_check_lists_all_problems(tmp_path, capsys):
    assert len(check(bad_tree(tmp_path), VOC_CLASSES)) == 6
    *lines, last = capsys.readouterr().out.splitlines()
    for name, problem in (
        ("2.xml: object 1", "unicorn"),
        ("2.xml: object 2 (dog)", "600.0"),
        ("3.jpg", "missing"),
        ("3.xml", "missing"),
        ("4.jpg", "be read as an image"),
        ("5.xml", "not an XML"),
    ):
        assert sum(name in line and problem in line for line in lines) == 1, name
    assert last.startswith("6 images in 2 splits: 2 good, with 2 boxes; 4 bad: 2 missing file, 1 ")


def test_exit_status_of_the_command(tmp_path, monkeypatch, capsys):
    write_tree(tmp_path / "good", "2012", {"train": {"1": obj("gnu")}})
    for folder, status in ((tmp_path / "good", 0), (bad_tree(tmp_path / "bad"), 1)):
        monkeypatch.setattr("sys.argv", ["check", str(folder), "--classes", "gnu, cat"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert exit_info.value.code == status
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="no VOCdevkit folder, no data.yaml and no COCO file"):
        main()


def test_training_refuses_a_bad_tree_or_leaves_out_bad_images(tmp_path, capsys):
    splits = {"train_splits": ("2007/trainval",), "val_splits": ("2007/test",)}
    config = Config(data_root=str(bad_tree(tmp_path)), cache_gb=0, **splits)
    with pytest.raises(
        ValueError,
        match=r"(?s)1 of 2 images of 2007/test.*5\.xml.*src.data.check .*skip_bad_files=True",
    ):
        DetectionDataModule(config).setup()
    with pytest.raises(
        ValueError, match=r"(?s)3 of 4 images of 2007/trainval.*2\.xml.*3\.jpg.*3\.xml.*4\.jpg"
    ):
        DetectionDataModule(config.replace(val_splits=("2007/cat_trainval",))).setup()
    data = DetectionDataModule(config.replace(skip_bad_files=True))
    data.setup()
    assert (len(data.train_records), len(data.val_records)) == (1, 1)
    assert "3 of 4 images of 2007/trainval can't be used" in capsys.readouterr().out


def test_a_long_error_shows_ten_problems_and_a_count(tmp_path):
    write_tree(
        tmp_path,
        "2007",
        {"test": {str(number): obj("unicorn") for number in range(40)} | {"good": obj()}},
    )
    with pytest.raises(ValueError, match="40 of 41 images.*40 class") as error:
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 10 + 2 and lines[11] == "and 30 more problems."


def test_no_usable_image_is_an_error_with_skip_bad(tmp_path):
    write_tree(tmp_path, "2007", {"test": {"1": obj("unicorn")}})
    with pytest.raises(ValueError, match="No image is left"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES, skip_bad_files=True)


def test_a_list_that_is_not_text(tmp_path):
    folder = (
        write_tree(tmp_path, "2007", {"test": {"1": obj()}}) / "VOCdevkit/VOC2007/ImageSets/Main"
    )
    (folder / "test.txt").write_bytes(b"\xff\xfe1\x00")
    with pytest.raises(ValueError, match=r"test\.txt is not a list"):
        read_voc(tmp_path, ("2007/test",), VOC_CLASSES)
    (folder / "test.txt").write_bytes(b"\xef\xbb\xbf1\r\n")  # byte order mark and CRLF
    assert len(read_voc(tmp_path, ("2007/test",), VOC_CLASSES)) == 1


def test_only_missing_splits_are_downloaded(tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(
        "torchvision.datasets.VOCDetection", lambda root, **options: requests.append(options)
    )
    write_tree(tmp_path, "2007", {"trainval": {"1": obj()}})
    download_voc(tmp_path, ("2007/trainval", "2012/trainval", "2007/test", "2012/mine"))
    assert requests == [
        {"year": year, "image_set": name, "download": True}
        for year, name in (("2012", "trainval"), ("2007", "test"))
    ]


def test_no_download_into_a_tree_with_lists(tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(
        "torchvision.datasets.VOCDetection", lambda root, **options: requests.append(options)
    )
    write_tree(tmp_path, "2012", {"train": {"1": obj()}})
    download_voc(tmp_path, ("2012/train", "2012/val", "2012/trainval"))
    own = Config(
        classes=("mask",),
        data_root=str(tmp_path / "mistyped"),
        train_splits=("2012/train",),
        val_splits=("2012/val",),
    )
    DetectionDataModule(own).prepare_data()
    assert not requests
    with pytest.raises(FileNotFoundError, match="mistyped"):
        DetectionDataModule(own).setup()


def test_voc_is_downloaded_into_the_default_or_an_existing_folder_only(tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(
        "torchvision.datasets.VOCDetection", lambda root, **_: requests.append(str(root))
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOC_ROOT", raising=False)
    mistyped = DetectionDataModule(Config(data_root=str(tmp_path / "mistyped")))
    with pytest.raises(
        FileNotFoundError, match=r"mistyped does not exist.*Config\.data_root.*create it"
    ):
        mistyped.prepare_data()
    assert not requests and not any(tmp_path.iterdir())
    (tmp_path / "mistyped").mkdir()
    mistyped.prepare_data()
    DetectionDataModule(Config()).prepare_data()  # the folder "data" does not exist
    assert requests == [str(tmp_path / "mistyped")] * 3 + ["data"] * 3


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("sub/helmets.yaml", "nc: 1\nnames: [a]"),
        ("a/b/x.json", '{"images": 0, "annotations": 0, "categories": 0}'),
    ],
)
def test_voc_is_not_downloaded_beside_another_data_set(tmp_path, monkeypatch, file, text):
    requests = []
    monkeypatch.setattr(
        "torchvision.datasets.VOCDetection", lambda root, **_: requests.append(root)
    )
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    data = DetectionDataModule(Config(data_root=str(tmp_path)))
    with pytest.raises(
        FileNotFoundError, match=rf"has no VOCdevkit, but .*{Path(file).name}.*Config\.data_root"
    ):
        data.prepare_data()
    assert not requests
    (tmp_path / file).write_text("{}")
    data.prepare_data()
    assert requests


def test_a_failed_download_names_the_solution(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", refuse)
    with pytest.raises(RuntimeError, match=r"VOC 2007/test.*no route to host.*VOC_ROOT.*shapes"):
        download_voc(tmp_path, ("2007/test",))


def test_an_interrupted_unpacking_is_repeated(tmp_path, monkeypatch):
    """The lists are there before all photographs are."""

    def interrupted(root, **_):
        write_tree(tmp_path, "2012", {"train": {"1": obj()}})
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.VOCDetection", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download_voc(tmp_path, ("2012/train",))
    requests = []
    monkeypatch.setattr(
        "torchvision.datasets.VOCDetection",
        lambda root, **options: requests.append(options["image_set"]),
    )
    download_voc(tmp_path, ("2012/train",))
    download_voc(tmp_path, ("2012/train",))
    assert requests == ["train"]


def test_suffixes_in_capitals_are_found(tmp_path):
    write_tree(tmp_path, "2012", {"train": {"1": obj()}})
    image = next(tmp_path.rglob("1.jpg"))
    image.rename(image.with_suffix(".JPG"))
    (record,) = read_voc(tmp_path, ("2012/train",), VOC_CLASSES)
    assert record.image.endswith(".JPG")


@pytest.mark.skipif("VOC_ROOT" not in os.environ, reason="VOC_ROOT is not set")
def test_a_real_tree():
    root = Path(os.environ["VOC_ROOT"])
    splits = sorted(
        f"{f.parents[2].name[3:]}/{f.stem}"
        for f in root.glob("VOCdevkit/VOC*/ImageSets/Main/[tv]*.txt")
        if "_" not in f.stem
    )
    records = read_voc(root, tuple(splits), VOC_CLASSES)
    assert splits and records
    for record in records[::50]:
        with Image.open(record.image) as image:
            assert (record.boxes >= 0).all() and (record.boxes[:, 2:] <= image.size).all()
