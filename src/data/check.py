"""List what training would change or refuse: python -m src.data.check FOLDER [--classes a,b]"""

import argparse
import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from src.config import VOC_CLASSES, Config
from src.data.datasets import check_classes, open_dataset, train_val_splits
from src.data.records import BAD_FILES, OTHER_CLASSES, make_records


def check(root: str | Path, classes: tuple[str, ...] = VOC_CLASSES) -> list[str]:
    """Decode every image of a VOC, YOLO or COCO data set, and print each case of the policy.

    classes: the default stands for those of data.yaml or of the COCO files, or VOC's.
    Returns the images that can't be used. Raises FileNotFoundError or ValueError if a file of the
    data set itself is not valid, or if a class has no object in the training splits.
    """
    reader, config = open_dataset(Config(data_root=root, classes=classes))
    if not reader.splits:
        raise FileNotFoundError(f"{root} has no VOCdevkit folder, no data.yaml and no COCO file.")
    train_splits, _ = train_val_splits(reader.splits)
    train_records, train_cases, bad_files = [], defaultdict(list), []
    for split in reader.splits:
        progress = tqdm(reader.list_images(split), unit="image", leave=False, disable=None)
        records, cases = make_records(reader, split, progress, config.classes, decode=True)
        bad_files += cases[BAD_FILES]
        if split in train_splits:
            train_records += records
            train_cases[OTHER_CLASSES] += cases[OTHER_CLASSES]
        for case in chain(*(cases[kind] for kind in cases if kind != OTHER_CLASSES)):
            print(f"  {case}")
    check_classes(train_records, train_cases[OTHER_CLASSES], reader, config)
    return bad_files


def main() -> None:
    """Run the command. The exit status is 1 if training would refuse the data set."""
    parser = argparse.ArgumentParser(prog="python -m src.data.check", description=check.__doc__)
    parser.add_argument("folder", help="the folder of VOCdevkit, data.yaml or COCO files")
    parser.add_argument(
        "--classes",
        help="names, separated by commas",
        type=lambda text: tuple(text.split(",")),
        default=VOC_CLASSES,
    )
    args = parser.parse_args()
    try:
        sys.exit(bool(check(args.folder, args.classes)))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
