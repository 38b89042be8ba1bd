"""Train on VOC with one change to the recipe at a time, and measure.

python -m benchmarks ablations NAME [NAME ...]    trains each change that has no result yet
python -m benchmarks ablations --table            prints the results so far as Markdown
The environment variable VOC_ROOT names the folder that holds VOCdevkit. Results are written to
runs/ablations/SPLITS-SIZE-EPOCHS[-backbone]/NAME-SEED/result.json. A second call resumes a run.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.model.network import Head, Residual
from src.training.fit import evaluate, fit
from src.training.loss import IGNORE_IOU, complete_iou_loss, wh_iou
from src.training.metrics import Evaluation, per_class_table

RUNS = Path("runs/ablations")
SPLITS = {"2012": ("2012",), "both": ("2007", "2012")}  # years of VOC
BASE = Config(width=0.25, batch_size=16, max_lr=6e-3, num_workers=1)

head_init = Head.__init__
residual_init = Residual.__init__


def certain_boxes(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`complete_iou_loss` with 1 instead of the IoU as objectness target; YOLOv3, section 2.1."""
    loss, iou = complete_iou_loss(predictions, targets)
    return loss, torch.ones_like(iou)


def fitting_shapes(level: Tensor, targets: Tensor, counts: list[int], anchors: Tensor) -> Tensor:
    """Mark what the course ignores: anchors of an object's cell with wh_iou above 0.5."""
    grid = level.shape[2]
    column, row = (targets[:, 2:4] * grid).long().clamp(0, grid - 1).unbind(dim=1)
    number, anchor = (wh_iou(targets[:, 4:6], anchors) > IGNORE_IOU).nonzero(as_tuple=True)
    mask = torch.zeros(level.shape[:4], dtype=torch.bool)  # [B, 3, G, G]
    mask[targets[number, 0].long(), anchor, row[number], column[number]] = True
    return mask


def zero_bias(self, *arguments) -> None:
    """Initialize objectness and class probabilities of a head at 0.5."""
    head_init(self, *arguments)
    torch.nn.init.zeros_(self.predict.bias)


def nonzero_residual(self, channels: int) -> None:
    """Initialize a residual block without the zero weight that makes it the identity."""
    residual_init(self, channels)
    torch.nn.init.ones_(self.body[1][1].weight)


@dataclass(frozen=True)
class Change:
    """One difference to the baseline: settings, and replacements of names in `src`."""

    description: str
    settings: dict[str, object] = field(default_factory=dict)
    replacements: dict[str, Callable] = field(default_factory=dict)  # dotted name -> function


CHANGES = {
    "baseline": Change("none"),
    "box-1": Change("box weight: 1", {"box_weight": 1.0}),
    "object-certain": Change(
        "objectness target of positives: 1, as in the paper",
        replacements={"src.training.loss.complete_iou_loss": certain_boxes},
    ),
    "object-1": Change("objectness weight of positives: 1", {"objectness_weight": 1.0}),
    "object-4": Change("objectness weight of positives: 4", {"objectness_weight": 4.0}),
    "bias-zero": Change(
        "initial bias: 0", replacements={"src.model.network.Head.__init__": zero_bias}
    ),
    "class-3": Change("class weight: 3", {"class_weight": 3.0}),
    "ignore-shape": Change(
        "ignored: anchors with wh_iou above 0.5, as in the course",
        replacements={"src.training.loss.ignore_mask": fitting_shapes},
    ),
    "decay-0.005": Change("weight decay: 0.005", {"weight_decay": 0.005}),
    "lr-2e-3": Change("peak learning rate: 2e-3", {"max_lr": 2e-3}),
    "lr-4e-3": Change("peak learning rate: 4e-3", {"max_lr": 4e-3}),
    "lr-1.2e-2": Change("peak learning rate: 1.2e-2", {"max_lr": 1.2e-2}),
    "warmup-0.3": Change("warm-up: 0.3 of the steps", {"warmup_fraction": 0.3}),
    "ema-0.99": Change("EMA decay: 0.99", {"ema_decay": 0.99}),
    "ema-none": Change("EMA: none", {"ema_decay": 0.0}),
    "residual-nonzero": Change(
        "initial residual blocks: not the identity",
        replacements={"src.model.network.Residual.__init__": nonzero_residual},
    ),
    "batch-8": Change("batch size: 8, twice the steps", {"batch_size": 8}),
    "mosaic-0": Change("mosaics: none", {"mosaic_prob": 0.0}),
    "mosaic-end": Change("mosaics: until the end", {"close_mosaic_epochs": 0}),
    "mosaic-off-3": Change("mosaics: none in the last 3 epochs", {"close_mosaic_epochs": 3}),
    "scale-wide": Change(
        "image scales: 0.45 to 1.25", {"mosaic_scale": (0.45, 1.25), "image_scale": (0.45, 1.25)}
    ),
    "single-as-mosaic": Change(
        "image scales: single images as in mosaics", {"image_scale": BASE.mosaic_scale}
    ),
    "multi": Change("image sizes: several, 0.7 to 1.3 of the size"),
    "scratch": Change("backbone: not pretrained", {"pretrained_weights": ""}),
}


def multiscale_sizes(size: int) -> tuple[int, ...]:
    """Return the multiples of 32 from 0.7 to 1.3 of `size`, such as 160 to 288 for 224."""
    return tuple(side for side in range(32, 2 * size, 32) if 0.7 * size <= side <= 1.3 * size)


def configure(name: str, options: argparse.Namespace) -> Config:
    """Return the settings of a run: about a tenth of the epochs are without mosaics."""
    years = SPLITS[options.splits]
    base = BASE.replace(
        train_splits=tuple(f"{year}/train" for year in years),
        val_splits=tuple(f"{year}/val" for year in years),
        image_size=options.size,
        epochs=options.epochs,
        close_mosaic_epochs=max(1, options.epochs // 10),
        pretrained_weights=options.backbone,
        multiscale_sizes=multiscale_sizes(options.size) if name == "multi" else (),
        seed=options.seed,
        run_dir=str(run_folder(options) / f"{name}-{options.seed}"),
    )
    return base.replace(**CHANGES[name].settings)


def run_folder(options: argparse.Namespace) -> Path:
    """Return the folder of all runs with these options."""
    setting = f"{options.splits}-{options.size}-{options.epochs}"
    return RUNS / (setting + "-backbone" * bool(options.backbone))


def micro_average_precision(evaluation: Evaluation) -> float:
    """Average precision at IoU 0.5 of all classes' detections in one ranking.

    It varies less than the mean over the classes, some of which have ten objects. The rows get one
    label, and an image index for each pair of image and class, so detections match only objects of
    their class.
    """
    both = evaluation.predictions, evaluation.ground_truth
    labels = 1 + int(max(rows[:, 1].max(initial=0) for rows in both))
    predictions, ground_truth = (
        np.c_[rows[:, 0] * labels + rows[:, 1], np.zeros(len(rows)), rows[:, 2:]].astype(np.float32)
        for rows in both
    )
    return per_class_table(predictions, ground_truth, ("any",))[0]["ap"]


def measure(detector, config: Config) -> dict[str, float]:
    """Return accuracies, mAP and micro-averaged AP on the validation splits of `config`."""
    evaluation = evaluate(detector, DetectionDataModule(config))
    return {
        **evaluation.accuracies,
        "mAP50": evaluation.precisions["VOC AP@.5, area"],
        "micro_AP50": micro_average_precision(evaluation),
    }


def train(name: str, options: argparse.Namespace) -> None:
    """Train with one change, and write what the last epoch reaches, unless that exists."""
    config = configure(name, options)
    result = Path(config.run_dir) / "result.json"
    if result.exists():
        return
    with ExitStack() as stack:
        for target, replacement in CHANGES[name].replacements.items():
            stack.enter_context(mock.patch(target, replacement))
        detector = fit(config, ckpt_path="auto")
    results = measure(detector, config)
    for size in options.test_sizes:
        at_size = measure(detector, config.replace(image_size=size, cache_gb=0))
        results[f"mAP50 (micro) at {size}"] = (
            f"{at_size['mAP50']:.3f} ({at_size['micro_AP50']:.3f})"
        )
    print(json.dumps(results, indent=1))
    result.write_text(json.dumps(results))
    for checkpoint in result.parent.glob("*.ckpt"):
        checkpoint.unlink()


def table(folder: Path) -> str:
    """Format the results below `folder` as Markdown, with differences to the baseline of the seed.

    Runs with the same seed train on the same images in the same order, so their differences vary
    less than their values.
    """
    results = {}
    for path in sorted(folder.glob("*/result.json")):
        name, seed = path.parent.name.rsplit("-", 1)
        results.setdefault(name, {})[seed] = json.loads(path.read_text())
    baseline = results.get("baseline", {})
    header = "| change | micro AP | difference to the baseline | mAP | class | object |"
    lines = [header, "| --- " * 6 + "|"]
    for name in sorted(results, key=list(CHANGES).index):
        runs = results[name]
        values = {seed: run["micro_AP50"] for seed, run in runs.items()}
        gains = [
            f"{value - baseline[seed]['micro_AP50']:+.3f}" if seed in baseline else "?"
            for seed, value in values.items()
        ]
        cells = [
            f"{CHANGES[name].description} (`{name}`)",
            " ".join(f"{value:.3f}" for value in values.values()),
            " ".join(gains),
            f"{mean(run['mAP50'] for run in runs.values()):.3f}",
            f"{100 * mean(run['class'] for run in runs.values()):.1f}",
            f"{100 * mean(run['object@0.05'] for run in runs.values()):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Train the named changes, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks ablations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHANGES))
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (0)")
    parser.add_argument("--epochs", type=int, default=6, help="(6)")
    parser.add_argument("--size", type=int, default=160, help="image size in pixels (160)")
    parser.add_argument("--splits", choices=SPLITS, default="2012", help="years of VOC (2012)")
    parser.add_argument("--backbone", default="", help="folder of pretrained weights to start from")
    parser.add_argument(
        "--test-sizes", type=int, nargs="+", default=[], help="also measure at these image sizes"
    )
    parser.add_argument("--table", action="store_true", help="print the results so far")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(CHANGES):
        parser.error(f"no change {', '.join(sorted(unknown))}")
    for name in options.names:
        train(name, options)
    if options.table:
        print(table(run_folder(options)))
