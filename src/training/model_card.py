"""Exported weights in half precision, with a model card of their measured results.

python -m src.training.model_card write runs/voc weights   export a run's best checkpoint, measure it, write its card
python -m src.training.model_card check weights            measure exported weights again; needs the same data
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

from src.config import DATA_ROOT, DATASETS, Config
from src.data.datamodule import DetectionDataModule
from src.model.network import YOLOv3
from src.model.pretrained import is_backbone, read_metadata
from src.serving.predictor import CONFIDENCE
from src.training.fit import evaluate, load_detector
from src.training.metrics import Evaluation
from src.training.module import YOLOv3Module
from src.training.report import (
    COURSE_THRESHOLD,
    STRICT_THRESHOLD,
    ResultsTable,
    markdown_table,
    result_rows,
    training_metadata,
)

OWN_DATA = ("yolo", "coco")  # data sets that are in the folder config.data_root only
CARD = """---
license: mit
library_name: pytorch
pipeline_tag: object-detection
tags: [object-detection, yolov3, darknet-53, {tag}]
---
# YOLOv3, width {width:g}, {image_size} px

{parameters:.1f} million parameters in half precision, trained from {start}. They are the
exponential moving average (EMA) of the training weights, at the epoch of the best validation mAP.

| | |
| --- | --- |
| training data | {train_data} |
| validation data | {val_data} |
| epochs | {trained_epochs} |
| batches | {batch_size} images per batch; {mosaic_prob:.0%} of the training samples are mosaics |
| image size | {sizes} |
| optimizer | AdamW, OneCycle to {max_lr:g}, weight decay {weight_decay:g} |
| settings and log | `run.json` beside this file: `Config.load("run.json")`; `metrics.csv` |

## Results on the validation split

{accuracies}

{precisions}

{splits}Average precision at IoU 0.5 (VOC area under the curve; `difficult` objects count neither as hits nor as errors):

{per_class}

`python -m src.training.model_card check` on this folder computes these results again, if the data set's lists name the same
images. For PASCAL VOC set `VOC_ROOT` to the folder that contains `VOCdevkit`.

## Use

```python
from src.serving.predictor import Predictor
detections = Predictor.load("weights")("photo.jpg", confidence={confidence})
```

## Limits

{limits}
"""


def write(run: Path, folder: Path, limits: str = "") -> Evaluation:
    """Export the best checkpoint of `run` as half-precision safetensors, evaluate the export, write its card.

    limits: a sentence for the card on what these weights are bad at.
    """
    config = Config.load(run / "config.json")
    model = load_detector(run).model.half()
    model.save_pretrained(folder)
    (config if config.dataset in OWN_DATA else config.replace(data_root=DATA_ROOT)).save(
        folder / "run.json"
    )
    evaluation, data = measure(folder, data_root=config.data_root)
    epochs = model.metadata["epochs"]
    model.metadata = training_metadata(
        evaluation.accuracies, evaluation.precisions["VOC AP@.5, area"], config, epochs
    )
    model.save_pretrained(folder)
    shutil.copyfile(run / "metrics.csv", folder / "metrics.csv")
    text = card(model, config, evaluation, data, limits, results_by_split(folder, config.data_root))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return evaluation


def results_by_split(folder: Path, data_root: str) -> str:
    """Evaluate exported weights on each validation split in `data_root` alone, if there are several; return Markdown."""
    config, rows = Config.load(folder / "run.json"), []
    for split in config.val_splits if len(config.val_splits) > 1 else ():
        evaluation, data = measure(folder, data_root=data_root, val_splits=(split,))
        accuracies = [f"{row['value']:.1%}" for row in result_rows(evaluation.accuracies, config)]
        rows.append(
            (
                split,
                len(data.val_records),
                *accuracies,
                f"{evaluation.precisions['VOC AP@.5, area']:.3f}",
            )
        )
    header = (
        "split",
        "images",
        "class accuracy",
        "no-object accuracy",
        "object accuracy",
        "VOC AP@.5, area",
    )
    return f"Each validation split alone:\n\n{markdown_table(header, rows)}\n\n" if rows else ""


def measure(folder: Path, **changes) -> tuple[Evaluation, DetectionDataModule]:
    """Evaluate weights exported by `write`, in float32, on the data that their run.json names. changes: of the config."""
    config = Config.load(folder / "run.json").replace(
        pretrained_weights=str(folder), precision="32-true"
    )
    if config.dataset not in OWN_DATA:  # VOC is wherever this machine has it
        config = config.replace(data_root=Config().data_root)
    config = config.replace(**changes)
    data = DetectionDataModule(config)
    return evaluate(YOLOv3Module(config), data), data


def card(
    model: YOLOv3,
    config: Config,
    evaluation: Evaluation,
    data: DetectionDataModule,
    limits: str,
    splits: str,
) -> str:
    """Return the model card as Markdown, with the Hub's header."""
    rows = result_rows(evaluation.accuracies, config)
    accuracies = [(row["name"], f"{row['value']:.1%}", f"{row['strict']:.1%}") for row in rows]
    classes = [(row["class"], row["num_gt"], f"{row['ap']:.3f}") for row in evaluation.per_class]
    val_data = (
        ", ".join(config.val_splits) or f"random {config.val_fraction:.0%} of the training images"
    )
    val_data = (
        f"{DATASETS[config.dataset]} {val_data}"
        if config.dataset != "shapes"
        else "synthetic, another seed"
    )
    settings = dataclasses.asdict(config) | {
        "parameters": model.num_parameters / 1e6,
        "train_data": f"{len(data.train_records):,} images: {model.metadata['data']}",
        "val_data": f"{len(data.val_records):,} images: {val_data}",
        "trained_epochs": model.metadata["epochs"],
        "sizes": describe_sizes(config),
        "start": describe_start(config),
        "splits": splits,
        "tag": {"voc": "pascal-voc", "shapes": "synthetic"}.get(config.dataset, "custom-data"),
        "accuracies": markdown_table(
            ("", f"objectness > {COURSE_THRESHOLD}", f"> {STRICT_THRESHOLD}"), accuracies
        ),
        "precisions": markdown_table(
            ("", "value"), [(n, f"{v:.3f}") for n, v in evaluation.precisions.items()]
        ),
        "per_class": markdown_table(("class", "objects", "AP"), classes),
        "limits": limits,
        "confidence": CONFIDENCE,
    }
    return CARD.format(**settings)


def describe_sizes(config: Config) -> str:
    """Describe the image sizes of the training, for the card."""
    if not config.multiscale_sizes:
        return f"{config.image_size} pixels"
    sizes, last = (
        ", ".join(map(str, config.multiscale_sizes)),
        config.epochs - config.close_mosaic_epoch,
    )
    interval = config.multiscale_interval
    return f"one of {sizes} pixels for {interval} steps each; {config.image_size} pixels in the last {last} epochs"


def describe_start(config: Config) -> str:
    """Describe the weights that the training started from, for the card."""
    source = config.pretrained_path
    facts = read_metadata(source) if source and (Path(source) / "config.json").exists() else {}
    if facts and is_backbone(source):
        return (
            f"a Darknet-53 backbone, which was pretrained to classify {facts['data']} ({facts['images']:,} images, "
            f"{facts['classes']} classes, top-1 accuracy {facts['top1']:.1%})"
        )
    if {"epochs", "data"} <= facts.keys():
        return f"a detector of the same kind, which was trained for {facts['epochs']} epochs on {facts['data']}"
    return Path(source).name if source else "scratch (no pretrained weights)"


def main() -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m src.training.model_card", description="Export or measure weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("write", help="export a run's best checkpoint with a model card")
    export.add_argument("run", type=Path)
    export.add_argument("folder", type=Path)
    export.add_argument("--limits", default="", help="a sentence on what these weights are bad at")
    commands.add_parser("check", help="measure exported weights").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "write":
            evaluation = write(arguments.run, arguments.folder, arguments.limits)
        else:
            evaluation, _ = measure(arguments.folder)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(
        ResultsTable(
            evaluation,
            Config.load(arguments.folder / "run.json").replace(run_dir=str(arguments.folder)),
        )
    )


if __name__ == "__main__":
    main()
