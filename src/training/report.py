"""The course's results table, and exported weights with a model card of their measured results.

python -m src.training.report write RUN FOLDER   export a run's best checkpoint and measure it
python -m src.training.report check FOLDER       measure exported weights again, on the same data
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from src.config import DATA_ROOT, DATASETS, Config
from src.data.datamodule import DetectionDataModule
from src.serving.predictor import CONFIDENCE
from src.training.fit import evaluate, load_detector
from src.training.metrics import COURSE_THRESHOLD, STRICT_THRESHOLD, Evaluation
from src.training.module import YOLOv3Module, training_metadata

HEADER = (
    "validation split",
    "course target",
    f"at {COURSE_THRESHOLD}",
    f"at {STRICT_THRESHOLD}",
    "",
)
NOTE = (
    f"Objectness thresholds {COURSE_THRESHOLD} and {STRICT_THRESHOLD}; "
    f"the course target applies at {COURSE_THRESHOLD}."
)
NAMES = {"class": "class accuracy", "no_object": "no-object accuracy", "object": "object accuracy"}
OWN_DATA = ("yolo", "coco")  # data sets that are only in the folder config.data_root
CARD = """---
license: mit
library_name: pytorch
pipeline_tag: object-detection
tags: [object-detection, yolov3, darknet-53]
---
# YOLOv3, width {config.width:g}, {config.image_size} px

{parameters:.1f} million parameters in half precision: the exponential moving average (EMA) of the
training weights, at the epoch of the best validation mAP.

| | |
| --- | --- |
| training data | {metadata[data]} ({train_images:,} images) |
| validation data | {val_data} ({val_images:,} images) |
| initial weights | {start} |
| epochs | {metadata[epochs]} |
| settings and log | [`run.json`](run.json), [`metrics.csv`](metrics.csv) |

## Results on the validation split

{results}

Average precision of each class at IoU 0.5 (VOC, area; `difficult` objects don't count):

{classes}

`python -m src.training.report check FOLDER` computes these results again, if the data set's lists
name the same images. For PASCAL VOC set `VOC_ROOT` to the folder that contains `VOCdevkit`.

## Use

```python
from src.serving.predictor import Predictor
detections = Predictor.load("weights")("photo.jpg", confidence={confidence})
```
"""


def course_targets(config: Config) -> dict[str, float]:
    """Return the accuracies that the assignment requires by epoch 40.

    They are higher at full width than at reduced width.
    """
    values = (0.80, 0.98, 0.78) if config.width >= 1 else (0.75, 0.95, 0.70)
    return dict(zip(NAMES, values, strict=True))


def result_rows(accuracies: dict[str, float], config: Config) -> list[dict]:
    """Return a row per accuracy: "name", "target", "value", "strict" (fractions) and "passed".

    "value" is at objectness threshold 0.05, "strict" at 0.5. Class accuracy has no threshold, so
    both are the same.
    """
    rows = []
    for key, target in course_targets(config).items():
        value = accuracies.get(key, accuracies.get(f"{key}@{COURSE_THRESHOLD}"))
        strict = accuracies.get(key, accuracies.get(f"{key}@{STRICT_THRESHOLD}"))
        passed = value >= target
        row = {"name": NAMES[key], "target": target, "value": value, "strict": strict}
        rows.append(row | {"passed": passed})
    return rows


@dataclass(frozen=True)
class ResultsTable:
    """The accuracies with the course targets, and the average precisions.

    Text in a terminal, a table in a notebook.
    """

    evaluation: Evaluation
    config: Config

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the rows: name, course target, value at both thresholds, verdict."""
        rows = []
        for row in result_rows(self.evaluation.accuracies, self.config):
            values = (f"{row[key]:.2%}" for key in ("target", "value", "strict"))
            rows.append((row["name"], *values, "pass" if row["passed"] else "not yet"))
        for name, value in self.evaluation.precisions.items():
            rows.append((name, "", f"{value:.4f}", "", ""))
        return rows

    def _repr_markdown_(self) -> str:
        return markdown_table(HEADER, self.rows()) + f"\n\n{NOTE}"

    def __repr__(self) -> str:
        lines = []
        for name, target, value, strict, verdict in (HEADER, *self.rows()):
            lines.append(f"{name:<22}{target:>14}{value:>10}{strict:>10}  {verdict}")
        lines.insert(1, "-" * 65)
        folder = f"Weights, metrics.csv and settings of this run: {self.config.run_dir}/"
        return "\n".join([*lines, "", NOTE, folder])


def markdown_table(header: tuple, rows: list[tuple]) -> str:
    """Format a table in Markdown."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(run: Path, folder: Path) -> Evaluation:
    """Export the best checkpoint of `run` in half precision, measure it, and write its card.

    Writes model.safetensors, config.json, run.json, metrics.csv and README.md.
    """
    config = Config.load(run / "config.json")
    model = load_detector(run).model.half()
    model.save_pretrained(folder)
    # where VOC is differs between machines
    data_root = config.data_root if config.dataset in OWN_DATA else DATA_ROOT
    config.replace(data_root=data_root).save(folder / "run.json")
    evaluation, data = measure(folder, data_root=config.data_root)
    map50 = evaluation.precisions["VOC AP@.5, area"]
    epochs = model.metadata["epochs"]
    model.metadata = training_metadata(evaluation.accuracies, map50, config, epochs)
    model.save_pretrained(folder)
    shutil.copyfile(run / "metrics.csv", folder / "metrics.csv")
    write_card(folder, model, config, evaluation, data)
    return evaluation


def measure(folder: Path, data_root: str = "") -> tuple[Evaluation, DetectionDataModule]:
    """Evaluate weights exported by `write`, in float32, on the data that their run.json names.

    data_root: default: run.json's for own data, Config's (so VOC_ROOT) for PASCAL VOC.
    """
    config = Config.load(folder / "run.json")
    if not data_root:
        data_root = config.data_root if config.dataset in OWN_DATA else Config().data_root
    config = config.replace(
        data_root=data_root, pretrained_weights=str(folder), precision="32-true"
    )
    data = DetectionDataModule(config)
    return evaluate(YOLOv3Module(config), data), data


def write_card(folder: Path, model, config: Config, evaluation: Evaluation, data) -> None:
    """Write the model card of exported weights, README.md in Markdown with the Hub's header."""
    val_data = ", ".join(config.val_splits) or f"{config.val_fraction:.0%} of the training images"
    if config.dataset == "shapes":
        val_data = "images of another seed"
    classes = [(row["class"], row["num_gt"], f"{row['ap']:.3f}") for row in evaluation.per_class]
    text = CARD.format(
        config=config,
        parameters=model.num_parameters / 1e6,
        metadata=model.metadata,
        train_images=len(data.train_records),
        val_images=len(data.val_records),
        val_data=f"{DATASETS[config.dataset]} {val_data}",
        start=Path(config.pretrained_weights).name or "random",
        results=markdown_table(HEADER, ResultsTable(evaluation, config).rows()),
        classes=markdown_table(("class", "objects", "AP"), classes),
        confidence=CONFIDENCE,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m src.training.report", description="Export or measure weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("write", help="export a run's best checkpoint with a model card")
    export.add_argument("run", type=Path, help="folder of the run")
    export.add_argument("folder", type=Path, help="folder for the weights")
    check = commands.add_parser("check", help="measure exported weights again")
    check.add_argument("folder", type=Path, help="folder that `write` has written")
    arguments = parser.parse_args()
    try:
        if arguments.command == "write":
            evaluation = write(arguments.run, arguments.folder)
        else:
            evaluation, _ = measure(arguments.folder)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    config = Config.load(arguments.folder / "run.json")
    print(ResultsTable(evaluation, config.replace(run_dir=str(arguments.folder))))


if __name__ == "__main__":
    main()
