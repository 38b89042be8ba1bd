"""Train on VOC with one change to the recipe at a time.

python -m benchmarks.run_ablations NAME [NAME ...]    trains each change of CHANGES that has no result yet
python -m benchmarks.run_ablations --table            prints the results so far as Markdown
Options of both: --epochs 6 --size 160 --splits 2012|both --backbone FOLDER, pretrained weights to start from; --seed 0.
The environment variable VOC_ROOT names the folder that holds VOCdevkit.
Results are written to runs/ablations/SPLITS-SIZE-EPOCHS[-backbone]/NAME-SEED/result.json.
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
from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.config import atomic_write
from src.training.fit import evaluate, fit
from src.training.metrics import Evaluation, per_class_table

RUNS = Path("runs/ablations")
SPLITS = {
    "2012": ("2012",),
    "both": ("2007", "2012"),
}  # years of VOC that training and validation use


def micro_average_precision(evaluation: Evaluation) -> float:
    """Average precision at IoU 0.5 of all classes' detections in one ranking.

    It varies less than the mean over the classes, some of which have ten objects. The rows get one label, and an
    image index for each pair of image and class, so detections match only objects of their class.
    """
    labels = 1 + int(
        max(rows[:, 1].max(initial=0) for rows in (evaluation.predictions, evaluation.ground_truth))
    )
    predictions, ground_truth = (
        np.c_[rows[:, 0] * labels + rows[:, 1], np.zeros(len(rows)), rows[:, 2:]].astype(np.float32)
        for rows in (evaluation.predictions, evaluation.ground_truth)
    )
    return per_class_table(predictions, ground_truth, ("any",))[0]["ap"]


def base_config(epochs: int, size: int, splits: str, backbone: str = "") -> Config:
    """Settings of the baseline: `BASE` for N epochs, about a tenth of them without mosaics."""
    years = SPLITS[splits]
    return BASE.replace(
        train_splits=tuple(f"{year}/train" for year in years),
        val_splits=tuple(f"{year}/val" for year in years),
        image_size=size,
        epochs=epochs,
        close_mosaic_epochs=max(1, epochs // 10),
        pretrained_weights=backbone,
    )


def train(name: str, seed: int, base: Config, folder: Path) -> None:
    """Train with one change and write the results of the last epoch to `folder`/result.json, unless they exist."""
    config, result = (
        CHANGES[name].config(base).replace(seed=seed, run_dir=str(folder)),
        folder / "result.json",
    )
    if result.exists():
        former = json.loads(result.read_text()).get("pretrained_weights", "")
        if former != config.pretrained_weights:
            raise SystemExit(
                f"{result} is of the backbone {former!r}. Delete it to train from {config.pretrained_weights!r}."
            )
        return
    start = time.monotonic()
    with ExitStack() as stack:
        for target, replacement in CHANGES[name].replacements.items():
            stack.enter_context(mock.patch(target, replacement))
        evaluation = evaluate(fit(config, ckpt_path="auto"), DetectionDataModule(config))
    results = {
        **evaluation.accuracies,
        "mAP50": evaluation.precisions["VOC AP@.5, area"],
        "micro_AP50": micro_average_precision(evaluation),
        "pretrained_weights": config.pretrained_weights,
        "minutes": (time.monotonic() - start) / 60,
    }
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    atomic_write(result, lambda file: json.dump(results, file), "w")


def table(folder: Path) -> str:
    """Format the results below `folder` as Markdown: per seed, as difference to the baseline of the seed, and means.

    Runs with the same seed train on the same images in the same order, so their differences vary less than their values.
    """
    results = {}
    for path in sorted(folder.glob("*/result.json")):
        name, seed = path.parent.name.rsplit("-", 1)
        results.setdefault(name, {})[int(seed)] = json.loads(path.read_text())
    baseline = results.get("baseline", {})
    lines = [
        "| change | micro AP | difference to the baseline | mAP | class | object |",
        "| --- " * 6 + "|",
    ]
    for name in sorted(results, key=list(CHANGES).index):
        runs = {seed: run["micro_AP50"] for seed, run in results[name].items()}
        values = " ".join(f"{value:.3f}" for value in runs.values())
        gains = " ".join(
            f"{v - baseline[seed]['micro_AP50']:+.3f}" if seed in baseline else "?"
            for seed, v in runs.items()
        )
        map50, class_accuracy, object_accuracy = (
            mean(run[key] for run in results[name].values())
            for key in ("mAP50", "class", "object@0.05")
        )
        cells = f"{values} | {gains} | {map50:.3f} | {100 * class_accuracy:.1f} | {100 * object_accuracy:.1f}"
        lines.append(f"| {CHANGES[name].description} (`{name}`) | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"changes to train: {', '.join(CHANGES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--size", type=int, default=160, help="image size in pixels")
    parser.add_argument(
        "--splits", choices=SPLITS, default="2012", help="years of VOC to train and validate on"
    )
    parser.add_argument("--backbone", default="", help="folder of pretrained weights to start from")
    parser.add_argument("--table", action="store_true", help="print the results so far")
    arguments = parser.parse_args()
    if not arguments.names and not arguments.table:
        parser.error("Name at least one change, or use --table.")
    if unknown := set(arguments.names) - set(CHANGES):
        parser.error(f"Unknown changes {sorted(unknown)}. Choose from {', '.join(CHANGES)}.")
    setting = f"{arguments.splits}-{arguments.size}-{arguments.epochs}"
    folder = RUNS / (f"{setting}-backbone" if arguments.backbone else setting)
    for name in arguments.names:
        base = base_config(arguments.epochs, arguments.size, arguments.splits, arguments.backbone)
        train(name, arguments.seed, base, folder / f"{name}-{arguments.seed}")
    if arguments.table:
        print(table(folder))


if __name__ == "__main__":
    main()
