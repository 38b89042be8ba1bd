"""The baselines: the way each job is written first, one picture, box and cell at a time.

They follow the course's code (https://github.com/aladdinpersson/Machine-Learning-Collection, YOLOv3) in what is looped
over, and this project in what comes out, so that their results can be laid side by side.
"""

import os
import random

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version

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

from src.data.mosaic import augmentations
from src.data.records import ImageRecord


def course_augmentations(side: int) -> A.Compose:
    """The course's training pipeline, with the names that albumentations 2 has for it; ends in float images."""
    larger = int(side * 1.1)
    grey = {"border_mode": cv2.BORDER_CONSTANT, "fill": 114}
    return A.Compose(
        [
            A.LongestMaxSize(max_size=larger),
            A.PadIfNeeded(min_height=larger, min_width=larger, **grey),
            A.Rotate(limit=10, p=0.5, **grey),
            A.RandomCrop(width=side, height=side),
            A.ColorJitter(brightness=(0.4, 1.6), contrast=(0.4, 1.6), saturation=(0.4, 1.6), hue=(-0.4, 0.4), p=0.4),
            A.Affine(scale=(0.9, 1.1), translate_percent=(-0.06, 0.06), rotate=(-20, 20), p=0.5, **grey),
            A.HorizontalFlip(p=0.5),
            A.Blur(p=0.1), A.CLAHE(p=0.1), A.Posterize(p=0.1), A.ToGray(p=0.1), A.ChannelShuffle(p=0.05),
            A.Normalize(mean=(0, 0, 0), std=(1, 1, 1), max_pixel_value=255),
            ToTensorV2(),
        ],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"], min_visibility=0.4),
    )  # fmt: skip


def same_augmentations(side: int) -> A.Compose:
    """The augmentation of this project after a resize: what is left of the difference is the way of loading."""
    resize = [A.LongestMaxSize(max_size=side), A.PadIfNeeded(min_height=side, min_width=side, fill=114)]
    end = [A.Normalize(mean=(0, 0, 0), std=(1, 1, 1), max_pixel_value=255), ToTensorV2()]
    boxes = A.BboxParams(format="pascal_voc", label_fields=["labels"], min_visibility=0.25)
    return A.Compose([*resize, *augmentations().transforms, *end], bbox_params=boxes)


class ObviousDataset(Dataset):
    """Decodes every picture it needs at full size, and builds dense targets: [0] float [3, S, S], [1] see below."""

    def __init__(self, records: list[ImageRecord], side: int, anchors: Tensor, augment: A.Compose, mosaic: float = 0.75):
        self.records, self.side, self.anchors = records, side, anchors
        self.augment, self.mosaic = augment, mosaic

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, list[Tensor]]:
        image, boxes, labels = self.load_mosaic(index) if random.random() < self.mosaic else self.load(index)
        out = self.augment(image=image, bboxes=boxes, labels=labels)
        side, rows = self.side, []
        for (x1, y1, x2, y2), label in zip(out["bboxes"], out["labels"], strict=True):
            rows.append([label, (x1 + x2) / 2 / side, (y1 + y2) / 2 / side, (x2 - x1) / side, (y2 - y1) / side])
        return out["image"], dense_targets(rows, [side // 32, side // 16, side // 8], self.anchors)

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One picture at full size, uint8 [H, W, 3], its boxes xyxy in pixels and labels."""
        record = self.records[index]
        return np.array(Image.open(record.image).convert("RGB")), record.boxes, record.labels

    def load_mosaic(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Four pictures at full size around a random point of a canvas of twice the side."""
        size = 2 * self.side
        x, y = int(random.uniform(size / 4, 3 * size / 4)), int(random.uniform(size / 4, 3 * size / 4))
        canvas = np.full((size, size, 3), 114, dtype=np.uint8)
        all_boxes, all_labels = [], []
        for corner, number in enumerate([index] + random.choices(range(len(self)), k=3)):
            image, boxes, labels = self.load(number)
            height, width = image.shape[:2]
            left = x - width if corner in (0, 2) else x
            top = y - height if corner in (0, 1) else y
            x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, size), min(top + height, size)
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
            for box, label in zip(boxes, labels, strict=True):
                box = np.clip(box + [left, top, left, top], 0, size)
                if box[2] - box[0] > 1 and box[3] - box[1] > 1:
                    all_boxes.append(box)
                    all_labels.append(label)
        return canvas, np.array(all_boxes).reshape(-1, 4), np.array(all_labels)


def dense_targets(rows: list, grids: list[int], anchors: Tensor) -> list[Tensor]:
    """One grid a scale, [3, G, G, 6]: object (1; -1: ignored; 0: background), cx, cy, w, h in 0..1, class.

    rows: class, cx, cy, w, h of each object of one picture; anchors [3, 3, 2] in sides of the image. As in the
    course, an object goes through its nine anchors, the best first.
    """
    targets = [torch.zeros(3, grid, grid, 6) for grid in grids]
    for label, cx, cy, width, height in rows:
        overlaps = anchor_overlaps(torch.tensor([width, height]), anchors.reshape(9, 2))
        has_anchor = [False, False, False]
        for number in overlaps.argsort(descending=True):
            scale, anchor = number // 3, number % 3
            grid = grids[scale]
            i, j = min(int(grid * cy), grid - 1), min(int(grid * cx), grid - 1)
            taken = targets[scale][anchor, i, j, 0] == 1
            if not has_anchor[scale]:
                targets[scale][anchor, i, j, 0] = 1
                targets[scale][anchor, i, j, 1:5] = torch.tensor([cx, cy, width, height])
                targets[scale][anchor, i, j, 5] = label
                has_anchor[scale] = True
            elif not taken and overlaps[number] > 0.5:
                targets[scale][anchor, i, j, 0] = -1
    return targets


def anchor_overlaps(sides: Tensor, anchors: Tensor) -> Tensor:
    """IoU of a box [2] with anchors [A, 2] that share its centre."""
    shared = torch.min(sides[0], anchors[:, 0]) * torch.min(sides[1], anchors[:, 1])
    return shared / (sides[0] * sides[1] + anchors[:, 0] * anchors[:, 1] - shared)


def dense_loss(logits: list[Tensor], dense: list[Tensor], anchors: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The terms of `YOLOLoss` for dense targets [B, 3, G, G, 6] of each scale; targets [N, 6]: image, class, cx, cy, w, h."""
    sums = {name: torch.tensor(0.0) for name in ("box_loss", "object_loss", "no_object_loss", "class_loss")}
    for level, target, scale_anchors in zip(logits, dense, anchors, strict=True):
        positive, every_box = target[..., 0] == 1, dense_boxes(level, scale_anchors)
        background = ~positive
        for image in range(len(level)):
            wanted = corners(targets[targets[:, 0] == image, 2:6])
            overlap = box_iou(corners(every_box[image]).reshape(-1, 4), wanted)
            background[image] &= (overlap <= 0.5).all(dim=1).reshape(background[image].shape)
        boxes = every_box[positive]
        wanted = target[..., 1:5][positive]
        classes = torch.zeros(len(wanted), level.shape[-1] - 5)
        for number, label in enumerate(target[..., 5][positive]):
            classes[number, int(label)] = 1
        sums["box_loss"] += complete_box_iou_loss(corners(boxes), corners(wanted), reduction="sum")
        overlap = box_iou(corners(boxes), corners(wanted)).diagonal().detach()
        sums["object_loss"] += bce(level[..., 0][positive], overlap, reduction="sum")
        sums["no_object_loss"] += bce(level[..., 0][background], torch.zeros(background.sum()), reduction="sum")
        sums["class_loss"] += bce(level[..., 5:][positive], classes, reduction="sum")
    return {name: value / max(1, 3 * len(targets)) for name, value in sums.items()}


def dense_boxes(level: Tensor, anchors: Tensor) -> Tensor:
    """Every cell's box of one scale: level [B, 3, G, G, F], anchors [3, 2] -> [B, 3, G, G, 4] cxcywh in 0..1."""
    grid = level.shape[2]
    column = torch.arange(grid).repeat(len(level), 3, grid, 1)
    row = column.permute(0, 1, 3, 2)
    x, y = (level[..., 1].sigmoid() + column) / grid, (level[..., 2].sigmoid() + row) / grid
    sides = level[..., 3:5].exp() * anchors.reshape(1, 3, 1, 1, 2)
    return torch.cat([x[..., None], y[..., None], sides], dim=-1)


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] cxcywh -> xyxy."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)


def detections(logits: list[Tensor], anchors: Tensor, confidence: float) -> list[list[list[float]]]:
    """For each picture a list of [class, score, x1, y1, x2, y2] above `confidence`, by way of lists of all cells."""
    cells = []
    for level, scale_anchors in zip(logits, anchors, strict=True):
        probability = level[..., :1].sigmoid() * level[..., 5:].sigmoid()
        score, label = probability.max(dim=-1)
        rows = torch.cat([label[..., None], score[..., None], corners(dense_boxes(level, scale_anchors))], dim=-1)
        cells.append(rows.flatten(1, 3))
    return [[row for row in picture if row[1] > confidence] for picture in torch.cat(cells, dim=1).tolist()]


def tensor_iou(one: list[float], two: list[float]) -> float:
    """IoU of two boxes xyxy, the course's way: through tensors."""
    a, b = torch.tensor(one), torch.tensor(two)
    across = (torch.min(a[2], b[2]) - torch.max(a[0], b[0])).clamp(0)
    shared = across * (torch.min(a[3], b[3]) - torch.max(a[1], b[1])).clamp(0)
    return (shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)).item()


def float_iou(one: list[float], two: list[float]) -> float:
    """IoU of two boxes xyxy, in Python's numbers."""
    shared = max(0, min(one[2], two[2]) - max(one[0], two[0])) * max(0, min(one[3], two[3]) - max(one[1], two[1]))
    return shared / ((one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1]) - shared)


def loop_nms(rows: list[list[float]], overlap: float, most: int, iou=tensor_iou) -> list[list[float]]:
    """Of two rows [class, score, x1, y1, x2, y2] of one class that overlap the better stays; at most `most`."""
    rows = sorted(rows, key=lambda row: row[1], reverse=True)
    kept = []
    while rows:
        best = rows.pop(0)
        rows = [row for row in rows if row[0] != best[0] or iou(best[2:], row[2:]) <= overlap]
        kept.append(best)
    return kept[:most]


def average_precision(found: list, truth: list, label: int, iou=tensor_iou) -> float:
    """VOC's average precision (area) of one class at IoU 0.5, one detection at a time.

    found: image, class, score, x1, y1, x2, y2; truth: image, class, difficult, x1, y1, x2, y2.
    """
    truth = [row for row in truth if row[1] == label]
    total = len([row for row in truth if not row[2]])
    taken, right, wrong, curve = set(), 0, 0, []
    for row in sorted((row for row in found if row[1] == label), key=lambda row: row[2], reverse=True):
        best, best_overlap = -1, 0.0
        for number, there in enumerate(truth):
            if there[0] == row[0]:
                overlap = iou(row[3:], there[3:])
                if overlap > best_overlap:
                    best, best_overlap = number, overlap
        if best_overlap >= 0.5 and truth[best][2]:
            continue
        if best_overlap >= 0.5 and best not in taken:
            taken.add(best)
            right += 1
        else:
            wrong += 1
        curve.append((right / (right + wrong), right / total))
    area, before = 0.0, 0.0
    for number, (_, recall) in enumerate(curve):
        area += (recall - before) * max(precision for precision, _ in curve[number:])
        before = recall
    return area
