"""Run the notebooks in a simulated Colab or Kaggle runtime. Run by hand; needs git, and for Kaggle root on Linux.

python -m tools.hosted colab
python -m tools.hosted kaggle
python -m tools.hosted kaggle --offline      Kaggle without internet

tools/pins/ has the versions of the packages that concern this project, with date and source. They are installed into
.hosted/HOST (6 GB) once. Each notebook then gets a new environment on top, an empty folder, and a clone of the last commit.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from PIL import Image
from traitlets import CaselessStrEnum, Unicode

from src.config import VOC_CLASSES
from src.data.records import ImageRecord
from src.data.shapes import draw_shapes
from tools.notebook import NOTEBOOKS, ROOT, Kernel, run

FOLDER = ROOT / ".hosted"
PYTHON = {"colab": "python3.13", "kaggle": "python3.12"}  # of the images in tools/pins/
SMALL = {
    "epochs": 1,
    "close_mosaic_epochs": 0,
    "width": 0.125,
    "image_size": 64,
    "shapes_train": 8,
    "shapes_val": 8,
    "batch_size": 4,
    "num_workers": 1,
    "cache_gb": 1,
}
SETTINGS = {
    "s13_assignment.ipynb": SMALL,
    "multi_scale_s13_assignment.ipynb": SMALL | {"multiscale_sizes": [64, 96]},
    "app_with_gradCAM.ipynb": {},
}
VOC = {"dataset": "voc", "classes": list(VOC_CLASSES)}
LAYOUTS = {  # three layouts of data sets on Kaggle: folder -> split
    "datasets/ada/voc0712/VOC_dataset/VOCdevkit/VOC2007": "trainval",
    "voc2007/VOCtest_06-Nov-2007/VOCdevkit/VOC2007": "test",
    "pascal-voc-2012/VOC2012": "trainval",
}
ATTACHED = "notebooks/ada/prepare"  # where Kaggle mounts the output of another notebook
MOUNT = """
mount --bind "$1" /kaggle && mount --bind "$1/input" /kaggle/input && mount -o remount,bind,ro /kaggle/input
ip link set lo up 2>/dev/null
export KAGGLE_KERNEL_RUN_TYPE=Interactive  # makes gradio ask for a public link
cd /kaggle/working && shift && exec "$@"
"""
BEFORE = """
import importlib, importlib.metadata as metadata, json, sys, time
import matplotlib.pyplot, numpy, pandas, PIL.Image, requests  # imported by the host's own start-up code

def versions():
    importlib.invalidate_caches()
    return {each.name.lower(): each.version for each in reversed(list(metadata.distributions()))}  # the first counts

owners = metadata.packages_distributions()
imported = {owner.lower() for name in list(sys.modules) for owner in owners.get(name.partition(".")[0], ())}
before, clock = versions(), time.monotonic()
"""
AFTER = """
seconds, after = round(time.monotonic() - clock, 1), versions()
changed = {name: [before.get(name, ""), version] for name, version in after.items() if version != before.get(name)}
stale = sorted(imported & before.keys() & changed.keys())
print("REHEARSAL", json.dumps({"seconds": seconds, "changed": changed, "stale": stale}))
before, clock = after, time.monotonic()
"""


def call(*command: str | Path, **options) -> str:
    """Run a command. Returns what it prints. Raises CalledProcessError if it fails."""
    return subprocess.run(
        list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **options
    ).stdout


def make_runtime(host: str, python: str) -> Path:
    """Create the environment of the pins if it is missing or the pins have changed. Returns its folder."""
    runtime, pins = FOLDER / host, ROOT / "tools" / "pins" / f"{host}.txt"
    installed = runtime / "pins.txt"
    if not installed.exists() or installed.read_bytes() != pins.read_bytes():
        shutil.rmtree(runtime, ignore_errors=True)
        call(python, "-m", "venv", runtime)
        call(runtime / "bin/python", "-m", "pip", "install", "--quiet", "pip==24.1.2")
        call(runtime / "bin/python", "-m", "pip", "install", "--quiet", "-r", pins)
        shutil.copyfile(pins, installed)
    return runtime


def make_session(runtime: Path, folder: Path) -> Path:
    """Create an environment that sees the packages of `runtime` and installs on top of them. Returns its python."""
    call(runtime / "bin/python", "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/*/site-packages")
    (packages,) = runtime.glob("lib/*/site-packages")
    (site / "runtime.pth").write_text(f"{packages}\n")
    return folder / "bin/python"


def pip_problems(python: Path) -> set[str]:
    """Return the lines of `pip check`."""
    check = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True)
    return set(check.stdout.splitlines()) - {"No broken requirements found."}


def write_voc(folder: Path, split: str, records: list[ImageRecord]) -> None:
    """Write records as a folder VOC2007 or VOC2012 with one split. Label n becomes VOC's class n."""
    for name in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (folder / name).mkdir(parents=True)
    for number, record in enumerate(records):
        Image.fromarray(record.image).save(folder / f"JPEGImages/{number:06d}.jpg")
        objects = ""
        for label, box in zip(record.labels, record.boxes.astype(int), strict=True):
            edges = zip(
                ("xmin", "ymin", "xmax", "ymax"),
                (box[0] + 1, box[1] + 1, box[2], box[3]),
                strict=True,
            )
            inside = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges)
            objects += (
                f"<object><name>{VOC_CLASSES[label]}</name><bndbox>{inside}</bndbox></object>"
            )
        (folder / f"Annotations/{number:06d}.xml").write_text(f"<annotation>{objects}</annotation>")
    lines = "".join(f"{number:06d}\n" for number in range(len(records)))
    (folder / f"ImageSets/Main/{split}.txt").write_text(lines)


def write_inputs(inputs: Path, runtime: Path, offline: bool) -> None:
    """Write Kaggle's inputs: VOC in the layouts, and if `offline` a clone that tools.wheels has prepared."""
    for seed, (name, split) in enumerate(LAYOUTS.items()):
        write_voc(inputs / name, split, draw_shapes(8, 160, seed=seed))
    if offline:
        clone = inputs / ATTACHED / ROOT.name
        call("git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), clone)
        print(call(make_session(runtime, FOLDER / "prepare"), "-m", "tools.wheels", cwd=clone))


def kernel_class(host: str, python: Path, folder: Path, offline: bool) -> type[Kernel]:
    """Return the kernel manager of a session. On Kaggle the kernel sees `folder` as /kaggle, its inputs read-only."""
    members: dict = {"python": (str(python),)}
    if host == "kaggle":
        unshare = ["unshare", "--mount", *(["--net"] if offline else [])]
        members["python"] = (*unshare, "sh", "-c", MOUNT, "sh", str(folder), str(python))
    if offline:  # no network, so the kernel is reached through sockets that are files
        members |= {
            "transport": CaselessStrEnum(["tcp", "ipc"], default_value="ipc"),
            "ip": Unicode(f"{FOLDER}/kernel"),
        }
    return type("HostedKernel", (Kernel,), members)


def prepare_notebook(name: str, target: Path, address: str) -> None:
    """Copy a notebook with the repository's address, its first cell twice, and measurements before and after them."""
    book = nbformat.read(ROOT / name, as_version=4)
    number = next(number for number, cell in enumerate(book.cells) if cell.cell_type == "code")
    first = book.cells[number]
    first.source = re.sub(
        r'^REPOSITORY = ".*"', f'REPOSITORY = "{address}"', first.source, flags=re.MULTILINE
    )
    again = new_code_cell(first.source)
    book.cells[number : number + 1] = [
        new_code_cell(BEFORE),
        first,
        new_code_cell(AFTER),
        again,
        new_code_cell(AFTER),
    ]
    nbformat.write(book, target)


def rehearse(host: str, name: str, runtime: Path, offline: bool) -> list[str]:
    """Run a notebook in a new session. Returns a row of the report."""
    folder = FOLDER / f"session-{host}"
    working, inputs = folder / "working", folder / "input"
    shutil.rmtree(folder, ignore_errors=True)
    working.mkdir(parents=True)
    settings = SETTINGS[name]
    if host == "kaggle":
        write_inputs(inputs, runtime, offline)
        settings = settings | VOC if settings else {}
    python = make_session(runtime, folder / "environment")
    problems = pip_problems(python)
    address = f"https://github.com/OWNER/{ROOT.name}" if offline else ROOT.as_uri()
    prepare_notebook(name, working / name, address)
    target = FOLDER / f"{host}{'-offline' * offline}-{name}"
    error = run(working / name, target, settings, kernel_class(host, python, folder, offline))
    return [
        name,
        *measurements(nbformat.read(target, as_version=4), pip_problems(python) - problems),
        error or "none",
    ]


def measurements(book: NotebookNode, problems: set[str]) -> list[str]:
    """Print the measurements and warnings in an executed notebook. Returns cells of the report."""
    streams = [
        output
        for cell in book.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream"
    ]
    lines = [
        (stream.name, line)
        for stream in streams
        for line in stream.text.splitlines()
        if line.strip()
    ]
    found = [
        json.loads(line.removeprefix("REHEARSAL "))
        for _, line in lines
        if line.startswith("REHEARSAL ")
    ]
    print("new lines of pip check:", *sorted(problems), sep="\n  ")
    print(
        "warnings:",
        *(line for name, line in lines if name == "stderr" or "warning" in line.lower()),
        sep="\n  ",
    )
    if len(found) < 2:
        return ["failed"] * 3
    changed = [
        f"{package} {version}" + (f" (was {old})" if old else "")
        for package, (old, version) in found[0]["changed"].items()
    ]
    return [
        f"{found[0]['seconds']} s: {', '.join(changed)}",
        ", ".join(found[0]["stale"]) or "none",
        f"{found[1]['seconds']} s, {len(found[1]['changed'])} packages",
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.hosted", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("host", choices=PYTHON)
    parser.add_argument("--python", help="default: python3.13 for Colab, python3.12 for Kaggle")
    parser.add_argument("--offline", action="store_true", help="without internet (Kaggle)")
    parser.add_argument("--notebook", action="append", choices=NOTEBOOKS, help="default: all three")
    args = parser.parse_args()
    if args.offline and args.host == "colab":
        parser.error("Colab always has internet. Use kaggle --offline.")
    python = args.python or PYTHON[args.host]
    if missing := [
        name
        for name in (python, "git", *["unshare"] * (args.host == "kaggle"))
        if not shutil.which(name)
    ]:
        parser.error(f"{', '.join(missing)} must be installed.")
    if args.host == "kaggle" and not os.path.exists("/kaggle") and os.geteuid():
        parser.error(
            "Only root can create the folder /kaggle. Create it, or run this as root in a container."
        )
    os.environ["PIP_CONFIG_FILE"] = os.devnull  # this machine's own package sources
    os.environ.pop("PIP_FIND_LINKS", None)
    runtime = make_runtime(args.host, python)
    created = args.host == "kaggle" and not os.path.exists("/kaggle")
    if created:
        os.mkdir("/kaggle")  # empty; only the kernels have something mounted there
    try:
        rows = [
            rehearse(args.host, name, runtime, args.offline) for name in args.notebook or NOTEBOOKS
        ]
    finally:
        if created:
            os.rmdir("/kaggle")
    head = ["notebook", "first cell", "imported before their upgrade", "first cell again", "error"]
    print(*("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]), sep="\n")
    sys.exit(any(row[-1] != "none" for row in rows))


if __name__ == "__main__":
    main()
