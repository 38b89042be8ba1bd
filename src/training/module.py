"""The Lightning module: YOLOv3 with its loss and metrics, one resolution or several."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from src.config import DATASETS, Config
from src.model.darknet import load_darknet
from src.model.network import YOLOv3
from src.model.pretrained import BACKBONE, load_backbone, transfer_weights
from src.serving.images import to_network_input
from src.training.loss import YOLOLoss
from src.training.metrics import (
    COURSE_THRESHOLD,
    CellAccuracy,
    DetectionAccumulator,
    mean_average_precision,
    per_class_table,
)
from src.training.optimizer import OneCycleModule


def build_model(config: Config) -> YOLOv3:
    """Build the network of `config`, initialized by its seed or its pretrained weights.

    Those are a folder (detector or backbone), the id of a model on the Hub, or a Darknet file.
    """
    torch.manual_seed(config.seed)
    model = YOLOv3(
        len(config.classes),
        config.width,
        classes=config.classes,
        anchors=config.anchors,
        image_size=config.image_size,
    )
    source = config.pretrained_weights
    if not source:
        return model
    if Path(source).is_file():
        loaded = load_darknet(model, source)
    elif (Path(source) / BACKBONE).is_file():
        loaded = load_backbone(model, source)
    else:
        loaded = transfer_weights(model, YOLOv3.from_pretrained(source))
    print(f"{source}: loaded {loaded}")
    return model


def sample_image_size(config: Config, step: int, epoch: int) -> int:
    """Return the image size of the batch at this step, the same in every process and on resume.

    The last epochs (without mosaics) are at `image_size`: batch norm's running statistics settle.
    """
    if not config.multiscale_sizes or epoch >= config.close_mosaic_epoch:
        return config.image_size
    random = np.random.default_rng((config.seed, step // config.multiscale_interval))
    return int(random.choice(config.multiscale_sizes))


def training_metadata(
    accuracies: dict[str, float], map50: float, config: Config, epochs: str
) -> dict:
    """Describe weights: training data, epochs such as "3 of 40", and validation metrics."""
    return {
        "data": f"{DATASETS[config.dataset]} {', '.join(config.train_splits)}",
        "epochs": epochs,
        "weights": "averaged over the steps (EMA)",
        "metrics": {
            "mAP50": map50,
            "class accuracy": accuracies["class"],
            "no-object accuracy": accuracies[f"no_object@{COURSE_THRESHOLD}"],
            "object accuracy": accuracies[f"object@{COURSE_THRESHOLD}"],
            "objectness threshold": COURSE_THRESHOLD,
        },
    }


class YOLOv3Module(OneCycleModule):
    """A `YOLOv3` with its loss and metrics; optimizer and schedule are OneCycleModule's.

    After a validation: `accuracies` (see CellAccuracy), `predictions` and `ground_truth` (see
    DetectionAccumulator), `per_class` (see per_class_table) and `map50`, its mean.
    """

    monitor = "val/mAP50"
    progress_metrics = {
        "loss": ("train/loss", ".3f"),
        "val loss": ("val/loss", ".3f"),
        "class": ("val/accuracy/class", ".1%"),
        f"no-object@{COURSE_THRESHOLD}": (f"val/accuracy/no_object@{COURSE_THRESHOLD}", ".1%"),
        f"object@{COURSE_THRESHOLD}": (f"val/accuracy/object@{COURSE_THRESHOLD}", ".1%"),
        "mAP50": ("val/mAP50", ".3f"),
    }

    def __init__(self, config: Config):
        super().__init__(config)
        self.model = build_model(config)
        self.loss = YOLOLoss(config)
        self.cell_accuracy = CellAccuracy()
        self.accumulator = DetectionAccumulator()

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        images = batch["images"]  # uint8 [B, 3, S, S]
        size = sample_image_size(self.config, self.trainer.global_step, self.current_epoch)
        if size != images.shape[-1]:  # smaller; targets are fractions of the image
            images = resize(images, [size, size], antialias=True)
        logits = self.model(to_network_input(images))
        anchors = self.model.anchors_at(size)
        terms = self.loss(logits, batch["targets"], batch["counts"], anchors)
        values = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return terms["loss"]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        images = batch["images"]  # uint8 [B, 3, S, S]
        targets = batch["targets"]
        logits = self.model(to_network_input(images))
        anchors = self.model.anchors_at(images.shape[-1])
        terms = self.loss(logits, targets, batch["counts"], anchors)
        values = {f"val/{name}": value for name, value in terms.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(images), sync_dist=True)
        self.cell_accuracy.update(logits, targets, anchors)
        self.accumulator.update(logits, targets, batch["difficult"], anchors)

    def on_validation_epoch_start(self) -> None:
        """Use the first process's batch norm statistics in all processes: each has its own."""
        if torch.distributed.is_initialized():
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_validation_epoch_end(self) -> None:
        self.accuracies = {name: float(v) for name, v in self.cell_accuracy.compute().items()}
        self.predictions, self.ground_truth = self.accumulator.compute()
        self.per_class = per_class_table(self.predictions, self.ground_truth, self.config.classes)
        values = {f"val/accuracy/{name}": value for name, value in self.accuracies.items()}
        self.map50 = mean_average_precision(self.per_class)
        self.log_dict(values | {"val/mAP50": self.map50}, sync_dist=True)
        self.cell_accuracy.reset()
        self.accumulator.reset()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Add what the weights need: the anchors, which pretrained weights may have brought."""
        epochs = f"{self.current_epoch + 1} of {self.config.epochs}"
        self.model.metadata = training_metadata(self.accuracies, self.map50, self.config, epochs)
        checkpoint["anchors"] = self.model.anchor_sizes
        checkpoint["metadata"] = self.model.metadata

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.model.set_anchors(torch.tensor(checkpoint["anchors"]))
        self.model.metadata = checkpoint["metadata"]
