"""What was tried against the recipe: settings, and other losses, anchors and starts that stand in for parts of `src`."""

from dataclasses import dataclass, field

import albumentations as A
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from src.config import Config
from src.data.datamodule import DetectionDataModule
from src.model.boxes import cxcywh_to_xyxy, decode_above, decode_boxes
from src.model.network import Residual, YOLOv3
from src.training.loss import Assigned, YOLOLoss, assign_targets, complete_iou_loss, wh_iou
from src.training.module import YOLOv3Module

BASE = Config(  # the recipe, small; what all changes are compared with
    train_splits=("2012/train",), val_splits=("2012/val",), image_size=160, width=0.25, batch_size=16, max_lr=6e-3,
    num_workers=0,
)  # fmt: skip

Costs = tuple[Tensor, Tensor]  # as from `complete_iou_loss`: cost and IoU of each box


def generalized_iou(found: Tensor, wanted: Tensor) -> Costs:
    found, wanted = cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted)
    return generalized_box_iou_loss(found, wanted), box_iou(found, wanted).diagonal()


def course_box(found: Tensor, wanted: Tensor) -> Costs:
    """Mean squared error of the offsets in a cell and of the logarithms of the sides, as the course's loss has it."""
    grids = torch.tensor([BASE.image_size // stride for stride in (32, 16, 8)]).repeat_interleave(len(found) // 3)
    offset = (found[:, :2] - wanted[:, :2]) * grids[:, None]
    cost = torch.cat((offset, (found[:, 2:] / wanted[:, 2:]).log()), dim=1).square().mean(dim=1)
    return cost, box_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted)).diagonal()


class CertainObjectness(YOLOLoss):
    """A positive's objectness should be 1, as in YOLOv3 (section 2.1), instead of the overlap of its box."""

    @staticmethod
    def _objectness(logit: Tensor, overlap: Tensor) -> Tensor:
        return softplus(-logit)


class HalfOverlap(YOLOLoss):
    """A positive's objectness should lie half-way between 1 and the overlap of its box."""

    @staticmethod
    def _objectness(logit: Tensor, overlap: Tensor) -> Tensor:
        return YOLOLoss._objectness(logit, (1 + overlap) / 2)


class FocalObjectness(YOLOLoss):
    """Quality focal loss (Li et al. 2020, section 3.2) for objectness, beta 2: sure and right costs little."""

    @staticmethod
    def _background(level: Tensor, found: Assigned, near: Tensor) -> Tensor:
        logit = level[..., 0].float().contiguous()
        cost = logit.sigmoid().square() * softplus(logit)
        return cost.masked_fill(found.positive | near, 0).sum()

    @staticmethod
    def _objectness(logit: Tensor, overlap: Tensor) -> Tensor:
        return (logit.sigmoid() - overlap.detach()).square() * YOLOLoss._objectness(logit, overlap)


class EveryFittingAnchor(YOLOLoss):
    """Anchors that overlap an object's shape by more than 0.5 are positives too."""

    @staticmethod
    def _background(level: Tensor, found: Assigned, near: Tensor) -> Tensor:
        return YOLOLoss._background(level, found, near | found.ignored)

    def forward(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> dict[str, Tensor]:
        terms = super().forward(logits, targets, anchors)
        found = assign_targets(targets, [level.shape[2] for level in logits], anchors, len(logits[0]))
        more = 0.0
        for level, part, scale in zip(logits, found, anchors, strict=True):
            for number, overlap in enumerate(wh_iou(targets[:, 4:6], scale).unbind(dim=1)):
                cell = part.image, number, part.row, part.column
                rows, fits = level[cell].float(), (overlap > 0.5) & ~part.positive[cell]
                boxes = decode_boxes(rows[:, 1:5], part.column, part.row, scale[number], level.shape[2])
                box, near = complete_iou_loss(boxes, targets[:, 2:6])
                label = (targets[:, 1:2] == torch.arange(rows.shape[1] - 5)).float()
                cost = self.box_weight * box + self.object_weight * self._objectness(rows[:, 0], near)
                cost = cost + binary_cross_entropy_with_logits(rows[:, 5:], label, reduction="none").sum(dim=1)
                more = more + (cost * fits).sum()
        return terms | {"loss": terms["loss"] + more / max(1, 3 * len(targets))}


class ShapesIgnored(YOLOLoss):
    """Ignored is an anchor that overlaps an object's shape by more than 0.5, as in the course, whatever it predicts."""

    @staticmethod
    def _background(level: Tensor, found: Assigned, near: Tensor) -> Tensor:
        return YOLOLoss._background(level, found, found.ignored)


class NothingIgnored(YOLOLoss):
    """Every cell that is not positive is background."""

    @staticmethod
    def _background(level: Tensor, found: Assigned, near: Tensor) -> Tensor:
        return YOLOLoss._background(level, found, found.positive)


def softmax_classes(logits: Tensor, classes: Tensor, reduction: str) -> Tensor:
    """The course's class loss: one class of C, cross entropy."""
    return -classes * logits.log_softmax(dim=1)


def softmax_decode_above(logits: list[Tensor], anchors: Tensor, confidence: float) -> list:
    """As `decode_above` for classes by softmax: the logistic function of these logits is the softmax."""
    levels = []
    for level in logits:
        level = level.float()
        levels.append(torch.cat((level[..., :5], level[..., 5:].softmax(dim=-1).logit(eps=1e-6)), dim=-1))
    return decode_above(levels, anchors, confidence)


def mirror_only() -> A.Compose:
    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"], check_each_transform=False)
    return A.Compose([A.HorizontalFlip(p=0.5)], bbox_params=boxes)


def focal_classes(logits: Tensor, classes: Tensor, reduction: str) -> Tensor:
    return sigmoid_focal_loss(logits, classes, alpha=-1, gamma=2)


def decay_everything(self) -> dict:
    """Weight decay on biases and batch norm as well."""
    made = configure_optimizers(self)
    for group in made["optimizer"].param_groups:
        group["weight_decay"] = self.config.weight_decay
    return made


def unbiased(self) -> None:
    """Objectness starts at 0.5 and so do the classes."""
    initialise(self)
    for head in self.heads:
        torch.nn.init.zeros_(head.predict.bias)


def loud_residuals(self) -> None:
    """Residual blocks don't start as the identity."""
    initialise(self)
    for module in self.modules():
        if isinstance(module, Residual):
            torch.nn.init.ones_(module.body[1][1].weight)


configure_optimizers, initialise = YOLOv3Module.configure_optimizers, YOLOv3._initialise


def kmeans_anchors() -> tuple:
    """Nine anchors by k-means on the boxes of 1,000 training draws, with 1 - IoU as distance; YOLO9000, section 2."""
    data = DetectionDataModule(BASE)
    data.setup()
    sides = torch.cat([data.train_data[draw][1][:, 2:] for draw in range(1000)])
    anchors = sides[sides.prod(dim=1).argsort()][torch.linspace(0, len(sides) - 1, 9).long()]
    for _ in range(50):
        owner = wh_iou(sides, anchors).argmax(dim=1)
        anchors = torch.stack([sides[owner == number].mean(dim=0) for number in range(9)])
    anchors = anchors[anchors.prod(dim=1).argsort(descending=True)]
    return tuple(tuple(map(tuple, scale)) for scale in anchors.view(3, 3, 2).tolist())


@dataclass(frozen=True)
class Change:
    """One difference to BASE: settings, and what stands in for parts of `src`."""

    what: str
    settings: dict = field(default_factory=dict)
    instead: dict = field(default_factory=dict)


def loss(instead: type[YOLOLoss]) -> dict:
    return {"src.training.module.YOLOLoss": instead}


CHANGES = {
    "baseline": Change("nothing"),
    "box-giou": Change("box loss: generalized IoU", instead={"src.training.loss.complete_iou_loss": generalized_iou}),
    "box-course": Change("box loss: the course's squared errors", instead={"src.training.loss.complete_iou_loss": course_box}),
    "box-1": Change("weight of the box term 1", {"box_weight": 1.0}),
    "object-certain": Change("objectness of a positive: 1, as in the paper", instead=loss(CertainObjectness)),
    "object-half": Change("objectness of a positive: half-way from 1 to its overlap", instead=loss(HalfOverlap)),
    "object-focal": Change("objectness: quality focal loss", instead=loss(FocalObjectness)),
    "object-1": Change("weight of positives' objectness 1", {"object_weight": 1.0}),
    "object-4": Change("weight of positives' objectness 4", {"object_weight": 4.0}),
    "object-unbiased": Change("no initial bias", instead={"src.model.network.YOLOv3._initialise": unbiased}),
    "class-softmax": Change("classes: softmax, as in the course", instead={
        "src.training.loss.bce": softmax_classes, "src.training.metrics.decode_above": softmax_decode_above}),
    "class-focal": Change("classes: focal loss, gamma 2", instead={"src.training.loss.bce": focal_classes}),
    "class-smooth": Change("classes: label smoothing 0.1", {"label_smoothing": 0.1}),
    "class-3": Change("weight of the class term 3", {"class_weight": 3.0}),
    "ignore-shape": Change("ignored: anchors of an object's shape, as in the course", instead=loss(ShapesIgnored)),
    "ignore-never": Change("nothing ignored", instead=loss(NothingIgnored)),
    "positives-fitting": Change("every anchor of shape overlap 0.5 is positive", instead=loss(EveryFittingAnchor)),
    "anchors-kmeans": Change("anchors by k-means on the training draws", {"anchors": kmeans_anchors}),
    "decay-0.005": Change("weight decay 0.005", {"weight_decay": 0.005}),
    "decay-everything": Change("weight decay on biases and batch norm too", instead={
        "src.training.module.YOLOv3Module.configure_optimizers": decay_everything}),
    "lr-2e-3": Change("peak learning rate 2e-3", {"max_lr": 2e-3}),
    "lr-1.2e-2": Change("peak learning rate 1.2e-2", {"max_lr": 1.2e-2}),
    "warmup-0.3": Change("warm-up over 0.3 of the steps", {"warmup_fraction": 0.3}),
    "ema-0.99": Change("decay of the average 0.99", {"ema_decay": 0.99}),
    "ema-none": Change("no averaging", {"ema_decay": 0.0}),
    "residual-loud": Change("residual blocks don't start as the identity", instead={
        "src.model.network.YOLOv3._initialise": loud_residuals}),
    "batch-8": Change("8 images a batch, twice the steps", {"batch_size": 8}),
    "mosaic-0": Change("no mosaics", {"mosaic_prob": 0.0}),
    "mosaic-end": Change("mosaics to the end", {"close_mosaic_epochs": 0}),
    "mosaic-off-3": Change("no mosaics in the last 3 epochs", {"close_mosaic_epochs": 3}),
    "scale-wide": Change("scales 0.45 to 1.25", {"mosaic_scale": (0.45, 1.25), "image_scale": (0.45, 1.25)}),
    "single-as-mosaic": Change("single pictures at the mosaics' scales", {"image_scale": BASE.mosaic_scale}),
    "colour-none": Change("light and colours left alone", instead={"src.data.mosaic.augmentations": mirror_only}),
}  # fmt: skip
