"""The course's results table, and exported weights with a model card of their measured results.

python -m src.training.report FOLDER             measure exported weights
python -m src.training.report FOLDER --run RUN   export a run's best checkpoint before
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from src.config import DATA_ROOT, DATASETS, Config
from src.data.datamodule import DetectionDataModule
from src.serving.predictor import CONFIDENCE
from src.training.fit import evaluate, load_detector
from src.training.metrics import COURSE_THRESHOLD, STRICT_THRESHOLD, Evaluation, confusion
from src.training.module import YOLOv3Module, training_metadata

HEADER = (
    "validation split",
    "course target",
    f"at {COURSE_THRESHOLD}",
    f"at {STRICT_THRESHOLD}",
    "",
)
NAMES = {"class": "class accuracy", "no_object": "no-object accuracy", "object": "object accuracy"}
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

Each class and the confusion matrix: [`validation.json`](validation.json).

`python -m src.training.report FOLDER` computes these results again, if the data set's lists
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
    if config.width >= 1:
        return {"class": 0.80, "no_object": 0.98, "object": 0.78}
    return {"class": 0.75, "no_object": 0.95, "object": 0.70}


@dataclass(frozen=True)
class ResultsTable:
    """The accuracies with the course targets, and the average precisions, in aligned Markdown.

    The columns are objectness thresholds; the course target applies at 0.05. Class accuracy and
    average precision don't depend on them.
    """

    evaluation: Evaluation
    config: Config

    def __repr__(self) -> str:
        accuracies = self.evaluation.accuracies
        rows = []
        for key, target in course_targets(self.config).items():
            value = accuracies.get(key, accuracies.get(f"{key}@{COURSE_THRESHOLD}"))
            strict = accuracies.get(key, accuracies.get(f"{key}@{STRICT_THRESHOLD}"))
            verdict = "pass" if value >= target else "not yet"
            rows.append((NAMES[key], f"{target:.0%}", f"{value:.2%}", f"{strict:.2%}", verdict))
        for name, value in self.evaluation.precisions.items():
            rows.append((name, "", f"{value:.4f}", "", ""))
        columns = zip(HEADER, ["---"] * len(HEADER), *rows, strict=True)
        padded = [[f"{cell:<{max(map(len, column))}}" for cell in column] for column in columns]
        return "\n".join("| " + " | ".join(line) + " |" for line in zip(*padded, strict=True))

    _repr_markdown_ = __repr__


def write(run: Path, folder: Path) -> ResultsTable:
    """Export the best checkpoint of `run` in half precision, measure it, and write its card.

    Writes model.safetensors, config.json, run.json, metrics.csv, README.md, and validation.json:
    the table per class and the confusion matrix.
    """
    config = Config.load(run / "config.json")
    model = load_detector(run).model.half()
    model.save_pretrained(folder)
    evaluation, data = measure(folder, config)
    model.metadata = training_metadata(
        evaluation.accuracies,
        evaluation.precisions["VOC AP@.5, area"],
        config,
        epochs=model.metadata["epochs"],
    )
    model.save_pretrained(folder)
    write_card(folder, model, config, evaluation, data)
    counts = confusion(evaluation.predictions, evaluation.ground_truth, len(evaluation.per_class))
    text = json.dumps({"per_class": evaluation.per_class, "confusion": counts.tolist()})
    (folder / "validation.json").write_text(text, encoding="utf-8")
    shutil.copyfile(run / "metrics.csv", folder / "metrics.csv")
    is_voc = config.dataset == "voc"  # its folder differs between machines
    config.replace(data_root=DATA_ROOT if is_voc else config.data_root).save(folder / "run.json")
    return ResultsTable(evaluation, config)


def measure(folder: Path, config: Config) -> tuple[Evaluation, DetectionDataModule]:
    """Evaluate weights exported by `write`, in float32, on the data of `config`."""
    config = config.replace(pretrained_weights=str(folder), precision="32-true")
    data = DetectionDataModule(config)
    return evaluate(YOLOv3Module(config), data), data


def write_card(folder: Path, model, config: Config, evaluation: Evaluation, data) -> None:
    """Write the model card of exported weights, README.md in Markdown with the Hub's header."""
    val_data = ", ".join(config.val_splits) or f"{config.val_fraction:.0%} of the training images"
    text = CARD.format(
        config=config,
        parameters=model.num_parameters / 1e6,
        metadata=model.metadata,
        train_images=len(data.train_records),
        val_images=len(data.val_records),
        val_data=f"{DATASETS[config.dataset]} {val_data}",
        start=Path(config.pretrained_weights).name or "random",
        results=ResultsTable(evaluation, config),
        confidence=CONFIDENCE,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Run the command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m src.training.report", description="Export or measure weights."
    )
    parser.add_argument("folder", type=Path, help="folder of the weights")
    parser.add_argument("--run", type=Path, help="folder of a run to export to FOLDER before")
    arguments = parser.parse_args()
    try:
        if arguments.run:
            table = write(arguments.run, arguments.folder)
        else:
            config = Config.load(arguments.folder / "run.json")
            if config.dataset == "voc":
                config = config.replace(data_root=Config().data_root)
            table = ResultsTable(measure(arguments.folder, config)[0], config)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    print(table)


if __name__ == "__main__":
    main()
