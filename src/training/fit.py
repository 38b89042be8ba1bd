"""The Lightning module, the learning-rate finder, training and evaluation."""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training.callbacks import Progress, ResumableCSVLogger, StopIfNotFinite, ema
from src.training.checkpoints import (
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    config_for_resume,
    find_checkpoint,
    find_corruption,
    latest_valid_checkpoint,
    run_lock,
)
from src.training.lr_finder import find_lr
from src.training.metrics import (
    Evaluation,
    coco_average_precision,
    mean_average_precision,
)
from src.training.module import YOLOv3Module, make_trainer


def fit(config: Config, data: DetectionDataModule | None = None, ckpt_path: str | None = None) -> YOLOv3Module:
    """Train by `config` and return the detector, its weights the averaged ones of the last epoch.

    Writes config.json, metrics.csv and checkpoints best.ckpt (by VOC AP), last.ckpt and previous.ckpt (of the epoch
    before) to `config.run_dir`, which no other process can train in meanwhile.
    ckpt_path: "last" goes on where that folder's last good checkpoint was written, at the start of the epoch after
    it, and a checkpoint's path goes on from that one; "auto" goes on if there is a last one, and otherwise starts;
    None starts anew, and the folder's last ones go.
    Raises ValueError where `data` were made with other settings, or the run to go on with was started with others.
    """
    folder, data = Path(config.run_dir), data or DetectionDataModule(config)
    data.check_matches(config)
    with run_lock(folder):
        config, checkpoint = prepare_run(config, data, ckpt_path)
        step, epochs = checkpoint_progress(checkpoint)
        if epochs >= config.epochs:
            print(f"{checkpoint} is of the last epoch: there is nothing left to train")
            return load_ema_module(config, checkpoint)  # Lightning would leave the weights that are not averaged
        pl.seed_everything(config.seed, verbose=False)
        options = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        trainer = make_trainer(
            config, max_epochs=config.epochs, log_every_n_steps=10, default_root_dir=folder, plugins=AtomicCheckpointIO(),
            logger=ResumableCSVLogger(folder / "metrics.csv", before=step), enable_checkpointing=True, enable_progress_bar=True,
            callbacks=[
                Progress(), StopIfNotFinite(), ema(config.ema_decay),
                ModelCheckpoint(folder, "best", monitor="val/mAP50", mode="max", **options),
                ModelCheckpoint(folder, "last", **options),  # save_last would save only when the best improves
            ],
        )  # fmt: skip
        detector = YOLOv3Module(config)
        trainer.fit(detector, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if dist.is_initialized():
        dist.destroy_process_group()
        if rank_zero_only.rank:
            sys.exit()  # this process ran the script again only to share the training
    return detector


def prepare_run(config: Config, data: DetectionDataModule, ckpt_path: str | None) -> tuple[Config, Path | None]:
    """The settings to train by, written to the run's folder, and the checkpoint to go on from, see `fit`.

    Raises what `find_checkpoint` and `config_for_resume` raise.
    """
    folder = Path(config.run_dir)
    checkpoint = find_checkpoint(folder, ckpt_path)
    if rank_zero_only.rank:  # the process that started this one has done the rest
        return Config.load(folder / "config.json"), checkpoint
    if checkpoint:
        config = config_for_resume(config, folder / "config.json")
    elif not config.max_lr:
        config = config.replace(max_lr=find_lr(config, data).suggestion)
    if checkpoint == folder / PREVIOUS:
        checkpoint = checkpoint.replace(folder / LAST)
    if not checkpoint:
        for name in (LAST, PREVIOUS):
            (folder / name).unlink(missing_ok=True)
    config.save(folder / "config.json")
    return config, checkpoint


def checkpoint_progress(checkpoint: Path | None) -> tuple[int, int]:
    """Steps and epochs done when it was written."""
    if not checkpoint:
        return 0, 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return state["global_step"], state["epoch"] + 1


def load_ema_module(config: Config, checkpoint: Path) -> YOLOv3Module:
    """A detector with the averaged weights of a checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    detector = YOLOv3Module(config.replace(pretrained_weights=""))
    detector.on_load_checkpoint(state)
    detector.load_state_dict(state["state_dict"])
    return detector.eval()


def load_detector(folder: str | Path, which: str = "best") -> YOLOv3Module:
    """The detector of a run's folder, with the averaged weights of its best or last checkpoint.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    path = Path(folder) / f"{which}.ckpt"
    if which == "last":
        path = latest_valid_checkpoint(Path(folder)) or path
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train first, or name the folder of a run")
    if which != "last" and find_corruption(path):
        raise ValueError(f'{path} is damaged ({find_corruption(path)}); load_detector(folder, "last") reads another one')
    return load_ema_module(Config.load(Path(folder) / "config.json"), path)


def evaluate(detector: YOLOv3Module, data: DetectionDataModule) -> Evaluation:
    """Every number of the course and every average precision, on all held-out pictures."""
    data.setup()
    make_trainer(detector.config.replace(devices=1)).validate(detector, data.val_dataloader(), verbose=False)
    columns = {"VOC AP@.5, area": "ap", "VOC AP@.5, 11 points": "ap_11pt", "course mAP@.5": "ap_course"}
    precisions = {name: mean_average_precision(detector.per_class, column) for name, column in columns.items()}
    precisions |= coco_average_precision(detector.predictions, detector.ground_truth)
    return Evaluation(detector.accuracies, precisions, detector.per_class, detector.predictions, detector.ground_truth)
