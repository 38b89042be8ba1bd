"""List what training would change or refuse: python -m src.data.check FOLDER [--classes a,b]"""

import argparse
import sys

from src.config import VOC_CLASSES
from src.data.datasets import check


def main() -> None:
    """Run the command. The exit status is 1 if training would refuse the data set."""
    parser = argparse.ArgumentParser(prog="python -m src.data.check", description=__doc__)
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
