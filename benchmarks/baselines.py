"""Baselines: the simplest way to write each job, one image, box and cell at a time.

They loop over the same things as the course's code
(https://github.com/aladdinpersson/Machine-Learning-Collection, YOLOv3) and return the same
results as `src`, so that their times can be compared.
"""

import os
import random

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no look-up on the network

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import Dataset
from torchvision.ops import box_iou, complete_box_iou_loss

from src.data.records import ImageRecord


def course_augmentations(image_size: int) -> A.Compose:
    """The course's training pipeline in the names of albumentations 2; returns float images."""
    larger = int(image_size * 1.1)
    grey = {"border_mode": cv2.BORDER_CONSTANT, "fill": 114}
    return A.Compose(
        [
            A.LongestMaxSize(max_size=larger),
            A.PadIfNeeded(min_height=larger, min_width=larger, **grey),
            A.Rotate(limit=10, p=0.5, **grey),
            A.RandomCrop(width=image_size, height=image_size),
            A.ColorJitter(
                brightness=(0.4, 1.6),
                contrast=(0.4, 1.6),
                saturation=(0.4, 1.6),
                hue=(-0.4, 0.4),
                p=0.4,
            ),
            A.Affine(
                scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-20, 20), p=0.5, **grey
            ),
            A.HorizontalFlip(p=0.5),
            A.Blur(p=0.1),
            A.CLAHE(p=0.1),
            A.Posterize(p=0.1),
            A.ToGray(p=0.1),
            A.ChannelShuffle(p=0.05),
            A.Normalize(mean=(0, 0, 0), std=(1, 1, 1), max_pixel_value=255),
            ToTensorV2(),
        ],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"], min_visibility=0.4),
    )


class BaselineDataset(Dataset):
    """Samples like the course's: float [3, S, S], `dense_targets`; all images decoded each time."""

    def __init__(
        self,
        records: list[ImageRecord],
        image_size: int,
        anchors: Tensor,
        augment: A.Compose,
        mosaic_prob: float = 0.75,
    ):
        self.records, self.image_size, self.anchors = records, image_size, anchors
        self.augment, self.mosaic_prob = augment, mosaic_prob

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Tensor]]:
        load = self.load_mosaic if random.random() < self.mosaic_prob else self.load
        image, boxes, labels = load(index)
        out = self.augment(image=image, bboxes=boxes, labels=labels)
        size = self.image_size
        rows = []
        for (x1, y1, x2, y2), label in zip(out["bboxes"], out["labels"], strict=True):
            box = np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]) / size
            rows.append([label, *box])
        return out["image"], dense_targets(rows, [size // 32, size // 16, size // 8], self.anchors)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One image at full size, uint8 [H, W, 3], its boxes xyxy in pixels, and its labels."""
        record = self.records[index]
        return np.array(Image.open(record.image).convert("RGB")), record.boxes, record.labels

    def load_mosaic(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Four images at full size around a random point of a canvas of twice the image size."""
        size = 2 * self.image_size
        x, y = (int(random.uniform(size / 4, 3 * size / 4)) for _ in "xy")
        canvas = np.full((size, size, 3), 114, dtype=np.uint8)
        all_boxes, all_labels = [], []
        for corner, number in enumerate((index, *random.choices(range(len(self)), k=3))):
            image, boxes, labels = self.load(number)
            height, width = image.shape[:2]
            left = x - width if corner in (0, 2) else x
            top = y - height if corner in (0, 1) else y
            x1, y1 = max(left, 0), max(top, 0)
            x2, y2 = min(left + width, size), min(top + height, size)
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
            for box, label in zip(boxes, labels, strict=True):
                box = np.clip(np.add(box, (left, top, left, top)), 0, size)
                if box[2] - box[0] > 1 and box[3] - box[1] > 1:
                    all_boxes.append(box)
                    all_labels.append(label)
        return canvas, np.array(all_boxes).reshape(-1, 4), np.array(all_labels)


def dense_targets(rows: list, grids: list[int], anchors: Tensor) -> list[Tensor]:
    """One grid per scale, [3, G, G, 6]: object, cx, cy, w, h in 0..1, class.

    Object is 1, 0 for background, or -1 for ignored. rows: class, cx, cy, w, h of each object of
    one image; anchors [3, 3, 2] in 0..1 of the image. As in the course, the nine anchors of an
    object are tried in the order of their IoU, highest first.
    """
    targets = [torch.zeros(3, grid, grid, 6) for grid in grids]
    for label, cx, cy, width, height in rows:
        ious = anchor_ious(torch.tensor([width, height]), anchors.reshape(9, 2))
        has_anchor = [False, False, False]
        for number in ious.argsort(descending=True):
            scale, anchor = number // 3, number % 3
            grid = grids[scale]
            i, j = min(int(grid * cy), grid - 1), min(int(grid * cx), grid - 1)
            taken = targets[scale][anchor, i, j, 0] == 1
            if not has_anchor[scale]:
                targets[scale][anchor, i, j, 0] = 1
                targets[scale][anchor, i, j, 1:5] = torch.tensor([cx, cy, width, height])
                targets[scale][anchor, i, j, 5] = label
                has_anchor[scale] = True
            elif not taken and ious[number] > 0.5:
                targets[scale][anchor, i, j, 0] = -1
    return targets


def anchor_ious(size: Tensor, anchors: Tensor) -> Tensor:
    """IoU of a box [2] with anchors [A, 2] that have the same centre."""
    intersection = torch.min(size[0], anchors[:, 0]) * torch.min(size[1], anchors[:, 1])
    return intersection / (size[0] * size[1] + anchors[:, 0] * anchors[:, 1] - intersection)


def dense_loss(
    logits: list[Tensor], dense: list[Tensor], anchors: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return the terms of `YOLOLoss` from dense targets, one [B, 3, G, G, 6] per scale.

    targets [N, 6]: image, class, cx, cy, w, h.
    """
    sums = {name: torch.tensor(0.0) for name in ("box", "objectness", "background", "class")}
    for level, target, scale_anchors in zip(logits, dense, anchors, strict=True):
        positive, boxes = target[..., 0] == 1, dense_boxes(level, scale_anchors)
        background = ~positive
        for image in range(len(level)):
            iou = box_iou(
                corners(boxes[image]).reshape(-1, 4), corners(targets[targets[:, 0] == image, 2:6])
            )
            background[image] &= (iou <= 0.5).all(dim=1).reshape(background[image].shape)
        positive_boxes, target_boxes = corners(boxes[positive]), corners(target[..., 1:5][positive])
        classes = torch.zeros(len(target_boxes), level.shape[-1] - 5)
        for number, label in enumerate(target[..., 5][positive]):
            classes[number, int(label)] = 1
        sums["box"] += complete_box_iou_loss(positive_boxes, target_boxes, reduction="sum")
        iou = box_iou(positive_boxes, target_boxes).diagonal().detach()
        sums["objectness"] += bce(level[..., 0][positive], iou, reduction="sum")
        sums["background"] += bce(
            level[..., 0][background], torch.zeros(background.sum()), reduction="sum"
        )
        sums["class"] += bce(level[..., 5:][positive], classes, reduction="sum")
    return {name: value / max(1, 3 * len(targets)) for name, value in sums.items()}


def dense_boxes(level: Tensor, anchors: Tensor) -> Tensor:
    """Decode one scale: level [B, 3, G, G, F], anchors [3, 2] -> cxcywh in 0..1 [B, 3, G, G, 4]."""
    grid = level.shape[2]
    column = torch.arange(grid).repeat(len(level), 3, grid, 1)
    row = column.permute(0, 1, 3, 2)
    x, y = (level[..., 1].sigmoid() + column) / grid, (level[..., 2].sigmoid() + row) / grid
    size = level[..., 3:5].exp() * anchors.reshape(1, 3, 1, 1, 2)
    return torch.cat([x[..., None], y[..., None], size], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] cxcywh -> xyxy."""
    return torch.cat(
        [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1
    )
