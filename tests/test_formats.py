"""YOLO and COCO data sets: layouts, edge cases, problems, one epoch of training per format."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.config import Config
from src.data.coco import COCOReader
from src.data.datamodule import DetectionDataModule
from src.data.datasets import open_dataset, read_splits, train_val_splits
from tests.test_voc import obj, write_tree

DATA_YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [dog, 'no']\n"
LINE = "0 0.3 0.5 0.4 0.5\n"  # [10, 20, 50, 60] of 100 x 80 pixels
CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 7, "name": "no"}]


def save_image(path: Path, size=(100, 80)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write_yolo(root: Path, labels: dict[str, str | None], data: str = DATA_YAML) -> Path:
    """Write a YOLO data set of {image path: content of its label file, or None for no file}."""
    for name, text in labels.items():
        save_image(root / name)
        label = Path(
            *("labels" if part == "images" else part for part in Path(name).parts)
        ).with_suffix(".txt")
        (root / label).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (root / label).write_text(text)
    (root / "data.yaml").write_text(data)
    return root


def coco_data(num_images: int = 2, **changes) -> dict:
    """COCO content with one box [10, 20, 50, 60] in the first image. changes: to its annotation."""
    images = [
        {"id": i, "file_name": f"{i}.png", "width": 100, "height": 80}
        for i in range(1, num_images + 1)
    ]
    annotation = {
        "id": 5,
        "image_id": 1,
        "category_id": 7,
        "bbox": [10, 20, 40, 40],
        "iscrowd": 0,
    } | changes
    return {"images": images, "annotations": [annotation], "categories": CATEGORIES}


def write_coco(path: Path, data: dict, images: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    for entry in data["images"]:
        save_image(images / entry["file_name"])


def splits_of(root: Path, **changes) -> tuple[Config, list, list]:
    reader, config = open_dataset(Config(data_root=str(root), **changes))
    return config, *read_splits(reader, config)


YOLO_LAYOUTS = {  # data.yaml, images
    "ultralytics": (DATA_YAML, ("images/train/a.jpg", "images/val/b.png")),
    "roboflow": (
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n"
        "names: ['dog', 'no']\n",
        ("train/images/a.jpg", "valid/images/b.JPEG"),
    ),
    "mapping": (
        "path: /content/elsewhere\ntrain: images/train\nval: images/val\n"
        "names:\n  0: dog\n  1: no\n",
        ("images/train/a.bmp", "images/val/sub/b.webp"),
    ),
    "lists": (
        "train: train.txt\nval: [val.txt]\nnames: [dog, no]\n",
        ("images/a.jpg", "images/b.tif"),
    ),
    "beside": ("train: train\nval: val\nnames: [dog, no]\n", ("train/a.jpg", "val/b.jpg")),
}


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_yolo_layouts(tmp_path, layout, monkeypatch):
    data, (train_image, val_image) = YOLO_LAYOUTS[layout]
    write_yolo(tmp_path, {train_image: LINE, val_image: "1 0.5 0.5 1 1\n"}, data)
    (tmp_path / "train.txt").write_text(f"./{train_image}\n\n")
    (tmp_path / "val.txt").write_text(f"\ufeff{tmp_path / val_image}\r\n", encoding="utf-8")
    config, (train,), (val,) = splits_of(tmp_path)
    assert (config.dataset, config.classes) == ("yolo", ("dog", "no"))
    assert (config.train_splits, config.val_splits) == (("train",), ("val",))
    assert (
        Path(train.image).resolve() == tmp_path / train_image
        and Path(val.image).resolve() == tmp_path / val_image
    )
    np.testing.assert_allclose(train.boxes, [[10, 20, 50, 60]], atol=1e-4)
    np.testing.assert_allclose(val.boxes, [[0, 0, 100, 80]], atol=1e-4)
    assert (
        train.labels.tolist() == [0]
        and val.labels.tolist() == [1]
        and train.difficult.tolist() == [False]
    )
    assert (
        open_dataset(config)[1] == config
        and splits_of(tmp_path / "data.yaml")[0].classes == config.classes
    )
    monkeypatch.chdir(tmp_path)
    assert splits_of(Path("."))[1][0].labels.tolist() == [0]


def test_yolo_images_without_objects_and_polygons(tmp_path):
    polygon = "1 0.1 0.25 0.5 0.3 0.4 0.75\n"
    write_yolo(
        tmp_path,
        {
            "images/train/a.jpg": "",
            "images/train/b.jpg": None,
            "images/train/c.jpg": polygon + "\n" + LINE,
            "images/val/d.jpg": LINE,
        },
    )
    _, train, _ = splits_of(tmp_path)
    assert [len(record.boxes) for record in train] == [0, 0, 2]
    np.testing.assert_allclose(
        train[2].boxes, [[10, 20, 50, 60]] * 2, atol=1e-4
    )  # the box around the polygon


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.5", "not an index of `names` and cx, cy, w, h or a polygon"),
        ("0 0.5 0.5 0.5 0.5 0.9", "not an index"),
        ("0 0.5 0.5 0.5 x", "could not convert string to float: 'x'"),
        ("2 0.5 0.5 0.5 0.5", "not an index"),
        ("-1 0.5 0.5 0.5 0.5", "not an index"),
        ("0.5 0.5 0.5 0.5 0.5", "not an index"),
        ("nan 0.5 0.5 0.5 0.5", "not an index"),
    ],
)
def test_yolo_problems_name_the_file(tmp_path, line, message):
    images = {"images/train/a.jpg": LINE + line, "images/train/b.jpg": LINE}
    write_yolo(tmp_path, images | {"images/val/c.jpg": LINE})
    with pytest.raises(ValueError, match=rf"(?s)1 of 2 images of train.*a\.txt: .*{message}"):
        splits_of(tmp_path)
    assert len(splits_of(tmp_path, skip_bad_files=True)[1]) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("[", r"data\.yaml is not a YAML file"),
        ("", "with `names`"),
        ("train: images/train\nval: images/val\nnc: 2\n", "with `names`, a list"),
        ("names: dog\n", "with `names`, a list"),
        ("names: {a: dog}\n", "with `names`, a list"),
        ("names: [[dog]]\n", "with `names`, a list"),
        ("names: 3\n", "with `names`, a list"),
        (
            "names: [dog, no]\ntrain: images/nowhere\nval: images/val\n",
            "No such file or directory: .*images/nowhere",
        ),
        ("names: [dog, no]\nval: images/val\n", r"Its splits are \['val'\]"),
        (
            "names: [dog, no]\ntrain: images/empty\nval: images/val\n",
            "no images of the split 'train'",
        ),
        (
            "names: [dog, no]\ntrain: noise.txt\nval: images/val\n",
            r"1 of 1 images of train",
        ),
    ],
)
def test_invalid_data_yaml(tmp_path, data, message):
    write_yolo(tmp_path, {"images/train/a.jpg": LINE, "images/val/b.jpg": LINE}, data)
    (tmp_path / "images/empty").mkdir()
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe1\x00")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        splits_of(tmp_path)


def test_unused_classes_of_a_data_set_are_no_mistake(tmp_path):
    write_yolo(tmp_path, {"images/train/a.jpg": LINE, "images/val/b.jpg": LINE})
    assert splits_of(tmp_path)[0].classes == ("dog", "no")
    assert splits_of(tmp_path, classes=("no", "dog"))[1][0].labels.tolist() == [1]
    (tmp_path / "labels/train/a.txt").unlink()
    with pytest.raises(ValueError, match="has no objects of dog, no, but of no class"):
        splits_of(tmp_path)


COCO_LAYOUTS = {  # JSON files and image folders of training and validation
    "coco": (
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_val2017.json", "val2017"),
    ),
    "coco images": (
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_val.json", "images/val"),
    ),
    "roboflow": (
        ("train/_annotations.coco.json", "train"),
        ("valid/_annotations.coco.json", "valid"),
    ),
    "fiftyone": (
        ("train/labels.json", "train/data"),
        ("validation/labels.json", "validation/data"),
    ),
    "root": (("train.json", "images"), ("val.json", "images")),
    "suffixes": (("annotations_train.json", "images"), ("lvis_v1_val.json", "images")),
}


@pytest.mark.parametrize("layout", COCO_LAYOUTS)
def test_coco_layouts(tmp_path, layout):
    for (file, images), changes in zip(
        COCO_LAYOUTS[layout], ({}, {"iscrowd": 1, "category_id": 3}), strict=True
    ):
        write_coco(tmp_path / file, coco_data(**changes), tmp_path / images)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(coco_data()))
    (tmp_path / "package.json").write_text('{"name": "something else"}')
    config, train, val = splits_of(tmp_path)
    assert (config.dataset, config.classes) == ("coco", ("dog", "no"))
    assert [record.boxes.tolist() for record in train] == [
        [[10, 20, 50, 60]],
        [],
    ]  # without annotations: kept
    assert train[0].labels.tolist() == [1] and val[0].labels.tolist() == [0]
    assert not train[0].difficult.any() and val[0].difficult.all()
    assert open_dataset(config)[1] == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1}]}, "KeyError.'file_name'"),
        ({"annotations": [1]}, "TypeError"),
        ({"categories": [{"id": 1, "name": ["a"]}]}, "AttributeError"),
    ],
)
def test_invalid_coco_files_are_named(tmp_path, changes, message):
    (tmp_path / "train.json").write_text(json.dumps(coco_data() | changes))
    with pytest.raises(ValueError, match=rf"train\.json is not a valid COCO file: {message}"):
        splits_of(tmp_path)


def test_coco_crowds_are_validated_but_not_trained(tmp_path):
    data = coco_data()
    data["annotations"].append(
        {**data["annotations"][0], "id": 6, "iscrowd": 1, "bbox": [0, 0, 90, 70]}
    )
    for name in ("train", "val"):
        write_coco(tmp_path / f"{name}.json", data, tmp_path / "images")
    _, train, val = splits_of(tmp_path)
    assert (
        train[0].boxes.tolist() == [[10, 20, 50, 60]]
        and len(train[0].labels) == len(train[0].difficult) == 1
    )
    assert val[0].difficult.tolist() == [False, True] and len(val[0].boxes) == 2


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (("annotations_test", "lvis_v1_train", "val2017"), ("lvis_v1_train",), ("val2017",)),
        (("Training", "Valid", "test-dev"), ("Training",), ("Valid",)),
        (("trainval2012", "test2007"), ("trainval2012",), ()),
        (("default", "my_test"), ("default",), ()),
    ],
)
def test_roles_of_split_names(names, train, val):
    assert train_val_splits(names) == (train, val)


def test_hidden_files_are_no_images(tmp_path):
    hidden = ("images/train/._a.jpg", "images/train/.ipynb_checkpoints/a-checkpoint.jpg")
    write_yolo(
        tmp_path / ".data",
        {"images/train/a.jpg": LINE, "images/val/b.jpg": LINE, **dict.fromkeys(hidden)},
    )
    _, train, _ = splits_of(tmp_path / ".data")
    assert [Path(record.image).name for record in train] == ["a.jpg"]
    for name in ("train.json", ".ipynb_checkpoints/train-checkpoint.json"):
        write_coco(tmp_path / "coco" / name, coco_data(), tmp_path / "coco/images")
    assert COCOReader(tmp_path / "coco").splits == ["train"]


def test_a_single_image_needs_a_validation_split(tmp_path):
    write_coco(tmp_path / "train.json", coco_data(num_images=1), tmp_path)
    with pytest.raises(ValueError, match=r"a single image .* Config.val_splits to \('train',\)"):
        splits_of(tmp_path, classes=("no",))


def test_coco_random_validation_split(tmp_path, capsys):
    """A single file, as CVAT writes it, for data_root as folder and as file."""
    write_coco(
        tmp_path / "annotations/instances_default.json",
        coco_data(num_images=10),
        tmp_path / "images",
    )
    config, train, val = splits_of(tmp_path, val_fraction=0.3)
    assert config.val_splits == () and (len(train), len(val)) == (7, 3)
    assert not {r.image for r in train} & {r.image for r in val}
    assert (
        capsys.readouterr().out.count(
            "has no validation split. 3 of 10 images are used for validation"
        )
        == 1
    )
    file = tmp_path / "annotations/instances_default.json"
    same, other = splits_of(file, val_fraction=0.3)[2], splits_of(file, val_fraction=0.3, seed=1)[2]
    assert [r.image for r in same] == [r.image for r in val] != [r.image for r in other]


@pytest.mark.parametrize(
    ("categories", "classes"),
    [
        ("animals<none dog<animals no<animals", ("dog", "no")),
        ("dog<none no<none", ("dog", "no")),
        ("dog<none dog<dog", ("dog",)),
    ],
)
def test_roboflows_root_category_is_left_out(tmp_path, categories, classes):
    """Categories as "name<supercategory"."""
    pairs = [text.split("<") for text in categories.split()]
    entries = [{"id": i, "name": a, "supercategory": b} for i, (a, b) in enumerate(pairs)]
    write_coco(tmp_path / "train.json", coco_data() | {"categories": entries}, tmp_path)
    assert COCOReader(tmp_path).classes == classes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bbox": [10, 20, 40, "wide"]}, "could not convert string to float: 'wide'"),
        ({"bbox": [10, 20, 40]}, "not enough values"),
        ({"bbox": None}, "NoneType"),
        ({"category_id": 4}, "KeyError: 4"),
    ],
)
def test_coco_problems_name_file_and_image(tmp_path, changes, message):
    data = coco_data(num_images=3, **changes)
    data["annotations"] += coco_data(image_id=2)["annotations"]
    write_coco(tmp_path / "train.json", data, tmp_path)
    with pytest.raises(
        ValueError, match=rf"(?s)1 of [34] images of train.*json: image .*{message}"
    ):
        splits_of(tmp_path)
    assert len(splits_of(tmp_path, skip_bad_files=True, val_fraction=0.5)[1]) >= 1


def test_coco_files_are_read_once(tmp_path, monkeypatch):
    for name in ("train", "val"):
        write_coco(tmp_path / f"{name}.json", coco_data(), tmp_path / "images")
    reads, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    DetectionDataModule(Config(data_root=str(tmp_path), cache_gb=0)).setup()
    assert sorted(path.name for path in reads) == ["train.json", "val.json"]


def test_detection_of_the_format(tmp_path):
    write_tree(tmp_path / "voc", "2007", {"train": {"1": obj()}})
    write_yolo(tmp_path / "yolo", {"images/train/a.jpg": LINE})
    write_coco(tmp_path / "coco/train.json", coco_data(), tmp_path / "coco")
    for name, found in {"voc": "voc", "yolo": "yolo", "coco": "coco", "none": "voc"}.items():
        assert open_dataset(Config(data_root=str(tmp_path / name)))[1].dataset == found
    for dataset in ("yolo", "coco"):
        with pytest.raises(FileNotFoundError, match=rf"format '{dataset}'. Its splits are \[\]"):
            DetectionDataModule(Config(data_root=str(tmp_path / "voc"), dataset=dataset)).setup()
