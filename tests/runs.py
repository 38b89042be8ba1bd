"""Settings and files of the small runs that tests train."""

import csv
from pathlib import Path

import torch

from src.config import SHAPE_CLASSES, Config
from src.training.callbacks import Progress


def tiny(folder: Path, **changes) -> Config:
    """A run of 3 epochs of 4 steps that takes seconds."""
    config = Config(
        dataset="shapes",
        train_splits=("training",),
        val_splits=("validation",),
        classes=SHAPE_CLASSES,
        shapes_train=16,
        shapes_val=6,
        image_size=64,
        width=0.0625,
        epochs=3,
        batch_size=4,
        max_lr=1e-3,
        close_mosaic_epochs=1,
        num_workers=0,
        cache_gb=0,
        precision="32-true",
        run_dir=str(folder),
    )
    return config.replace(**changes)


def load(path: Path) -> dict:
    """The contents of a checkpoint."""
    return torch.load(path, weights_only=True)


def metrics_rows(folder: Path) -> list[dict]:
    """The rows of a run's metrics.csv, as text."""
    with open(folder / "metrics.csv", newline="") as lines:
        return list(csv.DictReader(lines))


def epoch_rows(folder: Path) -> list[dict]:
    """The rows of whole epochs."""
    return [row for row in metrics_rows(folder) if row["val/mAP50"]]


def equal(one: dict, other: dict) -> bool:
    """Return whether two state dicts are identical."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fail_in(monkeypatch, epoch: int):
    """Raise ConnectionError in the middle of an epoch."""

    def crash(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == epoch and batch_idx == 2:
            raise ConnectionError("machine lost")

    monkeypatch.setattr(Progress, "on_train_batch_end", crash)
