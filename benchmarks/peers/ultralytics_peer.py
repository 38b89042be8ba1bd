"""Jobs of ultralytics' YOLOv3 (AGPL-3.0). Runs in its own environment only; this project neither ships nor needs it."""

import itertools
from pathlib import Path

import torch
import ultralytics
import yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import torch_utils

from benchmarks.peers.serve import Job, bias_shift, calibrate_batch_norm, describe, files, serve

MIN_SCORE = 0.001  # default of its validation
OPTIONS = {"device": "cpu", "workers": 0, "plots": False, "verbose": False, "save": False}


def start(settings: dict) -> tuple[dict, dict]:
    """Build the network and the jobs."""
    torch_utils.NUM_THREADS = settings["cores"]  # otherwise its cores minus one
    work = Path(settings["work"])
    config = write_model(work / "yolov3-width.yaml", settings["width"])
    options = OPTIONS | {
        "imgsz": settings["size"],
        "batch": settings["batch"],
        "project": str(work / "runs"),
        "exist_ok": True,
    }
    options["data"] = f"{settings['data']}/data.yaml"

    def trainer() -> DetectionTrainer:
        trainer = DetectionTrainer(
            overrides=options | {"model": config, "pretrained": False, "epochs": 1000, "val": False}
        )
        trainer._setup_train()
        return trainer

    yolo = YOLO(config, task="detect", verbose=False)
    calibrate(yolo, trainer())
    images = files(f"{settings['data']}/images/val", settings["folder"])
    predict = {
        "imgsz": settings["size"],
        "device": "cpu",
        "verbose": False,
        "save": False,
        "project": options["project"],
    }
    return describe(
        f"ultralytics {ultralytics.__version__}", YOLO(config).model, settings["size"]
    ), {
        "train float32": lambda: training_step(trainer(), False),
        "train bfloat16": lambda: training_step(trainer(), True),
        "sample cold": lambda: first_epoch(dataset_factory(trainer(), settings)),
        "sample warm": lambda: later_epochs(dataset_factory(trainer(), settings)(cache="ram")),
        "validate": lambda: lambda: (yolo.val(**options, name="val"), settings["images"])[1],
        "predict image": lambda: lambda: len(yolo.predict(images[0], **predict)),
        "predict folder": lambda: (
            lambda: len(list(yolo.predict(images, **predict, batch=8, stream=True)))
        ),
    }


def write_model(path: Path, width: float) -> str:
    """Write the installed package's YOLOv3 with another width multiplier; returns its path."""
    package = Path(ultralytics.__file__).parent
    model = yaml.safe_load((package / "cfg/models/v3/yolov3.yaml").read_text())
    path.write_text(yaml.safe_dump(model | {"width_multiple": width}))
    return str(path)


def training_batch(trainer: DetectionTrainer) -> dict:
    return next(iter(trainer.train_loader))


def calibrate(yolo: YOLO, trainer: DetectionTrainer) -> None:
    """Give the model the data set's classes, and calibrate batch norm and the class bias on a batch."""
    yolo.model = trainer.model.float()
    images = trainer.preprocess_batch(training_batch(trainer))["img"]
    calibrate_batch_norm(yolo.model, images)
    with torch.no_grad():
        probability = yolo.model(images)[0][:, 4:].amax(dim=1).clamp(1e-12, 1 - 1e-6)
        shift = bias_shift(
            lambda shift: (probability.logit() + shift).sigmoid(), MIN_SCORE, len(images)
        )
        for branch in yolo.model.model[-1].cv3:
            branch[-1].bias += shift


def training_step(trainer: DetectionTrainer, bfloat16: bool) -> Job:
    """Forward pass, loss and backward pass; clipping, optimizer and EMA after as many batches as it accumulates."""
    batch, steps = training_batch(trainer), itertools.count(1)
    trainer.model.train()

    def step() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            prepared = trainer.preprocess_batch(dict(batch))
            loss, _ = trainer.model(prepared)
        loss.sum().backward()
        if next(steps) % trainer.accumulate == 0:
            trainer.optimizer_step()
        return len(batch["img"])

    return step


def dataset_factory(trainer: DetectionTrainer, settings: dict):
    """Return a function that builds the training data set with mosaics on every sample, without or with a cache."""

    def build(cache: str | bool = False):
        trainer.args.imgsz, trainer.args.cache = settings["loader_size"], cache
        return trainer.build_dataset(trainer.data["train"], mode="train", batch=settings["batch"])

    return build


def first_epoch(build) -> Job:
    """One pass over the images of a new data set without a cache."""
    datasets = iter(lambda: build(), None)

    def epoch() -> int:
        dataset = next(datasets)
        return len([dataset[number] for number in range(len(dataset))])

    return epoch


def later_epochs(dataset) -> Job:
    """Passes over the images in memory."""
    return lambda: len([dataset[number] for number in range(len(dataset))])


if __name__ == "__main__":
    serve(start)
