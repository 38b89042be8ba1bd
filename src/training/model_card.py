"""Weights that can be handed on: half precision, with a model card that says what they reach.

python -m src.training.model_card write runs/voc weights   the best checkpoint of a run, measured, with its card
python -m src.training.model_card check weights            measure them again; needs the same data
"""

import argparse
import dataclasses
from pathlib import Path

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.model.network import YOLOv3
from src.training.fit import evaluate, load_detector
from src.training.metrics import Evaluation
from src.training.module import YOLOv3Module
from src.training.report import COURSE_THRESHOLD, STRICT_THRESHOLD, about, results_table, rows

CARD = """---
license: mit
library_name: pytorch
pipeline_tag: object-detection
tags: [object-detection, yolov3, darknet-53, {tag}]
---
# YOLOv3, width {width:g}, {image_size} px

{parameters:.1f} million parameters in half precision, trained from {start}. These are the
exponential moving average (EMA) of the weights in training, at the epoch of the best held-out mAP.

| | |
| --- | --- |
| data | {trained_on} |
| held out | {held_out} |
| epochs | {trained}, {batch_size} images a batch, mosaics on {mosaic:.0%} of the draws |
| sides | {sides} |
| optimizer | AdamW, OneCycle to {max_lr:g}, weight decay {weight_decay:g} |
| settings | `run.json` beside this file: `Config.load("run.json")` |

## Accuracy, held out

{accuracies}

{precisions}

Average precision at IoU 0.5 (VOC area under the curve, `difficult` objects neither counted nor punished):

{per_class}

`python -m src.training.model_card check` on this folder measures all of this again on the same pictures (for photographs, with `VOC_ROOT`
naming the folder that holds `VOCdevkit`).

## Use

```python
from src.serving.predictor import Predictor
detections = Predictor.load("weights")("photo.jpg", confidence=0.25)
```

## Limits

{limits}
"""


def write(run: Path, folder: Path, limits: str = "") -> Evaluation:
    """Export the best checkpoint of `run` as half-precision safetensors, measure what was written, write its card.

    limits: a sentence on what these weights are bad at, for the card.
    """
    config = Config.load(run / "config.json")
    model = load_detector(run).model.half()
    model.save_pretrained(folder)
    config.replace(voc_root="data").save(folder / "run.json")
    evaluation, data = measure(folder)
    trained = model.metadata["epochs"]
    model.metadata = about(evaluation.accuracies, evaluation.precisions["VOC AP@.5, area"], config, trained)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(card(model, config, evaluation, data, limits), encoding="utf-8")
    return evaluation


def measure(folder: Path) -> tuple[Evaluation, DetectionDataModule]:
    """Evaluate the weights in a folder made by `write`, in float32, on the data its run.json names."""
    config = Config.load(folder / "run.json").replace(pretrained_weights=str(folder), precision="32-true")
    config = config.replace(voc_root=Config().voc_root)
    data = DetectionDataModule(config)
    return evaluate(YOLOv3Module(config), data), data


def card(model: YOLOv3, config: Config, evaluation: Evaluation, data: DetectionDataModule, limits: str) -> str:
    """The model card as Markdown, with the Hub's header."""
    accuracies = [(row["name"], f"{row['reached']:.1%}", f"{row['strict']:.1%}") for row in rows(evaluation.accuracies, config)]
    classes = [(row["class"], row["num_gt"], f"{row['ap']:.3f}") for row in evaluation.per_class]
    held_out = ", ".join(config.val_splits) if config.dataset == "voc" else "another seed"
    sides = f"{config.image_size} pixels"
    if config.multiscale_sizes:
        drawn = ", ".join(map(str, config.multiscale_sizes))
        last = config.epochs - config.close_mosaic_epoch
        sides = f"one of {drawn} pixels for {config.multiscale_interval} steps each; in the last {last} epochs {sides}"
    settings = dataclasses.asdict(config) | {
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "trained_on": f"{len(data.train_records):,} pictures: {model.metadata['data']}",
        "held_out": f"{len(data.val_records):,} pictures: {held_out}",
        "trained": model.metadata["epochs"],
        "sides": sides,
        "start": Path(config.pretrained_weights).name if config.pretrained_weights else "scratch: no ImageNet weights",
        "tag": "pascal-voc" if config.dataset == "voc" else "drawn-shapes",
        "accuracies": markdown_table(("", f"objectness > {COURSE_THRESHOLD}", f"> {STRICT_THRESHOLD}"), accuracies),
        "precisions": markdown_table(("", "value"), [(n, f"{v:.3f}") for n, v in evaluation.precisions.items()]),
        "per_class": markdown_table(("class", "objects", "AP"), classes),
        "limits": limits,
    }
    return CARD.format(**settings)


def markdown_table(header: tuple, lines: list[tuple]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (header, ("---",) * len(header), *lines))


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m src.card", description="Export or measure weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="export a run's best checkpoint with a model card")
    writing.add_argument("run", type=Path)
    writing.add_argument("folder", type=Path)
    writing.add_argument("--limits", default="", help="a sentence on what these weights are bad at")
    commands.add_parser("check", help="measure exported weights").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "write":
        evaluation = write(arguments.run, arguments.folder, arguments.limits)
    else:
        evaluation, _ = measure(arguments.folder)
    print(results_table(evaluation, Config.load(arguments.folder / "run.json").replace(run_dir=str(arguments.folder))))


if __name__ == "__main__":
    main()
