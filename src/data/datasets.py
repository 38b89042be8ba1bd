"""Data sets: recognize the format, take settings from it, read the splits.

A reader is a class with the data set's own `classes` (empty if it names none), the names of its
`splits`, `list_images(split)`: (image, annotation) pairs, and `read(annotation,
image size)`: objects (class name, box xyxy in pixels, difficult), and the stated image size or
None. It only reads: `make_records` decides what is used.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from src.config import VOC_CLASSES, Config
from src.data.coco import COCOReader
from src.data.records import BAD_FILES, OTHER_CLASSES, ImageRecord, make_records
from src.data.voc import VOCReader
from src.data.yolo import YOLOReader

READERS = {"voc": VOCReader, "yolo": YOLOReader, "coco": COCOReader}


def open_dataset(config: Config) -> tuple:
    """Return the reader of a data set, and the config with its format, splits and classes.

    Only defaults are replaced, and VOC's fit a VOC tree. The synthetic data set has no reader.
    """
    if config.dataset == "shapes":
        return None, config.replace(train_splits=("training",), val_splits=("validation",))
    names = READERS if config.dataset == "voc" else [config.dataset]
    readers = ((name, READERS[name](config.data_root)) for name in names)
    found = next((pair for pair in readers if pair[1].splits), None)
    dataset, reader = found or (config.dataset, READERS[config.dataset](config.data_root))
    if dataset == "voc" or not found:
        return reader, config
    train, val = train_val_splits(reader.splits)
    return reader, config.replace(
        dataset=dataset,
        classes=reader.classes if config.classes == VOC_CLASSES else config.classes,
        train_splits=train
        if train and config.train_splits == Config.train_splits
        else config.train_splits,
        val_splits=val if config.val_splits == Config.val_splits else config.val_splits,
    )


def train_val_splits(splits: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Select the training and validation splits by their names: "train", "valid", "lvis_v1_val".

    Without a name that says "train", those that say neither "val" nor "test" are for training.
    None may be for validation.
    """
    train = tuple(split for split in splits if "train" in split.lower())
    val = tuple(split for split in splits if "val" in split.lower() and split not in train)
    others = tuple(split for split in splits if split not in val and "test" not in split.lower())
    return train or others, val


def read_splits(reader, config: Config) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Read the training and validation records.

    Without `val_splits`, a random fraction `val_fraction` of the training images is used for
    validation. Training leaves out COCO's crowds: the box of many objects is no example of one.
    Raises FileNotFoundError or ValueError that names what is missing or unusable.
    """
    train, other_classes, _ = read_records(reader, config.train_splits, config)
    check_classes(train, other_classes, reader, config)
    if config.val_splits:
        val, *_ = read_records(reader, config.val_splits, config)
    elif len(train) == 1:
        raise ValueError(
            f"{config.data_root} has a single image and no validation split. Set Config.val_splits "
            f"to {config.train_splits} to validate on the training image."
        )
    else:
        count = min(len(train) - 1, max(1, round(config.val_fraction * len(train))))
        print(
            f"{config.data_root} has no validation split. {count:,} of {len(train):,} images are "
            f"used for validation (Config.val_fraction = {config.val_fraction:g}, random with seed "
            f"{config.seed})."
        )
        order = np.random.default_rng(config.seed).permutation(len(train))
        val = [train[index] for index in sorted(order[:count])]
        train = [train[index] for index in sorted(order[count:])]
    if config.dataset == "coco":
        train = [
            ImageRecord(record.image, *(column[~record.difficult] for column in record[1:]))
            for record in train
        ]
    return train, val


def read_records(
    reader, splits: Sequence[str], config: Config, check: bool = False
) -> tuple[list[ImageRecord], list[str], list[str]]:
    """Return records, the class of each object of other classes, and the images left out.

    check: see `make_records`; any image may be left out.
    """
    all_records, other_classes, bad_files = [], [], []
    for split in splits:
        items = reader.list_images(split)
        if not items:
            raise FileNotFoundError(
                f"{config.data_root} has no images of the split {split!r} in the format "
                f"{config.dataset!r}. Its splits are {reader.splits}: set Config.train_splits and "
                "Config.val_splits to some of them (empty val_splits take a part of the training "
                "images). Or set Config.data_root (before Python starts, the environment variable "
                "VOC_ROOT) to the folder that contains VOCdevkit, data.yaml or COCO files, or use "
                'Config(dataset="shapes").'
            )
        records, cases = make_records(reader, split, items, config.classes, check)
        if cases[BAD_FILES] and not check and not (config.skip_bad_files and records):
            raise ValueError(
                f"{len(cases[BAD_FILES]):,} of {len(items):,} images of {split} can't be used:\n  "
                + "\n  ".join(cases[BAD_FILES][:10])
                + f"\nList all with `python -m src.data.check {config.data_root!r}`. "
                "Config(skip_bad_files=True) leaves them out"
                + (", but no image is left." if config.skip_bad_files else ".")
            )
        all_records += records
        other_classes += cases[OTHER_CLASSES]
        bad_files += cases[BAD_FILES]
    return all_records, other_classes, bad_files


def check_classes(
    records: list[ImageRecord], other_classes: list[str], reader, config: Config
) -> None:
    """Raise ValueError if a class has no object in the training split: a typing mistake, perhaps.

    A data set's own list of classes may have unused ones.
    """
    found = Counter(config.classes[label] for record in records for label in record.labels)
    absent = [name for name in config.classes if name not in found]
    if absent and not (found and set(config.classes) == set(reader.classes)):
        raise ValueError(
            f"The training split of {config.data_root} has no objects of {', '.join(absent)}, "
            f"but of {dict((found + Counter(other_classes)).most_common()) or 'no class'}. "
            "Correct Config.classes."
        )


def check(root: str, classes: tuple[str, ...] = VOC_CLASSES) -> list[str]:
    """Decode every image of a VOC, YOLO or COCO data set, and print each case of the policy.

    classes: the default stands for those of data.yaml or of the COCO files, or VOC's.
    Returns the images that can't be used. Raises FileNotFoundError or ValueError if a file of the
    data set itself is not valid, or if a class has no object in any split.
    """
    reader, config = open_dataset(Config(data_root=root, classes=classes))
    if not reader.splits:
        raise FileNotFoundError(f"{root} has no VOCdevkit folder, no data.yaml and no COCO file.")
    records, other_classes, bad_files = read_records(reader, reader.splits, config, check=True)
    check_classes(records, other_classes, reader, config)
    return bad_files
