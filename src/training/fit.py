"""Train, resume, load and evaluate."""

import os
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.callbacks import ModelCheckpoint

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training import run_folder
from src.training.callbacks import EMA, MetricsCSV, Progress, StopIfNotFinite
from src.training.devices import (
    check_trainer,
    explain_out_of_memory,
    free_trainer,
    make_trainer,
)
from src.training.lr_finder import find_lr
from src.training.metrics import Evaluation, coco_average_precision, mean_average_precision
from src.training.module import YOLOv3Module
from src.training.optimizer import OneCycleModule


@explain_out_of_memory
def fit(
    config: Config, data: DetectionDataModule | None = None, ckpt_path: str | None = None
) -> YOLOv3Module:
    """Train a detector and return it with the averaged (EMA) weights of the last epoch.

    Writes config.json, metrics.csv and checkpoints to `config.run_dir`: best.ckpt (highest VOC
    mAP), last.ckpt and previous.ckpt (of the epoch before). No other process can train there.
    With several devices, new processes train and `data` is sent to them, see `train_in_process`.
    ckpt_path: "last" resumes after the last complete epoch, "best" after the best; "auto" is "last"
    if there is a checkpoint, and starts otherwise; None starts, and deletes the checkpoints and
    metrics.csv in `run_dir`.
    Raises ValueError if `data` or the run to resume was made with another config,
    torch.OutOfMemoryError that names the settings to reduce if the GPU's memory is too small.
    """
    data = data or DetectionDataModule(config)
    return train(YOLOv3Module, data.check_matches(config), data, ckpt_path)


def train(
    module_class: type[OneCycleModule],
    config: Config,
    data: pl.LightningDataModule,
    ckpt_path: str | None,
) -> OneCycleModule:
    """Train `module_class(config)` on `data`, see `fit`."""
    folder = Path(config.run_dir)
    with run_folder.run_lock(folder):
        check_trainer(config)
        checkpoint = run_folder.find_checkpoint(folder, ckpt_path)
        if checkpoint:
            config = run_folder.config_for_resume(config, checkpoint)
        elif not config.max_lr:
            config = config.replace(max_lr=find_lr(config, data).suggestion)
        module = module_class(config)  # what can't be built raises before anything is deleted
        data.prepare_data()
        data.setup("fit")
        run_folder.write_start(config, checkpoint)
        if config.devices > 1:
            free_trainer(data)
            arguments = (find_free_network_port(), config, data, module_class)
            torch.multiprocessing.spawn(train_in_process, arguments, nprocs=config.devices)
        else:
            run_trainer(module, data)
    return load_average(module, folder / run_folder.LAST)


def train_in_process(
    rank: int,
    port: int,
    config: Config,
    data: pl.LightningDataModule,
    module_class: type[OneCycleModule],
) -> None:
    """Train in one of several new processes.

    Processes are spawned, because a fork of a process that has used the GPU can't use it: the
    classes of `data` and module must be importable, not defined in the notebook, and a script needs
    `if __name__ == "__main__":`. An error ends all processes and is raised with its traceback.
    """
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    run_trainer(module_class(config), data)


def run_trainer(module: OneCycleModule, data: pl.LightningDataModule) -> None:
    """Train a new module as `module.config` says, or resume if its `run_dir` has a last.ckpt."""
    config = module.config
    folder = Path(config.run_dir)
    pl.seed_everything(config.seed, verbose=False)
    options = {"save_on_train_epoch_end": True, "enable_version_counter": False}
    trainer = make_trainer(
        config,
        max_epochs=config.epochs,
        default_root_dir=folder,
        plugins=[run_folder.AtomicCheckpointIO()],
        enable_checkpointing=True,
        callbacks=[
            Progress(),
            StopIfNotFinite(),
            EMA(config.ema_decay),
            MetricsCSV(folder / run_folder.METRICS),
            ModelCheckpoint(folder, "best", monitor=module.monitor, mode="max", **options),
            # not the option save_last: it would save only when the best improves
            ModelCheckpoint(folder, "last", **options),
        ],
    )
    checkpoint = folder / run_folder.LAST
    trainer.fit(
        module,
        datamodule=data,
        ckpt_path=checkpoint if checkpoint.exists() else None,
        weights_only=True,
    )


def load_average(module: OneCycleModule, checkpoint: Path) -> OneCycleModule:
    """Load the averaged (EMA) weights of a checkpoint; Lightning would load the current ones."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])
    return module.eval()


def load_detector(folder: str | Path, which: str = "best") -> YOLOv3Module:
    """Load the detector of a run's folder: the averaged (EMA) weights of a checkpoint.

    which: "best" or "last". Raises FileNotFoundError if it is missing or damaged.
    """
    path = run_folder.find_checkpoint(Path(folder), which)
    config = Config.load(path.with_name(run_folder.CONFIG))
    config = config.replace(pretrained_weights="")  # the checkpoint replaces them
    return load_average(YOLOv3Module(config), path)


def evaluate(detector: YOLOv3Module, data: DetectionDataModule) -> Evaluation:
    """Compute the three accuracies and all average precisions on the validation split.

    Raises ValueError if the classes of `data` aren't those of the detector, in the same order.
    """
    if detector.config.classes != data.config.classes:
        raise ValueError(
            f"The detector's classes are {detector.config.classes}, those of the data "
            f"{data.config.classes}. Create the data with the detector's config: "
            "DetectionDataModule(detector.config)."
        )
    data.setup()
    device = next(detector.model.parameters()).device
    trainer = make_trainer(detector.config.replace(devices=1))
    trainer.validate(detector, data.val_dataloader(), verbose=False)
    detector.to(device)  # Lightning moves it to the CPU, but a Predictor may use the model
    return Evaluation(
        accuracies=detector.accuracies,
        precisions={
            "VOC AP@.5, area": mean_average_precision(detector.per_class),
            "VOC AP@.5, 11 points": mean_average_precision(detector.per_class, "ap_11pt"),
            "course mAP@.5": mean_average_precision(detector.per_class, "ap_course"),
            **coco_average_precision(detector.predictions, detector.ground_truth),
        },
        per_class=detector.per_class,
        predictions=detector.predictions,
        ground_truth=detector.ground_truth,
    )
