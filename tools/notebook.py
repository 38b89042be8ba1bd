"""Notebooks: what their first cell needs, and the address of the repository they fetch.

python -m tools.notebook run s13_assignment.ipynb runs/shapes/s13_assignment.ipynb
python -m tools.notebook address https://github.com/NAME/REPOSITORY
python -m tools.notebook images
"""

import argparse
import base64
import json
import logging
import re
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/OWNER/REPOSITORY"
NOTEBOOKS = ("s13_assignment.ipynb", "multi_scale_s13_assignment.ipynb", "app_with_gradCAM.ipynb")
HARMLESS = (  # beginnings of libraries' warnings that a reader can do nothing about
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of PyTorch
    r"Checkpoint directory .* exists and is not empty",  # a run begun again in its own folder
    r"The number of training batches \(\d+\) is smaller than the logging interval",  # a very small run
    r"The '\w+' does not have many workers",  # Config.num_workers says how many
)
FIGURES = {"image/jpeg": "jpg", "image/png": "png"}


def install_missing(requirements: str | Path) -> None:
    """Install those packages of the list that are missing or too old; nothing where all are there."""
    from packaging.requirements import Requirement

    lines = [line.split("#")[0].strip() for line in Path(requirements).read_text().splitlines()]
    wanted = []
    for needed in (Requirement(line) for line in lines if line):
        try:
            there = needed.specifier.contains(version(needed.name), prereleases=True)
        except PackageNotFoundError:
            there = False
        wanted += [] if there else [str(needed)]
    if wanted:
        print("Installing", ", ".join(wanted))
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)


def prepare() -> None:
    """What a notebook needs before all else: its packages, neither HARMLESS warnings nor a line for each download."""
    install_missing(ROOT / "requirements.txt")
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def set_address(url: str) -> list[str]:
    """Write the repository's address into this file, the notebooks and the README's badges. Returns the files changed.

    Raises ValueError where it is no https://github.com/owner/name.
    """
    url = url.removesuffix("/").removesuffix(".git")
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"{url!r} is no address of a repository; give https://github.com/OWNER/NAME")
    old, new = (address.removeprefix("https://github.com/") for address in (REPOSITORY, url))
    changed = []
    for name in (*NOTEBOOKS, "README.md", "tools/notebook.py"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        renamed = re.sub(re.escape(old) + r"(?![\w-])", new, text)
        if renamed != text:
            path.write_text(renamed, encoding="utf-8")
            changed.append(name)
    return changed


def keep_images(folder: str | Path = "images") -> list[Path]:
    """Write the first figures of cells tagged "image:NAME" into `folder`, and return the files: what the README shows.

    They come from the executed notebooks under runs/, or where there are none from the notebooks as they lie here.
    """
    written = []
    for name in NOTEBOOKS:
        executed = sorted(ROOT.glob(f"runs/*/{name}"), key=lambda path: path.stat().st_mtime)
        for cell in json.loads([ROOT / name, *executed][-1].read_text(encoding="utf-8"))["cells"]:
            tags = [tag.removeprefix("image:") for tag in cell["metadata"].get("tags", ()) if tag.startswith("image:")]
            figure = next((output["data"] for output in cell.get("outputs", ()) if output.get("data")), {})
            kind = next((kind for kind in FIGURES if kind in figure), None)
            if tags and kind:
                path = Path(folder) / f"{tags[0]}.{FIGURES[kind]}"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(base64.b64decode(figure[kind]))
                written.append(path)
    return written


def main() -> None:
    """The commands above; ends with status 1 where a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.notebook", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    execute = commands.add_parser("run", help="execute a notebook from top to bottom, showing its output as it comes")
    execute.add_argument("source", help="the notebook")
    execute.add_argument("target", help="where to write it with its outputs")
    execute.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="""e.g. '{"epochs": 1}'""")
    address = commands.add_parser("address", help="write the repository's address into notebooks and badges")
    address.add_argument("url", help="https://github.com/OWNER/NAME")
    commands.add_parser("images", help="take the README's figures from the last run's notebooks")
    given = parser.parse_args()
    if given.command == "images":
        print("Written:", ", ".join(map(str, keep_images())) or "nothing: execute the notebooks first")
    elif given.command == "address":
        try:
            print("Changed:", ", ".join(set_address(given.url)) or "nothing")
        except ValueError as error:
            sys.exit(str(error))
    else:
        from tools.execution import run  # needs nbclient, which a notebook in Colab does without

        sys.exit(run(given.source, given.target, given.settings) or 0)


if __name__ == "__main__":
    main()
