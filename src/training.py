"""The Lightning module, the learning-rate finder, training and evaluation."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.nn.functional import interpolate

from src.callbacks import Progress, RangeTest, StopIfNotFinite, ema
from src.config import Config
from src.dataset import DetectionData
from src.loss import YOLOLoss
from src.machine import make_trainer
from src.metrics import (
    CellAccuracy, DetectionStore, Evaluation, class_table, coco_average_precision, mean_average_precision,
)  # fmt: skip
from src.model import YOLOv3
from src.predict import to_input
from src.report import about
from src.run_folder import (
    BEFORE, LAST, MetricsFile, WholeCheckpoints, damage, find_checkpoint, held, last_good, settings_to_go_on,
)  # fmt: skip


def build_model(config: Config) -> YOLOv3:
    """A net for these settings: fresh, or from `config.weights` (a folder, hub id or Darknet file)."""
    torch.manual_seed(config.seed)
    settings = {"classes": config.classes, "anchors": config.anchors, "image_size": config.image_size}
    if config.weights and not Path(config.weights).is_file():
        return YOLOv3.from_pretrained(config.weights, num_classes=len(config.classes), width=config.width, **settings)
    model = YOLOv3(len(config.classes), config.width, **settings)
    if config.weights:
        print(f"{config.weights}: read {model.load_darknet(config.weights)}")
    return model


def drawn_side(config: Config, step: int, epoch: int) -> int:
    """The side of the batch at this step of this epoch; the same on every process, and after a resume.

    The last epochs, of whole images, are at `image_size`: so averages of batch norm and features settle there.
    """
    if not config.sizes or epoch >= config.whole_from:
        return config.image_size
    return int(np.random.default_rng((config.seed, step // config.size_steps)).choice(config.sizes))


class Detector(pl.LightningModule):
    """A `YOLOv3` with its loss, optimizer and metrics."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.lr = config, config.max_lr
        self.model = build_model(config)
        self.network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.loss, self.cells, self.store = YOLOLoss(config), CellAccuracy(), DetectionStore()
        self.accuracies: dict[str, float] = {}  # of the last validation
        self.results: dict[str, float] = {}  # these and mAP, for the callbacks

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        images = to_input(batch["images"])
        side = drawn_side(self.config, self.trainer.global_step, self.current_epoch)
        if side != images.shape[-1]:  # multi-resolution, always smaller: targets are fractions and stay
            images = interpolate(images, (side, side), mode="bilinear", antialias=True)
        terms = self.loss(self.network(images), batch["targets"], self.model.anchors_at(side))
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(images))
        return terms["loss"]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        logits, targets = self.model(to_input(batch["images"])), batch["targets"]
        anchors = self.model.anchors_at(batch["images"].shape[-1])
        terms = self.loss(logits, targets, anchors)
        logged = {f"val/{name}": value for name, value in terms.items()}
        self.log_dict(logged, on_epoch=True, batch_size=len(batch["images"]), sync_dist=True)
        self.cells.update(logits, targets, anchors)
        self.store.update(logits, targets, batch["difficult"], anchors)

    def on_validation_epoch_start(self) -> None:
        """One net on all devices: each has its own running means of batch normalization."""
        if dist.is_initialized():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def on_validation_epoch_end(self) -> None:
        self.accuracies = {name: float(value) for name, value in self.cells.compute().items()}
        self.found, self.truth = self.store.compute()
        self.table = class_table(self.found, self.truth, self.config.classes)
        self.results = {f"accuracy/{name}": value for name, value in self.accuracies.items()}
        self.results["map50"] = mean_average_precision(self.table)
        self.log_dict({f"val/{name}": value for name, value in self.results.items()})
        self.cells.reset()
        self.store.reset()

    def on_train_start(self) -> None:
        planned, there = self.lr_schedulers().total_steps, int(self.trainer.estimated_stepping_batches)
        if planned != there:  # a run that was resumed, with other pictures
            raise ValueError(
                f"this run's schedule has {planned:,} steps, the data now make {there:,}: put the pictures back as they were "
                "to go on, or start anew in another Config.run_dir"
            )

    def on_train_epoch_start(self) -> None:
        if self.config.freeze_epochs:
            trained = self.current_epoch >= self.config.freeze_epochs
            self.model.backbone.requires_grad_(trained).train(trained)

    def configure_optimizers(self) -> dict:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]  # biases and batch norm
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr or 1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr or 1e-3, self.trainer.estimated_stepping_batches, pct_start=self.config.warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, *_, **__) -> None:
        """Lightning refuses to clip under a fused optimizer, because it might unscale float16's gradients itself."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.clip)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["classes"] = list(self.config.classes)
        if self.results:
            trained = f"{self.current_epoch + 1} of {self.config.epochs}"
            self.model.about = about(self.accuracies, self.results["map50"], self.config, trained)
        checkpoint["about"] = self.model.about

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        classes = checkpoint.get("classes")
        if classes != list(self.config.classes):
            raise ValueError(
                f"this checkpoint knows the classes {classes}, Config.classes are {list(self.config.classes)}: "
                "set Config.classes to the checkpoint's, or train anew in another Config.run_dir"
            )
        self.model.about = checkpoint.get("about", {})


@dataclass(frozen=True)
class LearningRates:
    """A learning-rate range test (Smith 2017, https://arxiv.org/abs/1506.01186)."""

    rates: list[float]
    losses: list[float]  # smoothed, up to where the loss explodes
    suggestion: float


def find_lr(config: Config, data: DetectionData, steps: int = 100) -> LearningRates:
    """Raise the rate from 1e-5 to 0.1 over `steps` batches on a net of its own, and suggest a peak for OneCycle.

    The suggestion is the rate at which the loss has made nine tenths of its fall: near the plateau before it explodes.
    (benchmarks/RECIPE.md has what lower and higher peaks reach. Lightning's finder takes the steepest point, lower still,
    and its running mean forgets 2 % a step, too slow for 100 steps.) Raises RuntimeError where the loss never falls.
    """
    data.must_suit(config)
    test = RangeTest(np.geomspace(1e-5, 0.1, steps))
    how = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    trainer = make_trainer(config.replace(devices=1), callbacks=[test], **how)
    trainer.fit(Detector(config.replace(max_lr=1e-3)), datamodule=data)
    losses = until_explosion(np.array(test.losses))
    rates = test.rates[: len(losses)].tolist()
    return LearningRates(rates, losses.tolist(), rates[nine_tenths_down(losses)])


def until_explosion(losses: np.ndarray) -> np.ndarray:
    """Running mean over 15 steps of losses [n], up to where it is NaN or half as much again as its lowest so far."""
    means = np.array([losses[max(0, i - 7) : i + 8].mean() for i in range(len(losses))])
    exploded = np.flatnonzero(~(means < 1.5 * np.fmin.accumulate(means)))
    return means[: exploded[0] if len(exploded) else len(means)]


def nine_tenths_down(losses: np.ndarray) -> int:
    """Where losses [n] have made nine tenths of their deepest fall from the highest point so far.

    They may rise first: boxes that begin to overlap objects are asked for more objectness. See `find_lr`.
    """
    fallen = np.maximum.accumulate(losses) - losses
    if not fallen.max(initial=0) > 0:
        raise RuntimeError("the loss fell at no learning rate: look at the data, or set Config.max_lr yourself (1e-3 is usual)")
    return int((fallen >= fallen.max() * 0.9).argmax())


def fit(config: Config, data: DetectionData | None = None, ckpt_path: str | None = None) -> Detector:
    """Train by `config` and return the detector, its weights the averaged ones of the last epoch.

    Writes config.json, metrics.csv and checkpoints best.ckpt (by VOC AP), last.ckpt and last-1.ckpt (of the epoch
    before) to `config.run_dir`, which no other process can train in meanwhile.
    ckpt_path: "last" goes on where that folder's last good checkpoint was written, at the start of the epoch after
    it, and a checkpoint's path goes on from that one; "auto" goes on if there is a last one, and otherwise starts;
    None starts anew, and the folder's last ones go.
    Raises ValueError where `data` were made with other settings, or the run to go on with was started with others.
    """
    folder, data = Path(config.run_dir), data or DetectionData(config)
    data.must_suit(config)
    with held(folder):
        config, checkpoint = start(config, data, ckpt_path)
        step, epochs = position(checkpoint)
        if epochs >= config.epochs:
            print(f"{checkpoint} is of the last epoch: there is nothing left to train")
            return averaged(config, checkpoint)  # Lightning would leave the weights that are not averaged
        pl.seed_everything(config.seed, verbose=False)
        options = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        trainer = make_trainer(
            config, max_epochs=config.epochs, log_every_n_steps=10, default_root_dir=folder, plugins=WholeCheckpoints(),
            logger=MetricsFile(folder / "metrics.csv", before=step), enable_checkpointing=True, enable_progress_bar=True,
            callbacks=[
                Progress(), StopIfNotFinite(), ema(config.ema_decay), LearningRateMonitor("step"),
                ModelCheckpoint(folder, "best", monitor="val/map50", mode="max", **options),
                ModelCheckpoint(folder, "last", **options),  # save_last would save only when the best improves
            ],
        )  # fmt: skip
        detector = Detector(config)
        trainer.fit(detector, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if dist.is_initialized():
        dist.destroy_process_group()
        if rank_zero_only.rank:
            sys.exit()  # this process ran the script again only to share the training
    return detector


def start(config: Config, data: DetectionData, ckpt_path: str | None) -> tuple[Config, Path | None]:
    """The settings to train by, written to the run's folder, and the checkpoint to go on from, see `fit`.

    Raises what `find_checkpoint` and `settings_to_go_on` raise.
    """
    folder = Path(config.run_dir)
    checkpoint = find_checkpoint(folder, ckpt_path)
    if rank_zero_only.rank:  # the process that started this one has done the rest
        return Config.load(folder / "config.json"), checkpoint
    if checkpoint:
        config = settings_to_go_on(config, folder / "config.json")
    elif not config.max_lr:
        config = config.replace(max_lr=find_lr(config, data).suggestion)
    if checkpoint == folder / BEFORE:
        checkpoint = checkpoint.replace(folder / LAST)
    if not checkpoint:
        for name in (LAST, BEFORE):
            (folder / name).unlink(missing_ok=True)
    config.save(folder / "config.json")
    return config, checkpoint


def position(checkpoint: Path | None) -> tuple[int, int]:
    """Steps and epochs done when it was written."""
    if not checkpoint:
        return 0, 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return state["global_step"], state["epoch"] + 1


def averaged(config: Config, checkpoint: Path) -> Detector:
    """A detector with the averaged weights of a checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    detector = Detector(config.replace(weights=""))
    detector.on_load_checkpoint(state)
    detector.load_state_dict(state["state_dict"])
    return detector.eval()


def load_detector(folder: str | Path, which: str = "best") -> Detector:
    """The detector of a run's folder, with the averaged weights of its best or last checkpoint.

    Raises FileNotFoundError where there is none, ValueError where it is damaged.
    """
    path = Path(folder) / f"{which}.ckpt"
    if which == "last":
        path = last_good(Path(folder)) or path
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: train first, or name the folder of a run")
    if which != "last" and damage(path):
        raise ValueError(f'{path} is damaged ({damage(path)}); load_detector(folder, "last") reads another one')
    return averaged(Config.load(Path(folder) / "config.json"), path)


def evaluate(detector: Detector, data: DetectionData) -> Evaluation:
    """Every number of the course and every average precision, on all held-out pictures."""
    data.setup()
    make_trainer(detector.config.replace(devices=1)).validate(detector, data.val_dataloader(), verbose=False)
    precisions = {f"VOC AP@.5, {rule}": mean_average_precision(detector.table, rule) for rule in ("area", "11 points")}
    precisions["course mAP@.5"] = mean_average_precision(detector.table, "course")
    precisions |= coco_average_precision(detector.found, detector.truth)
    return Evaluation(detector.accuracies, precisions, detector.table, detector.found, detector.truth)
