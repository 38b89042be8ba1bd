"""Data set formats: recognize one, take settings from it, read its splits."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from src.config import VOC_CLASSES, Config
from src.data import coco, voc, yolo
from src.data.records import ImageRecord, usable_records

FORMATS = {"voc": voc, "yolo": yolo, "coco": coco}
OBJECT_FIELDS = ("boxes", "labels", "difficult")  # of an ImageRecord, one entry per object


def detect_format(root: str | Path) -> str:
    """Return "yolo" if `root` has a data.yaml, "coco" if it has COCO files, and "voc" otherwise, or if it has a VOCdevkit."""
    if voc.has_tree(root):
        return "voc"
    if yolo.find_yaml(root):
        return "yolo"
    return "coco" if coco.find_files(root) else "voc"


def resolve(config: Config) -> Config:
    """Replace defaults that don't fit the data set: format, splits, and the classes of YOLO and COCO data sets."""
    if config.dataset == "shapes":
        return config
    root = config.data_root
    dataset = detect_format(root) if config.dataset == "voc" else config.dataset
    train, val = train_val_splits(FORMATS[dataset].list_splits(root))
    if dataset == "voc" and not any(split.endswith("/*") for split in train):
        return config
    return config.replace(
        dataset=dataset,
        classes=FORMATS[dataset].class_names(root)
        if config.classes == VOC_CLASSES
        else config.classes,
        train_splits=train if config.train_splits == Config.train_splits else config.train_splits,
        val_splits=val if config.val_splits == Config.val_splits else config.val_splits,
    )


def train_val_splits(splits: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Select the training and the validation splits by their names, such as "train", "valid" or "lvis_v1_val".

    Without a name that says "train", those that say neither "val" nor "test" are for training. None may be for validation.
    """
    by_role = {"train": [], "val": [], "test": [], "": []}
    for split in splits:
        by_role[_role(split)].append(split)
    return tuple(by_role["train"] or by_role[""]), tuple(by_role["val"])


def _role(split: str) -> str:
    """Return "train", "val" or "test", whichever starts a word of the name first, or ""."""
    found = re.search(r"(?:^|[-_./ ])(train|val|test)", split.lower())
    return found[1] if found else ""


def read_splits(config: Config) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Read the training and validation records.

    Without `val_splits`, a random fraction `val_fraction` of the training images is used for validation.
    Training leaves out COCO's crowds: the box of many objects is no example of one.
    """
    train, val = _read_splits(config)
    if config.dataset == "coco":
        train = [
            record._replace(**{n: getattr(record, n)[~record.difficult] for n in OBJECT_FIELDS})
            for record in train
        ]
    return train, val


def _read_splits(config: Config) -> tuple[list[ImageRecord], list[ImageRecord]]:
    if config.val_splits:
        val = read_records(config, config.val_splits)
        return read_records(config, config.train_splits), val
    records = read_records(config, config.train_splits)
    count = max(1, round(config.val_fraction * len(records)))
    if count >= len(records):
        raise ValueError(
            f"{config.data_root} has {len(records)} images: too few to use {count} of them for validation."
        )
    print(
        f"{config.data_root} has no validation split. {count:,} of {len(records):,} images are used for validation "
        f"(Config.val_fraction = {config.val_fraction:g}, random with seed {config.seed})."
    )
    chosen = set(np.random.default_rng(config.seed).permutation(len(records))[:count].tolist())
    val = [record for index, record in enumerate(records) if index in chosen]
    return [record for index, record in enumerate(records) if index not in chosen], val


def read_records(config: Config, splits: tuple[str, ...]) -> list[ImageRecord]:
    """Read the records of some splits. Raises FileNotFoundError or ValueError that lists all problems."""
    reader = FORMATS[config.dataset]
    results = [
        reader.read_image_record(*item, config.classes)
        for item in reader.list_images(config.data_root, splits)
    ]
    return usable_records(results, config.data_root, splits, config.classes, config.skip_bad_files)
