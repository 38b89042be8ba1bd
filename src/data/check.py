"""List every problem of a data set: python -m src.data.check FOLDER [--classes a,b]"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from src.config import VOC_CLASSES
from src.data.records import Problem, count_kinds
from src.data.voc import find_in_trees, list_images, read_image_record


def check(root: str | Path, classes: tuple[str, ...]) -> list[Problem]:
    """Decode every listed image of a tree, print all problems and their counts, and return the problems.

    Lists of one class, such as cat_train.txt, are not read. Raises what `list_images` raises.
    """
    names = {*classes, *VOC_CLASSES}
    lists = [f for f in find_in_trees(root, "VOC*/ImageSets/Main/*.txt") if f.stem.rpartition("_")[0] not in names]
    images = dict.fromkeys(list_images(root, [f"{f.parents[2].name[3:]}/{f.stem}" for f in lists]))
    problems, num_boxes, num_valid = [], 0, 0
    for image in tqdm(images, unit="image", leave=False, disable=None):
        record, image_problems = read_image_record(*image, classes, decode=True)
        problems += image_problems
        num_valid, num_boxes = num_valid + (record is not None), num_boxes + (len(record.labels) if record else 0)
        for problem in image_problems:
            tqdm.write(problem.text, file=sys.stdout)
    bad = f"{len(images) - num_valid:,} bad: {count_kinds(problems)}" if problems else "none bad"
    print(f"{len(images):,} images in {len(lists)} splits: {num_valid:,} good, with {num_boxes:,} boxes; {bad}.")
    return problems


def main() -> None:
    """Run the command. The exit status is 1 if an image can't be used."""
    parser = argparse.ArgumentParser(prog="python -m src.data.check", description="List every problem of a data set.")
    parser.add_argument("folder", help="the folder that contains VOCdevkit")
    parser.add_argument("--classes", default=",".join(VOC_CLASSES), help="class names, separated by commas; default: VOC's")
    args = parser.parse_args()
    try:
        sys.exit(bool(check(args.folder, tuple(name.strip() for name in args.classes.split(",")))))
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
