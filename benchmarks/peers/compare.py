"""Compare this project with other YOLOv3 implementations on the same images, with one core and with two.

python -m benchmarks peers [--reference FOLDER]
Each implementation runs in its own process and environment below .peers/, which the first call installs (from PyPI); later
calls need no network. The processes take turns, so that other load on the machine affects all of them.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from benchmarks.synthetic_inputs import HEIGHT, WIDTH, write_jpegs
from benchmarks.timing import markdown
from src.config import SHAPE_CLASSES

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".peers"
TRAIN_IMAGES = 64
PACKAGES = {"ultralytics": ["ultralytics"], "reference": ["pandas", "tqdm"]}
JOBS = {  # name -> row of the table, unit
    "train float32": ("training step, float32", "images/s"),
    "train bfloat16": ("training step, bfloat16", "images/s"),
    "sample cold": ("training sample, mosaic, first epoch", "ms"),
    "sample warm": ("training sample, mosaic, later epochs", "ms"),
    "validate": ("validation per image", "ms"),
    "predict image": ("prediction of one file", "ms"),
    "predict folder": ("prediction of a folder, per image", "ms"),
}
MEMORY_OF = ("train float32", "validate", "predict folder")


class PeerError(Exception):
    """A peer cannot be used; the message is the reason."""


def install(name: str) -> Path:
    """Create the environment of a peer if it is missing. Returns its Python.

    The environment sees the packages of this project's, so all peers run on the same torch, torchvision, numpy and OpenCV.
    """
    environment = WORK / name
    python = environment / "bin/python"
    if (environment / "installed").exists():
        return python
    print(
        f"Installing {', '.join(PACKAGES[name])} in {environment.relative_to(ROOT)} ...",
        file=sys.stderr,
    )
    venv.create(environment, clear=True, with_pip=True)
    site = sysconfig.get_path(
        "purelib", "venv", {"base": str(environment), "installed_base": str(environment)}
    )
    Path(site, "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for arguments in (
        ["install", *PACKAGES[name]],
        ["uninstall", "--yes", "opencv-python"],
    ):  # the project's is headless
        result = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if result.returncode:
            raise PeerError(
                f"pip {arguments[0]} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
            )
    (environment / "installed").touch()
    return python


class Peer:
    """A running process of `serve`, on a fixed number of cores."""

    def __init__(self, name: str, python: Path, module: str, settings: dict):
        cores = sorted(os.sched_getaffinity(0))[: settings["cores"]]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(len(cores)),
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "YOLO_OFFLINE": "true",
            "YOLO_AUTOINSTALL": "false",
            "YOLO_CONFIG_DIR": str(WORK),
        }
        self.arguments, self.log = (name, python, module, settings), WORK / f"{name}.log"
        reader, writer = os.pipe()  # for the answers; what the peer prints goes to the log
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), "-m", module, json.dumps(settings | {"answers": writer})],
                cwd=ROOT,
                env=environment,
                text=True,
                bufsize=1,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[writer],
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        os.close(writer)
        self.answers = os.fdopen(reader)
        self.info = self._answer()

    def _answer(self) -> dict:
        """Read an answer. Raises PeerError if the process has ended."""
        if line := self.answers.readline():
            return json.loads(line)
        self.process.wait()
        last = (self.log.read_text().strip().splitlines() or ["no message"])[-1]
        raise PeerError(f"its process ended: {last} (see {self.log.relative_to(ROOT)})")

    def run(self, job: str, seconds: float) -> dict:
        """Run a job and return its answer, see `serve`."""
        try:
            self.process.stdin.write(json.dumps({"job": job, "seconds": seconds}) + "\n")
            return self._answer()
        except (BrokenPipeError, PeerError) as error:
            return {"error": str(error)}

    def run_alone(self, job: str) -> dict:
        """Run a job once in a new process and return its answer."""
        fresh = Peer(*self.arguments)
        answer = fresh.run(job, 0)
        fresh.close()
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def write_data(images: int) -> Path:
    """Write synthetic JPEG files as a YOLO data set, with the reference's lists; returns its folder."""
    root = WORK / f"data-{images}"
    if (root / "data.yaml").exists():
        return root
    for seed, (split, count) in enumerate((("train", TRAIN_IMAGES), ("val", images))):
        folders = root / "images" / split, root / "labels" / split
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        names = []
        for record in write_jpegs(folders[0], count, seed):
            boxes = record.boxes / (WIDTH, HEIGHT, WIDTH, HEIGHT)
            lines = [
                f"{label} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}"
                for label, (x1, y1, x2, y2) in zip(record.labels, boxes, strict=True)
            ]
            names.append(Path(record.image).stem)
            (folders[1] / f"{names[-1]}.txt").write_text("".join(f"{line}\n" for line in lines))
        (root / f"{split}.csv").write_text(
            "image,label\n" + "".join(f"{name}.jpg,{name}.txt\n" for name in names)
        )
    description = {
        "path": str(root),
        "train": "images/train",
        "val": "images/val",
        "names": dict(enumerate(SHAPE_CLASSES)),
    }
    (root / "data.yaml").write_text(json.dumps(description))  # JSON is YAML
    return root


def start_peers(settings: dict, reference: str) -> list[Peer]:
    """Start the processes; print why one cannot be used."""
    peers = []
    modules = {"ours": "ours", "ultralytics": "ultralytics_peer"} | (
        {"reference": "reference_peer"} if reference else {}
    )
    for name, module in modules.items():
        try:
            python = install(name) if name in PACKAGES else Path(sys.executable)
            peers.append(
                Peer(name, python, f"benchmarks.peers.{module}", settings | {"checkout": reference})
            )
        except (PeerError, OSError, subprocess.SubprocessError) as error:
            if name == "ours":
                raise
            print(f"{name} is skipped: {error}", file=sys.stderr)
    return peers


def measure(peers: list[Peer], rounds: int, seconds: float) -> dict[str, list[dict]]:
    """Run each job in turn on each peer. Returns per job the best answer of each peer.

    "JOB alone" is the answer of a new process, for the peak of the memory: a process keeps what earlier jobs have allocated.
    """
    results = {}
    for job in JOBS:
        answers = [[] for _ in peers]
        for _ in range(rounds):
            for peer, own in zip(peers, answers, strict=True):
                own.append(peer.run(job, seconds))
        results[job] = [
            min(own, key=lambda answer: answer.get("seconds", float("inf"))) for own in answers
        ]
        if job in MEMORY_OF:
            results[f"{job} alone"] = [peer.run_alone(job) for peer in peers]
        print(job, results[job], file=sys.stderr, flush=True)
    return results


def cells(answers: list[dict], text, key: str) -> list[str]:
    """Format the answers of all peers to one job, those of the others with their ratio to the first."""
    first = answers[0].get(key)
    values = []
    for answer in answers:
        ratio = (
            f" ({answer[key] / first:.2f})"
            if first and key in answer and answer is not answers[0]
            else ""
        )
        values.append(text(answer[key]) + ratio if key in answer else "failed")
    return values


def rows(results: dict[str, list[dict]], cores: int) -> list[list[str]]:
    """Format the results of `measure` as rows of the table for a number of cores."""
    lines = []
    for job, (name, unit) in JOBS.items():
        text = (
            (lambda s: f"{1 / s:.1f} images/s")
            if unit == "images/s"
            else (lambda s: f"{1e3 * s:.1f} ms")
        )
        lines.append([name, str(cores), *cells(results[job], text, "seconds")])
    for job in MEMORY_OF:
        name = f"peak memory, {JOBS[job][0].split(',')[0].removesuffix(' per image')}"
        lines.append(
            [name, str(cores), *cells(results[f"{job} alone"], lambda mb: f"{mb:.0f} MB", "memory")]
        )
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--reference", default="", help="folder of a checkout of the reference solution"
    )
    parser.add_argument(
        "--size", type=int, default=224, help="image size of training, validation and prediction"
    )
    parser.add_argument(
        "--loader-size", type=int, default=416, help="image size of training samples"
    )
    parser.add_argument(
        "--width", type=float, default=0.25, help="width multiplier of all networks"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=400, help="validation images")
    parser.add_argument("--folder", type=int, default=64, help="images of the predicted folder")
    parser.add_argument("--rounds", type=int, default=3, help="turns per job; the best counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="minimum time of a turn")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    options = vars(parser.parse_args(arguments))
    available = len(os.sched_getaffinity(0))
    if max(options["cores"]) > available:
        parser.error(f"--cores {max(options['cores'])}: this machine has {available}")
    reference = str(Path(options["reference"]).resolve()) if options["reference"] else ""
    WORK.mkdir(exist_ok=True)
    settings = options | {"data": str(write_data(options["images"])), "work": str(WORK)}
    lines = []
    for cores in options["cores"]:
        peers = start_peers(settings | {"cores": cores}, reference)
        header = ["measured", "cores", *(peer.info["name"] for peer in peers)]
        facts = [
            ["parameters", "", *(f"{peer.info['parameters'] / 1e6:.1f} M" for peer in peers)],
            [
                f"forward pass, {options['size']} px",
                "",
                *(f"{peer.info['gflop']:.2f} GFLOP" for peer in peers),
            ],
        ]
        lines += rows(measure(peers, options["rounds"], options["seconds"]), cores)
        for peer in peers:
            peer.close()
    print(markdown([header, *facts, *lines]))
    print("\nIn parentheses: time or memory relative to this project.")
