"""The part of `benchmarks.gpu` that trains: a trial, a run of as many epochs as fit, export and evaluation."""

import os
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu_parts import Result, delete_checkpoints
from benchmarks.timing import now
from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.data.voc import list_splits
from src.training import model_card
from src.training.fit import fit
from src.training.fit import train as train_module
from src.training.module import YOLOv3Module

TRIAL_IMAGES, TRIAL_VAL_IMAGES = 2048, 512
RANGE_TEST_STEPS = 100
MARGIN, START_S = (
    0.85,
    20,
)  # fraction of the time that is planned; seconds to start, load and export


class TimedModule(YOLOv3Module):
    """Note in `times` when the parts of an epoch start and end. The first quarter of the steps is warm-up."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.times: dict[str, float] = {}

    def on_train_batch_start(self, batch, batch_idx) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == self.trainer.num_training_batches // 4:
            self.times["train"] = now()

    def on_train_batch_end(self, *_) -> None:
        self.times["train end"] = (
            time.perf_counter()
        )  # StopIfNotFinite has waited for the last step

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.times["val"] = now()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.times["val end"] = now()

    def on_train_end(self) -> None:
        self.times["end"] = now()


def train(options: Namespace, seconds: float) -> Iterator[Result]:
    """Train on the splits train of the VOCdevkit in VOC_ROOT, evaluate on its splits val, and export the best epoch."""
    deadline = time.monotonic() + seconds
    splits = list_splits(os.environ["VOC_ROOT"]) if os.environ.get("VOC_ROOT") else []
    found = {
        name: tuple(sorted({split for split in splits if split.endswith(f"/{name}")}))
        for name in ("train", "val")
    }
    if not all(found.values()):
        reason = "VOC_ROOT names no folder that contains VOCdevkit with lists train.txt and val.txt"
        yield {"measured": "training", "result": f"skipped: {reason}"}
        return
    config = Config(
        train_splits=found["train"],
        val_splits=found["val"],
        width=options.width,
        image_size=options.size,
        batch_size=options.batch,
        pretrained_weights=options.backbone,
        max_lr=options.max_lr,
        run_dir=str(options.out / "train"),
    )
    trial = run_trial(config, options.out / "trial")
    yield trial
    epochs = plan_epochs(config, trial, deadline - time.monotonic(), options.epochs)
    config = config.replace(epochs=epochs, close_mosaic_epochs=max(1, epochs // 10))
    start = time.monotonic()
    fit(config)
    minutes = (time.monotonic() - start) / 60
    yield {
        "measured": f"training, {epochs} epochs, width {config.width:g}, {config.image_size} px",
        "result": f"{minutes:.1f} minutes",
        "minutes": minutes,
        "config": config.run_dir + "/config.json",
    }
    yield export(
        config,
        options.out / "weights",
        f"Trained for {epochs} epochs, as many as fitted into a limit of time.",
    )


def run_trial(config: Config, folder: Path) -> Result:
    """Train one epoch on some of the images. Returns seconds per training image, validation image and checkpoint."""
    config = config.replace(
        epochs=1, close_mosaic_epochs=0, max_lr=config.max_lr or 1e-4, run_dir=str(folder)
    )
    data = DetectionDataModule(config)
    data.setup()
    images, val_images = len(data.train_records), len(data.val_records)
    data.train_data.records, data.val_data.records = (
        data.train_records[:TRIAL_IMAGES],
        data.val_records[:TRIAL_VAL_IMAGES],
    )
    module = train_module(TimedModule, data.check_matches(config), data, None)
    delete_checkpoints(folder)
    times, steps = module.times, max(1, len(data.train_data) // config.batch_size)
    timed_images = (steps - steps // 4) * min(config.batch_size, len(data.train_data))
    image_s, val_s = (
        (times["train end"] - times["train"]) / timed_images,
        times["val end"] - times["val"],
    )
    return {
        "measured": f"trial on {len(data.train_data):,} of {images:,} images of {', '.join(config.train_splits)}",
        "result": f"{1 / image_s:,.1f} images/s with the loader, {val_s:.1f} s to validate on {len(data.val_data):,} images",
        "images": images,
        "val_images": val_images,
        "image_s": image_s,
        "val_image_s": val_s / len(data.val_data),
        "checkpoint_s": times["end"] - times["val end"],
    }


def plan_epochs(config: Config, trial: Result, seconds: float, at_most: int) -> int:
    """The number of epochs that fit into `seconds` with range test, export and evaluation; at_most: 0 for no maximum.

    Exported weights are evaluated twice (all splits together, then each), in float32: twice the time of the trial.
    Raises RuntimeError if not one epoch fits.
    """
    validation = trial["val_images"] * trial["val_image_s"]
    epoch = trial["images"] * trial["image_s"] + validation + trial["checkpoint_s"]
    range_test = 0 if config.max_lr else RANGE_TEST_STEPS * config.batch_size * trial["image_s"]
    epochs = int((MARGIN * seconds - START_S - range_test - 4 * validation) / epoch)
    if epochs < 1:
        raise RuntimeError(
            f"An epoch takes about {epoch:.0f} s, but only {seconds:.0f} s remain for training, range test and evaluation. "
            "Use more --minutes, or a smaller --width or --size."
        )
    return min(epochs, at_most) if at_most else epochs


def export(config: Config, folder: Path, limits: str) -> Result:
    """Write the best epoch's weights in half precision with their card, delete the checkpoints, and return the results."""
    run = Path(config.run_dir)
    evaluation = model_card.write(run, folder, limits)
    delete_checkpoints(run)
    accuracies, precisions = evaluation.accuracies, evaluation.precisions
    names = ("class", "no_object@0.05", "object@0.05")
    text = " / ".join(f"{accuracies[name]:.1%}" for name in names)
    return {
        "measured": f"class / no-object / object accuracy at 0.05, VOC mAP@.5 on {', '.join(config.val_splits)}",
        "result": f"{text}, {precisions['VOC AP@.5, area']:.3f}",
        "accuracies": accuracies,
        "precisions": precisions,
    }
