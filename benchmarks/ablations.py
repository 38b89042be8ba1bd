"""The changes that `run_ablations` compares: other settings, losses, anchors and initializations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from unittest import mock

import albumentations as A
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.data.mosaic import MosaicDataset, Sample
from src.model.boxes import cxcywh_to_xyxy, decode_above, decode_boxes
from src.model.network import Residual, YOLOv3
from src.training.loss import Assigned, YOLOLoss, assign_targets, complete_iou_loss, wh_iou
from src.training.module import YOLOv3Module

BASE = Config(
    train_splits=("2012/train",),
    val_splits=("2012/val",),
    image_size=160,
    width=0.25,
    batch_size=16,
    max_lr=6e-3,
    num_workers=0,
)

BoxLoss = tuple[Tensor, Tensor]  # as `complete_iou_loss` returns: loss and IoU of each box


def generalized_iou(predictions: Tensor, targets: Tensor) -> BoxLoss:
    """Generalized IoU loss; Rezatofighi et al. 2019."""
    predictions, targets = cxcywh_to_xyxy(predictions), cxcywh_to_xyxy(targets)
    return generalized_box_iou_loss(predictions, targets), box_iou(predictions, targets).diagonal()


def course_box_loss(predictions: Tensor, targets: Tensor, grids: Tensor) -> BoxLoss:
    """The course's box loss: mean squared error of the centre in cells and of log width and height.

    grids [N]: cells per side of each box's scale.
    """
    centre = (predictions[:, :2] - targets[:, :2]) * grids[:, None]
    cost = (
        torch.cat((centre, (predictions[:, 2:] / targets[:, 2:]).log()), dim=1).square().mean(dim=1)
    )
    return cost, box_iou(cxcywh_to_xyxy(predictions), cxcywh_to_xyxy(targets)).diagonal()


class CourseBoxLoss(YOLOLoss):
    """`course_box_loss` instead of complete IoU."""

    def forward(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        grids = torch.tensor([level.shape[2] for level in logits]).repeat_interleave(len(targets))
        with mock.patch(
            "src.training.loss.complete_iou_loss", partial(course_box_loss, grids=grids)
        ):
            return super().forward(logits, targets, anchors)


class CertainObjectness(YOLOLoss):
    """The objectness target of a positive is 1, as in YOLOv3 (section 2.1), instead of the IoU of its box."""

    @staticmethod
    def _objectness(logit: Tensor, iou: Tensor) -> Tensor:
        return softplus(-logit)


class HalfCertainObjectness(YOLOLoss):
    """The objectness target of a positive is the mean of 1 and the IoU of its box."""

    @staticmethod
    def _objectness(logit: Tensor, iou: Tensor) -> Tensor:
        return YOLOLoss._objectness(logit, (1 + iou) / 2)


class FocalObjectness(YOLOLoss):
    """Quality focal loss for objectness with beta 2; Li et al. 2020, section 3.2."""

    @staticmethod
    def _background(level: Tensor, assigned: Assigned, mask: Tensor) -> Tensor:
        logit = level[..., 0].float().contiguous()
        cost = logit.sigmoid().square() * softplus(logit)
        return cost.masked_fill(assigned.positive | mask, 0).sum()

    @staticmethod
    def _objectness(logit: Tensor, iou: Tensor) -> Tensor:
        return (logit.sigmoid() - iou.detach()).square() * YOLOLoss._objectness(logit, iou)


class FittingAnchorsPositive(YOLOLoss):
    """Anchors with wh_iou above 0.5 are positives too."""

    @staticmethod
    def _background(level: Tensor, assigned: Assigned, mask: Tensor) -> Tensor:
        return YOLOLoss._background(level, assigned, mask | assigned.ignored)

    def forward(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        terms = super().forward(logits, targets, anchors)
        assigned = assign_targets(
            targets, [level.shape[2] for level in logits], anchors, len(logits[0])
        )
        extra = 0.0
        for level, part, scale in zip(logits, assigned, anchors, strict=True):
            for number, shape_iou in enumerate(wh_iou(targets[:, 4:6], scale).unbind(dim=1)):
                cell = part.image, number, part.row, part.column
                rows, fits = level[cell].float(), (shape_iou > 0.5) & ~part.positive[cell]
                boxes = decode_boxes(
                    rows[:, 1:5], part.column, part.row, scale[number], level.shape[2]
                )
                box, iou = complete_iou_loss(boxes, targets[:, 2:6])
                label = (targets[:, 1:2] == torch.arange(rows.shape[1] - 5)).float()
                cost = (
                    self.config.box_weight * box
                    + self.config.objectness_weight * self._objectness(rows[:, 0], iou)
                )
                cost = cost + binary_cross_entropy_with_logits(
                    rows[:, 5:], label, reduction="none"
                ).sum(dim=1)
                extra = extra + (cost * fits).sum()
        return terms | {"loss": terms["loss"] + extra / max(1, 3 * len(targets))}


class IgnoreFittingAnchors(YOLOLoss):
    """Anchors with wh_iou above 0.5 are ignored, as in the course, whatever they predict."""

    @staticmethod
    def _background(level: Tensor, assigned: Assigned, mask: Tensor) -> Tensor:
        return YOLOLoss._background(level, assigned, assigned.ignored)


class IgnoreNothing(YOLOLoss):
    """Every cell that is not positive is background."""

    @staticmethod
    def _background(level: Tensor, assigned: Assigned, mask: Tensor) -> Tensor:
        return YOLOLoss._background(level, assigned, assigned.positive)


def softmax_classes(logits: Tensor, classes: Tensor, reduction: str) -> Tensor:
    """The course's class loss: cross entropy of a softmax over the classes."""
    return -classes * logits.log_softmax(dim=1)


def softmax_decode_above(logits: list[Tensor], anchors: Tensor, confidence: float) -> list:
    """`decode_above` for softmax classes: replace class logits by those whose sigmoid is the softmax."""
    levels = []
    for level in logits:
        level = level.float()
        levels.append(
            torch.cat((level[..., :5], level[..., 5:].softmax(dim=-1).logit(eps=1e-6)), dim=-1)
        )
    return decode_above(levels, anchors, confidence)


def focal_classes(logits: Tensor, classes: Tensor, reduction: str) -> Tensor:
    """Focal loss with gamma 2; Lin et al. 2017."""
    return sigmoid_focal_loss(logits, classes, alpha=-1, gamma=2)


def flip_only() -> A.Compose:
    """Augmentation without changes of brightness and colour."""
    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"], check_each_transform=False)
    return A.Compose([A.HorizontalFlip(p=0.5)], bbox_params=boxes)


plain_sample = MosaicDataset.__getitem__


def mixup_sample(self, sample_id: int) -> Sample:
    """Mixup of half of the samples, until mosaics end: two samples blended, with the objects of both.

    Zhang et al. 2019, "Bag of Freebies for Training Object Detection Neural Networks", section 3.1; shares from Beta(8, 8).
    """
    image, boxes, labels = plain_sample(self, sample_id)
    random, epoch = np.random.default_rng((self.config.seed, sample_id, 1)), sample_id // len(self)
    if random.random() >= 0.5 or epoch >= self.config.close_mosaic_epoch:
        return image, boxes, labels
    other = plain_sample(self, epoch * len(self) + int(random.integers(len(self))))
    image = torch.lerp(other[0].float(), image.float(), random.beta(8, 8)).round().byte()
    return image, torch.cat((boxes, other[1])), torch.cat((labels, other[2]))


plain_mosaic = MosaicDataset._mosaic


@cache
def rare_class_weights(dataset: MosaicDataset) -> np.ndarray:
    """Probability of every image, proportional to 1 / sqrt(the fraction of images that show its rarest class).

    Repeat factor sampling with threshold 1; Gupta et al. 2019, "LVIS".
    """
    present = [np.unique(record.labels) for record in dataset.records]
    images_per_class = np.bincount(np.concatenate(present))
    weights = np.array(
        [
            (len(present) / images_per_class[labels].min(initial=len(present))) ** 0.5
            for labels in present
        ]
    )
    return weights / weights.sum()


class WeightedImages(np.random.Generator):
    """Random numbers whose `integers` are images, drawn with `probabilities`."""

    probabilities: np.ndarray

    def integers(self, count: int, size: int) -> np.ndarray:
        return self.choice(count, size, p=self.probabilities)


def rare_class_mosaic(self, index: int, random: np.random.Generator) -> tuple:
    """Mosaic whose three other images are drawn with `rare_class_weights`."""
    random = WeightedImages(random.bit_generator)
    random.probabilities = rare_class_weights(self)
    return plain_mosaic(self, index, random)


configure_optimizers, initialize = YOLOv3Module.configure_optimizers, YOLOv3._initialize


def decay_everything(self) -> dict:
    """Apply weight decay to biases and batch norm as well."""
    optimizers = configure_optimizers(self)
    for group in optimizers["optimizer"].param_groups:
        group["weight_decay"] = self.config.weight_decay
    return optimizers


def zero_bias(self) -> None:
    """Initialize objectness and class probabilities at 0.5."""
    initialize(self)
    for head in self.heads:
        torch.nn.init.zeros_(head.predict.bias)


def nonzero_residuals(self) -> None:
    """Initialize residual blocks without the zero weight that makes them the identity."""
    initialize(self)
    for module in self.modules():
        if isinstance(module, Residual):
            torch.nn.init.ones_(module.body[1][1].weight)


def kmeans_anchors(config: Config) -> tuple:
    """Nine anchors by k-means on the boxes of 1,000 training samples, distance 1 - IoU; YOLO9000 (2017), section 2."""
    data = DetectionDataModule(config)
    data.setup()
    sizes = torch.cat([data.train_data[sample_id][1][:, 2:] for sample_id in range(1000)])
    anchors = sizes[sizes.prod(dim=1).argsort()][torch.linspace(0, len(sizes) - 1, 9).long()]
    for _ in range(50):
        cluster = wh_iou(sizes, anchors).argmax(dim=1)
        anchors = torch.stack([sizes[cluster == number].mean(dim=0) for number in range(9)])
    anchors = anchors[anchors.prod(dim=1).argsort(descending=True)]
    return tuple(tuple(map(tuple, scale)) for scale in anchors.view(3, 3, 2).tolist())


@dataclass(frozen=True)
class Change:
    """One difference to the baseline: settings, and replacements of names in `src`."""

    description: str
    settings: dict[str, object | Callable[[Config], object]] = field(default_factory=dict)
    replacements: dict[str, object] = field(default_factory=dict)  # dotted name -> object

    def config(self, base: Config) -> Config:
        """Apply the settings to `base`."""
        return base.replace(
            **{
                name: value(base) if callable(value) else value
                for name, value in self.settings.items()
            }
        )


def loss(replacement: type[YOLOLoss]) -> dict:
    return {"src.training.module.YOLOLoss": replacement}


CHANGES = {
    "baseline": Change("none"),
    "box-giou": Change(
        "box loss: generalized IoU",
        replacements={"src.training.loss.complete_iou_loss": generalized_iou},
    ),
    "box-course": Change("box loss: the course's squared errors", replacements=loss(CourseBoxLoss)),
    "box-1": Change("box weight: 1", {"box_weight": 1.0}),
    "object-certain": Change(
        "objectness target of positives: 1, as in the paper", replacements=loss(CertainObjectness)
    ),
    "object-half": Change(
        "objectness target of positives: mean of 1 and IoU",
        replacements=loss(HalfCertainObjectness),
    ),
    "object-focal": Change("objectness loss: quality focal", replacements=loss(FocalObjectness)),
    "object-1": Change("objectness weight of positives: 1", {"objectness_weight": 1.0}),
    "object-4": Change("objectness weight of positives: 4", {"objectness_weight": 4.0}),
    "bias-zero": Change(
        "initial bias: 0", replacements={"src.model.network.YOLOv3._initialize": zero_bias}
    ),
    "class-softmax": Change(
        "class loss: softmax, as in the course",
        replacements={
            "src.training.loss.bce": softmax_classes,
            "src.training.metrics.decode_above": softmax_decode_above,
        },
    ),
    "class-focal": Change(
        "class loss: focal, gamma 2", replacements={"src.training.loss.bce": focal_classes}
    ),
    "class-3": Change("class weight: 3", {"class_weight": 3.0}),
    "ignore-shape": Change(
        "ignored: anchors with wh_iou above 0.5, as in the course",
        replacements=loss(IgnoreFittingAnchors),
    ),
    "ignore-never": Change("ignored: nothing", replacements=loss(IgnoreNothing)),
    "positives-fitting": Change(
        "positives: all anchors with wh_iou above 0.5", replacements=loss(FittingAnchorsPositive)
    ),
    "anchors-kmeans": Change(
        "anchors: k-means on the training samples", {"anchors": kmeans_anchors}
    ),
    "decay-0.005": Change("weight decay: 0.005", {"weight_decay": 0.005}),
    "decay-everything": Change(
        "weight decay: also on biases and batch norm",
        replacements={"src.training.module.YOLOv3Module.configure_optimizers": decay_everything},
    ),
    "lr-2e-3": Change("peak learning rate: 2e-3", {"max_lr": 2e-3}),
    "lr-4e-3": Change("peak learning rate: 4e-3", {"max_lr": 4e-3}),
    "lr-1.2e-2": Change("peak learning rate: 1.2e-2", {"max_lr": 1.2e-2}),
    "warmup-0.3": Change("warm-up: 0.3 of the steps", {"warmup_fraction": 0.3}),
    "ema-0.99": Change("EMA decay: 0.99", {"ema_decay": 0.99}),
    "ema-none": Change("EMA: none", {"ema_decay": 0.0}),
    "residual-nonzero": Change(
        "initial residual blocks: not the identity",
        replacements={"src.model.network.YOLOv3._initialize": nonzero_residuals},
    ),
    "batch-8": Change("batch size: 8, twice the steps", {"batch_size": 8}),
    "mosaic-0": Change("mosaics: none", {"mosaic_prob": 0.0}),
    "mosaic-end": Change("mosaics: until the end", {"close_mosaic_epochs": 0}),
    "mosaic-off-3": Change("mosaics: none in the last 3 epochs", {"close_mosaic_epochs": 3}),
    "scale-wide": Change(
        "image scales: 0.45 to 1.25", {"mosaic_scale": (0.45, 1.25), "image_scale": (0.45, 1.25)}
    ),
    "single-as-mosaic": Change(
        "image scales: single images as in mosaics", {"image_scale": BASE.mosaic_scale}
    ),
    "colour-none": Change(
        "augmentation: no change of brightness and colour",
        replacements={"src.data.mosaic.augmentations": flip_only},
    ),
    "mixup": Change(
        "augmentation: mixup of half of the samples",
        replacements={"src.data.mosaic.MosaicDataset.__getitem__": mixup_sample},
    ),
    "rare-classes": Change(
        "mosaics: more images of rare classes",
        replacements={"src.data.mosaic.MosaicDataset._mosaic": rare_class_mosaic},
    ),
    "frozen-2": Change("backbone: frozen for 2 epochs", {"freeze_epochs": 2}),
    "scratch": Change("backbone: not pretrained", {"pretrained_weights": ""}),
}
