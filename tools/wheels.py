"""Prepare this folder for machines without internet, such as Kaggle's: download missing packages.

python -m tools.wheels
"""

import json
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path("requirements.txt")
OFFLINE = "--no-index\n--find-links wheels\n"  # options of pip


def missing_packages() -> list[str]:
    """Return the address of each package that `pip install -r requirements.txt` would install."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--dry-run",
        "--report",
        "-",
        "-r",
        str(REQUIREMENTS),
    ]
    report = subprocess.run(pip, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [item["download_info"]["url"] for item in json.loads(report)["install"]]


def main() -> None:
    """Write the wheels, and options into requirements.txt so that pip installs only from them."""
    requirements = REQUIREMENTS.read_text(encoding="utf-8").removeprefix(OFFLINE)
    REQUIREMENTS.write_text(
        requirements, encoding="utf-8"
    )  # an earlier call's options would hide what is missing
    packages = missing_packages()
    Path("wheels").mkdir(exist_ok=True)
    if packages:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            "wheels",
            *packages,
        ]
        subprocess.run(pip, check=True)
    REQUIREMENTS.write_text(OFFLINE + requirements, encoding="utf-8")
    print("wheels:", *sorted(path.name for path in Path("wheels").iterdir()), sep="\n  ")


if __name__ == "__main__":
    main()
