"""List every problem of a data set: python -m src.data.check FOLDER [--classes a,b]"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from src.config import VOC_CLASSES
from src.data.formats import FORMATS, detect_format
from src.data.records import Problem, count_kinds


def check(root: str | Path, classes: tuple[str, ...] = ()) -> list[Problem]:
    """Decode every image of a VOC, YOLO or COCO data set, print all problems and their counts, and return the problems.

    classes: default: those of data.yaml or of the COCO files, or VOC's. VOC's lists of one class, such as
    cat_train.txt, are not read. Raises FileNotFoundError or ValueError if a file of the data set itself is not valid.
    """
    reader = FORMATS[detect_format(root)]
    classes = classes or reader.class_names(root)
    splits = [
        split
        for split in reader.list_splits(root)
        if split.partition("/")[2].rpartition("_")[0] not in {*classes, *VOC_CLASSES}
    ]
    if not splits:
        raise FileNotFoundError(f"{root} has no VOCdevkit folder, no data.yaml and no COCO file.")
    items = {
        item[:2]: item for item in reader.list_images(root, splits)
    }  # an image may be in several splits
    problems, num_boxes, num_valid = [], 0, 0
    for item in tqdm(items.values(), unit="image", leave=False, disable=None):
        record, image_problems = reader.read_image_record(*item, classes, decode=True)
        problems += image_problems
        if record is not None:
            num_valid += 1
            num_boxes += len(record.labels)
        for problem in image_problems:
            tqdm.write(problem.text, file=sys.stdout)
    bad = f"{len(items) - num_valid:,} bad: {count_kinds(problems)}" if problems else "none bad"
    print(
        f"{len(items):,} images in {len(splits)} splits: {num_valid:,} good, with {num_boxes:,} boxes; {bad}."
    )
    return problems


def main() -> None:
    """Run the command. The exit status is 1 if an image can't be used."""
    parser = argparse.ArgumentParser(
        prog="python -m src.data.check", description="List every problem of a data set."
    )
    parser.add_argument(
        "folder", help="the folder that contains VOCdevkit, data.yaml or COCO files"
    )
    parser.add_argument(
        "--classes",
        default="",
        help="class names, separated by commas; default: the data set's, or VOC's",
    )
    args = parser.parse_args()
    classes = tuple(name.strip() for name in args.classes.split(",") if name.strip())
    try:
        sys.exit(bool(check(args.folder, classes)))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
