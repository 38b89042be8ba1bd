"""What this machine trains with: precision, devices, and the Trainer that knows them."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.nn.functional import interpolate

from src.config import Config
from src.model.network import YOLOv3
from src.serving.images import to_network_input
from src.training.loss import YOLOLoss
from src.training.metrics import (
    CellAccuracy,
    DetectionAccumulator,
    mean_average_precision,
    per_class_table,
)
from src.training.report import about


def build_model(config: Config) -> YOLOv3:
    """A net for these settings: fresh, or from `config.pretrained_weights` (a folder, hub id or Darknet file)."""
    torch.manual_seed(config.seed)
    settings = {"classes": config.classes, "anchors": config.anchors, "image_size": config.image_size}
    if config.pretrained_weights and not Path(config.pretrained_weights).is_file():
        return YOLOv3.from_pretrained(
            config.pretrained_weights, num_classes=len(config.classes), width=config.width, **settings
        )
    model = YOLOv3(len(config.classes), config.width, **settings)
    if config.pretrained_weights:
        print(f"{config.pretrained_weights}: read {model.load_darknet(config.pretrained_weights)}")
    return model


def sample_image_size(config: Config, step: int, epoch: int) -> int:
    """The side of the batch at this step of this epoch; the same on every process, and after a resume.

    The last epochs, of whole images, are at `image_size`: so averages of batch norm and features settle there.
    """
    if not config.multiscale_sizes or epoch >= config.close_mosaic_epoch:
        return config.image_size
    return int(np.random.default_rng((config.seed, step // config.multiscale_interval)).choice(config.multiscale_sizes))


class YOLOv3Module(pl.LightningModule):
    """A `YOLOv3` with its loss, optimizer and metrics."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.lr = config, config.max_lr
        self.model = build_model(config)
        self.network = torch.compile(self.model, dynamic=False) if config.compile else self.model
        self.loss, self.cells, self.store = YOLOLoss(config), CellAccuracy(), DetectionAccumulator()
        self.accuracies: dict[str, float] = {}  # of the last validation
        self.results: dict[str, float] = {}  # these and mAP, for the callbacks

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        images = to_network_input(batch["images"])
        side = sample_image_size(self.config, self.trainer.global_step, self.current_epoch)
        if side != images.shape[-1]:  # multi-resolution, always smaller: targets are fractions and stay
            images = interpolate(images, (side, side), mode="bilinear", antialias=True)
        terms = self.loss(self.network(images), batch["targets"], self.model.anchors_at(side))
        logged = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(images))
        self.log("lr", self.optimizers().param_groups[0]["lr"], on_step=True, on_epoch=False)
        return terms["loss"]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        logits, targets = self.model(to_network_input(batch["images"])), batch["targets"]
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
        self.predictions, self.ground_truth = self.store.compute()
        self.per_class = per_class_table(self.predictions, self.ground_truth, self.config.classes)
        self.results = {f"accuracy/{name}": value for name, value in self.accuracies.items()}
        self.results["mAP50"] = mean_average_precision(self.per_class)
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
            optimizer, self.lr or 1e-3, self.trainer.estimated_stepping_batches, pct_start=self.config.warmup_fraction
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, *_, **__) -> None:
        """Lightning refuses to clip under a fused optimizer, because it might unscale float16's gradients itself."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.config.gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["classes"] = list(self.config.classes)
        if self.results:
            trained = f"{self.current_epoch + 1} of {self.config.epochs}"
            self.model.metadata = about(self.accuracies, self.results["mAP50"], self.config, trained)
        checkpoint["metadata"] = self.model.metadata

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        classes = checkpoint.get("classes")
        if classes != list(self.config.classes):
            raise ValueError(
                f"this checkpoint knows the classes {classes}, Config.classes are {list(self.config.classes)}: "
                "set Config.classes to the checkpoint's, or train anew in another Config.run_dir"
            )
        self.model.metadata = checkpoint.get("metadata", checkpoint.get("about", {}))  # "about" in older ones


logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its mere information, devices and tips, is left out


def resolve_precision(config: Config) -> str:
    """`config.precision`, or for "auto" the fastest this machine computes: float16 on CUDA, bfloat16 on newer CPUs."""
    if config.precision != "auto":
        return config.precision
    if torch.cuda.is_available():
        return "16-mixed"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bf16-mixed" if "avx512_bf16" in flags or "amx_bf16" in flags else "32-true"


def resolve_strategy(config: Config) -> str | DDPStrategy:
    """How devices share the work: not at all, or by DDP, its processes forked in a notebook, else this script again.

    Raises RuntimeError in a notebook whose GPU has been used before: a forked process can't use it again.
    Buffers are not sent at each forward pass: in evaluation one process may have a batch more than another.
    """
    if config.devices == 1:
        return "auto"
    method = "fork" if hasattr(sys, "ps1") else "popen"
    if method == "fork" and torch.cuda.is_initialized():
        raise RuntimeError(
            "several GPUs in a notebook need a process that has used none yet: restart it, set Config.max_lr instead of "
            "running the range test, and call fit first; or train in a script"
        )
    return DDPStrategy(start_method=method, broadcast_buffers=False, find_unused_parameters=config.freeze_epochs > 0)


def make_trainer(config: Config, **options) -> pl.Trainer:
    """A Trainer for this machine and these settings, silent but for what `options` add."""
    return pl.Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=config.devices,
        precision=resolve_precision(config), strategy=resolve_strategy(config),
        num_sanity_val_steps=0, enable_model_summary=False, use_distributed_sampler=False,
        **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options,
    )  # fmt: skip
