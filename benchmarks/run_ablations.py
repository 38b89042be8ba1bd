"""The training recipe, one change at a time, on photographs: what each part of it is worth, and what was not taken.

python -m benchmarks.run_ablations NAME [NAME ...] [--seed 0] [--epochs 6]    trains each that has no result yet; NAME as in CHANGES
python -m benchmarks.run_ablations --table [--epochs 6]                       what is done so far, in Markdown
VOC_ROOT names the folder that holds VOCdevkit. Results stand in runs/recipe/EPOCHS/NAME-SEED/result.json.
"""

import argparse
import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from unittest import mock

import numpy as np

from benchmarks.ablations import BASE, CHANGES
from src.data.datamodule import DetectionDataModule
from src.training.checkpoints import atomic_write
from src.training.fit import evaluate, fit
from src.training.metrics import Evaluation, per_class_table

RUNS = Path("runs/recipe")


def pooled(found: Evaluation) -> float:
    """Average precision at IoU 0.5 of all classes' detections ranked together: steadier than the mean over classes.

    The mean hangs on classes with ten objects. A class of one image counts as an image here, so matching is unchanged.
    """
    rows = [
        np.c_[rows[:, 0] * len(BASE.classes) + rows[:, 1], np.zeros(len(rows)), rows[:, 2:]]
        for rows in (found.predictions, found.ground_truth)
    ]
    return per_class_table(*map(np.float32, rows), ("any",))[0]["ap"]


def train(name: str, seed: int, epochs: int) -> None:
    """Train with one change, about a tenth of the epochs without mosaics, and write what it reached in the last epoch."""
    change, folder = CHANGES[name], RUNS / f"{epochs}" / f"{name}-{seed}"
    if (folder / "result.json").exists():
        return
    settings = {key: value() if callable(value) else value for key, value in change.settings.items()}
    schedule = {"epochs": epochs, "close_mosaic_epochs": max(1, epochs // 10)}
    config = BASE.replace(seed=seed, run_dir=str(folder), **(schedule | settings))
    started = time.monotonic()
    with ExitStack() as stack:
        for target, instead in change.instead.items():
            stack.enter_context(mock.patch(target, instead))
        found = evaluate(fit(config, ckpt_path="auto"), DetectionDataModule(config))
    results = found.accuracies | {"mAP50": found.precisions["VOC AP@.5, area"], "pooled": pooled(found)}
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    atomic_write(
        folder / "result.json", lambda file: json.dump(results | {"minutes": (time.monotonic() - started) / 60}, file), "w"
    )


def table(epochs: int) -> str:
    """What is done so far in Markdown: AP of all of every seed, its distance to the baseline of that seed, and means.

    Runs of one seed draw the same pictures in the same order, so their differences vary far less than they do.
    """
    done = {}
    for path in sorted((RUNS / f"{epochs}").glob("*/result.json")):
        name, seed = path.parent.name.rsplit("-", 1)
        done.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    base = done.get("baseline", {})
    lines = ["| change | AP of all | against the baseline | mAP | class | object |", "| --- " * 6 + "|"]
    for name in sorted(done, key=list(CHANGES).index):
        runs = done[name].items()
        each = " ".join(f"{run['pooled']:.3f}" for _, run in runs)
        gains = " ".join(f"{run['pooled'] - base[seed]['pooled']:+.3f}" if seed in base else "?" for seed, run in runs)
        map50, label, found = (mean(run[key] for _, run in runs) for key in ("mAP50", "class", "object@0.05"))
        cells = f"{each} | {gains} | {map50:.3f} | {100 * label:.1f} | {100 * found:.1f}"
        lines.append(f"| {CHANGES[name].what} (`{name}`) | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"changes to train: {', '.join(CHANGES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--table", action="store_true", help="print what is done")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(CHANGES):
        parser.error(f"unknown changes {sorted(unknown)}; choose from {', '.join(CHANGES)}")
    for name in arguments.names:
        train(name, arguments.seed, arguments.epochs)
    if arguments.table:
        print(table(arguments.epochs))


if __name__ == "__main__":
    main()
