"""Train, resume, load and evaluate."""

import shutil
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.training import checkpoints
from src.training.callbacks import EMA, Progress, ResumableCSVLogger, StopIfNotFinite
from src.training.lr_finder import find_lr
from src.training.memory import explain_out_of_memory, free_trainer
from src.training.metrics import Evaluation, coco_average_precision, mean_average_precision
from src.training.module import YOLOv3Module
from src.training.optimizer import OneCycleModule
from src.training.processes import run_in_processes
from src.training.trainer import make_trainer


@explain_out_of_memory
def fit(
    config: Config, data: DetectionDataModule | None = None, ckpt_path: str | None = None
) -> YOLOv3Module:
    """Train a detector and return it with the averaged (EMA) weights of the last epoch.

    Writes config.json, metrics.csv and checkpoints to `config.run_dir`: best.ckpt (highest VOC mAP), last.ckpt and
    previous.ckpt (of the epoch before). No other process can train in that folder meanwhile. With several devices in a
    notebook, new processes train and `data` is sent to them, see `run_in_processes`.
    ckpt_path: "last" resumes after the last complete epoch; a path resumes from that checkpoint; "auto" resumes if there
    is a checkpoint and starts otherwise; None starts. A start deletes the checkpoints and metrics.csv in `run_dir`; a
    checkpoint of another folder replaces best.ckpt and metrics.csv with those beside it.
    Raises ValueError if `data` or the run to resume was made with another config, torch.OutOfMemoryError that names
    settings that fit if the GPU's memory is too small.
    """
    data = data or DetectionDataModule(config)
    config = data.check_matches(config)
    return train(YOLOv3Module, config, data, ckpt_path)


def train(
    module_class: type[OneCycleModule], config, data: pl.LightningDataModule, ckpt_path: str | None
) -> OneCycleModule:
    """Train `module_class(config)` on `data`, see `fit`. config: a dataclass with the methods and training fields of Config."""
    with checkpoints.run_lock(Path(config.run_dir)):
        config, checkpoint = prepare_run(module_class, config, data, ckpt_path)
        if checkpoint and checkpoint_progress(checkpoint)[1] >= config.epochs:
            print(f"{checkpoint} is of the last epoch. There is nothing left to train.")
            return load_ema_module(module_class, config, checkpoint)
        if config.devices > 1 and hasattr(sys, "ps1"):  # in a notebook
            free_trainer(data)
            run_in_processes(config.devices, run_trainer, module_class, config, data, checkpoint)
            return load_ema_module(module_class, config, Path(config.run_dir) / checkpoints.LAST)
        module = run_trainer(module_class, config, data, checkpoint)
    if dist.is_initialized():
        dist.destroy_process_group()
        if rank_zero_only.rank:
            sys.exit()  # this process ran the script again only to share the training
    return module


def run_trainer(
    module_class: type[OneCycleModule],
    config,
    data: pl.LightningDataModule,
    checkpoint: Path | None,
) -> OneCycleModule:
    """Train a new module, or resume from `checkpoint`, with EMA, progress, metrics.csv and checkpoints."""
    pl.seed_everything(config.seed, verbose=False)
    module = module_class(config)
    folder, options = (
        Path(config.run_dir),
        {"save_on_train_epoch_end": True, "enable_version_counter": False},
    )
    step, _ = checkpoint_progress(checkpoint)
    trainer = make_trainer(
        config,
        max_epochs=config.epochs,
        log_every_n_steps=10,
        default_root_dir=folder,
        plugins=checkpoints.AtomicCheckpointIO(),
        enable_checkpointing=True,
        enable_progress_bar=True,
        logger=ResumableCSVLogger(folder / "metrics.csv", before=step),
        callbacks=[
            Progress(),
            StopIfNotFinite(),
            EMA(config.ema_decay),
            checkpoints.BestCheckpoint(
                folder, "best", monitor=module.monitor, mode="max", **options
            ),
            ModelCheckpoint(
                folder, "last", **options
            ),  # save_last would save only when the best improves
        ],
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


def prepare_run(
    module_class: type[OneCycleModule], config, data: pl.LightningDataModule, ckpt_path: str | None
) -> tuple[Config, Path | None]:
    """Write the run's config.json, and return the config to train by and the checkpoint to resume from.

    Runs the learning-rate range test if `max_lr` is 0. A start deletes the former run, after module and data have been built
    once: settings or data that can't be used raise before. Raises what `find_checkpoint` and `config_for_resume` raise.
    """
    folder = Path(config.run_dir)
    if rank_zero_only.rank and ckpt_path not in (None, "auto") and not Path(ckpt_path).exists():
        ckpt_path = "last"  # the first process has renamed it
    checkpoint = checkpoints.find_checkpoint(folder, ckpt_path)
    if rank_zero_only.rank:  # the first process has done the rest
        return type(config).load(folder / "config.json"), checkpoint
    if checkpoint:
        config = checkpoints.config_for_resume(config, checkpoint.with_name("config.json"))
    elif not config.max_lr:
        config = config.replace(max_lr=find_lr(config, data).suggestion)
    if checkpoint in [folder / name for name in checkpoints.RESUME_CANDIDATES]:
        checkpoint = checkpoint.replace(folder / checkpoints.LAST)
    if not (checkpoint and checkpoint.parent.samefile(folder)):
        module_class(config)
        data.prepare_data()
        data.setup("fit")
        for name in (checkpoints.BEST, *checkpoints.RESUME_CANDIDATES, "metrics.csv"):
            (folder / name).unlink(missing_ok=True)
        for path in (
            (checkpoint.with_name(checkpoints.BEST), checkpoint.with_name("metrics.csv"))
            if checkpoint
            else ()
        ):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
    config.save(folder / "config.json")
    return config, checkpoint


def checkpoint_progress(checkpoint: Path | None) -> tuple[int, int]:
    """Return the numbers of complete steps and epochs of a checkpoint, zeros for None."""
    if not checkpoint:
        return 0, 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return state["global_step"], state["epoch"] + 1


def load_ema_module(module_class: type[OneCycleModule], config, checkpoint: Path) -> OneCycleModule:
    """Build a module with the averaged (EMA) weights of a checkpoint. Lightning's resume would load the current weights."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if getattr(config, "pretrained_weights", ""):  # the checkpoint replaces them
        config = config.replace(pretrained_weights="")
    module = module_class(config)
    module.on_load_checkpoint(state)
    module.load_state_dict(state["state_dict"])
    return module.eval()


def load_detector(folder: str | Path, which: str = "best") -> YOLOv3Module:
    """Load the detector of a run's folder, with the averaged (EMA) weights of its "best" or "last" checkpoint.

    Raises FileNotFoundError if there is no checkpoint, ValueError if it is damaged.
    """
    folder = Path(folder)
    path = folder / f"{which}.ckpt"
    if which == "last":
        path = checkpoints.latest_valid_checkpoint(folder) or path
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Train first, or give the folder of a run.")
    if which != "last" and (problem := checkpoints.find_corruption(path)):
        raise ValueError(
            f'{path} is damaged: {problem}. Load another one with load_detector(folder, "last").'
        )
    return load_ema_module(YOLOv3Module, Config.load(folder / "config.json"), path)


def evaluate(detector: YOLOv3Module, data: DetectionDataModule) -> Evaluation:
    """Compute the three accuracies and all average precisions on the validation split.

    Raises ValueError if the classes of `data` aren't those of the detector, in the same order.
    """
    if detector.config.classes != data.config.classes:
        raise ValueError(
            f"The detector's classes are {detector.config.classes}, those of the data {data.config.classes}. "
            "Create the data with the detector's config: DetectionDataModule(detector.config)."
        )
    data.setup()
    make_trainer(detector.config.replace(devices=1)).validate(
        detector, data.val_dataloader(), verbose=False
    )
    columns = {
        "VOC AP@.5, area": "ap",
        "VOC AP@.5, 11 points": "ap_11pt",
        "course mAP@.5": "ap_course",
    }
    precisions = {
        name: mean_average_precision(detector.per_class, column) for name, column in columns.items()
    }
    precisions |= coco_average_precision(detector.predictions, detector.ground_truth)
    return Evaluation(
        detector.accuracies,
        precisions,
        detector.per_class,
        detector.predictions,
        detector.ground_truth,
    )
