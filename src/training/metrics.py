"""The course's three accuracies, average precision in five definitions, and per-class tables."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchmetrics.utilities import dim_zero_cat
from torchvision.ops import box_iou

from src.data.datamodule import world_and_rank
from src.model.boxes import cxcywh_to_xyxy, decode, nms
from src.serving.predictor import CONFIDENCE
from src.training.loss import assign_targets

# of objectness, for object and no-object accuracy
COURSE_THRESHOLD = 0.05
STRICT_THRESHOLD = 0.5
THRESHOLDS = (COURSE_THRESHOLD, STRICT_THRESHOLD)
MIN_SCORE = 0.01  # detections with a lower score do not enter average precision
NMS_IOU = 0.45
MAX_DETECTIONS = 100  # per image
COURSE_MIN_SCORE = 0.05  # for the course's average precision


class CellAccuracy(Metric):
    """Class, object and no-object accuracy as the course defines them.

    The positives are the loss's. Background is all but the positives and `Assigned.ignored`: what
    the loss ignores because its box overlaps an object counts here.

    compute() -> fractions: "class", and for each threshold t "object@t" (positives with objectness
    above t) and "no_object@t" (background with objectness at or below t). NaN if there is nothing
    to count.
    """

    def __init__(self):
        super().__init__()
        for name in ("positives", "background", "classes", "objects", "no_objects"):
            counts = torch.zeros(len(THRESHOLDS), dtype=torch.long)
            self.add_state(name, counts, dist_reduce_fx="sum")

    def update(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> None:
        """Count a batch: logits one [B, A, G, G, 5 + C] per scale, targets [N, 6]."""
        grids = [level.shape[2] for level in logits]
        scales = assign_targets(targets, grids, anchors, batch=len(logits[0]))
        # Logits are compared, because a sigmoid would round them
        thresholds = torch.tensor(THRESHOLDS, device=targets.device).logit()[:, None]  # [T, 1]
        for level, assigned in zip(logits, scales, strict=True):
            valid = assigned.valid  # [N]
            cells = assigned.gather(level).float()  # [N, 5 + C]
            has_right_class = cells[:, 5:].argmax(dim=1) == targets[:, 1]  # [N]
            is_object = cells[:, 0] > thresholds  # [T, N]
            self.positives += valid.sum()
            self.classes += (has_right_class & valid).sum()
            self.objects += (is_object & valid).sum(dim=1)

            background = ~(assigned.positive | assigned.ignored).flatten()  # [K]
            is_no_object = level[..., 0].float().flatten() <= thresholds  # [T, K]
            self.background += background.sum()
            self.no_objects += (is_no_object & background).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        values = {"class": (self.classes / self.positives)[0]}
        for number, threshold in enumerate(THRESHOLDS):
            values[f"object@{threshold}"] = (self.objects / self.positives)[number]
            values[f"no_object@{threshold}"] = (self.no_objects / self.background)[number]
        return values


class DetectionAccumulator(Metric):
    """Collect detections and ground truth of a split for average precision, as rows of numbers.

    At most 100 detections per image, so memory is bounded by the number of images (6 kB each).
    compute() -> predictions float32 [n, 7]: image, label, score, x1, y1, x2, y2; ground_truth
    float32 [m, 7]: image, label, difficult, x1, y1, x2, y2; boxes in 0..1. Each process numbers its
    images differently.
    """

    def __init__(self):
        super().__init__()
        self.add_state("predictions", [], dist_reduce_fx="cat")
        self.add_state("ground_truth", [], dist_reduce_fx="cat")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self, logits: list[Tensor], targets: Tensor, difficult: Tensor, anchors: Tensor
    ) -> None:
        """logits of one batch, its targets [N, 6] and difficult bool [N]."""
        world, rank = world_and_rank()
        first = int(self.images)
        for number, (boxes, scores) in enumerate(zip(*decode(logits, anchors), strict=True)):
            kept, labels = nms(boxes, scores, MIN_SCORE, NMS_IOU, MAX_DETECTIONS)  # [n], [n]
            image = torch.full_like(labels, (first + number) * world + rank)
            columns = (image, labels, scores[kept, labels], boxes[kept].clamp(0, 1))
            self.predictions.append(torch.column_stack(columns))  # [n, 7]
        image = (targets[:, 0] + first) * world + rank
        columns = (image, targets[:, 1], difficult, cxcywh_to_xyxy(targets[:, 2:6]))
        self.ground_truth.append(torch.column_stack(columns))  # [N, 7]
        self.images += len(logits[0])

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        states = (self.predictions, self.ground_truth)
        return tuple(dim_zero_cat(rows).cpu().numpy() for rows in states)


def match(
    predictions: np.ndarray, ground_truth: np.ndarray, any_class: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Match each detection to the object of its image and class with the highest IoU.

    predictions [n, 7], ground_truth [m, 7] as in `DetectionAccumulator`. any_class: match objects
    of all classes. Returns (index into ground_truth [n], -1 if none overlaps; IoU float64 [n]).
    IoUs are rounded to 6 digits: the coordinates, float32 in 0..1, would otherwise turn an IoU of
    exactly 0.5 into slightly more or less.
    """
    best = np.full(len(predictions), -1)
    iou = np.zeros(len(predictions))
    for number in np.unique(ground_truth[:, 0]):
        rows = np.flatnonzero(predictions[:, 0] == number)  # [r]
        objects = np.flatnonzero(ground_truth[:, 0] == number)  # [c]
        boxes = torch.from_numpy(predictions[rows, 3:]).double()
        object_boxes = torch.from_numpy(ground_truth[objects, 3:]).double()
        pairs = box_iou(boxes, object_boxes).numpy()  # [r, c]
        if not any_class:
            pairs *= predictions[rows, 1:2] == ground_truth[objects, 1]
        best[rows] = objects[pairs.argmax(axis=1)]
        iou[rows] = pairs.max(axis=1).round(6)
    best[iou == 0] = -1
    return best, iou


def first_hits(best: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Return which detections are true positives, bool [n]: of each object, only the first hit.

    Detections are sorted by score. best [n]: the object of each; hit bool [n]: whether the IoU
    suffices.
    """
    hits = np.flatnonzero(hit)
    _, first = np.unique(best[hits], return_index=True)
    true_positive = np.zeros(len(hit), dtype=bool)
    true_positive[hits[first]] = True
    return true_positive


def precision_recall(
    predictions: np.ndarray, ground_truth: np.ndarray, matched: tuple, label: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall [n] at each detection of one class, best first, by VOC's devkit.

    matched: what `match` returns. A hit has an IoU of at least 0.5. Of an object's hits, the best
    scored is a true positive, the others are false positives. Difficult objects don't count, and
    neither do their hits. Without objects the recall is 0.
    """
    best, iou = matched
    difficult = np.append(ground_truth[:, 2] == 1, False)  # [m + 1]: the last for no match, -1
    hit = iou >= 0.5
    counts = (predictions[:, 1] == label) & ~(hit & difficult[best])
    rows = np.flatnonzero(counts)
    rows = rows[np.argsort(-predictions[rows, 2], kind="stable")]  # best first
    total = np.sum((ground_truth[:, 1] == label) & (ground_truth[:, 2] == 0))
    true = np.cumsum(first_hits(best[rows], hit[rows]))
    return true / np.arange(1, len(rows) + 1), true / max(total, 1)


def course_precision_recall(
    predictions: np.ndarray, ground_truth: np.ndarray, matched: tuple, label: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall as in `precision_recall`, but by the course's definition.

    A hit has an IoU above 0.5. Only scores above 0.05 count. Difficult objects count as all others.
    """
    best, iou = matched
    rows = np.flatnonzero((predictions[:, 1] == label) & (predictions[:, 2] > COURSE_MIN_SCORE))
    rows = rows[np.argsort(-predictions[rows, 2], kind="stable")]  # best first
    total = np.sum(ground_truth[:, 1] == label)
    true = np.cumsum(first_hits(best[rows], iou[rows] > 0.5))
    return true / np.arange(1, len(rows) + 1), true / max(total, 1)


def average_precision(precision: np.ndarray, recall: np.ndarray, method: str = "area") -> float:
    """Average precision of one class.

    method: "area", the exact area under the monotone curve (VOC 2010 and later); "11pt", the mean
    of the best precision at recall 0, 0.1, ... 1 or beyond (VOC 2007); "course", trapezoids under
    the raw curve from (0, 1).
    """
    if method == "11pt":
        levels = np.linspace(0, 1, 11) - 1e-9  # recall is rounded
        best = [precision[recall >= level].max(initial=0) for level in levels]
        return float(np.mean(best))
    if method == "course":
        return float(np.trapezoid(np.r_[1, precision], np.r_[0, recall]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]  # best precision from here on
    steps = np.diff(recall, prepend=0)
    return float(np.sum(steps * envelope))


def per_class_table(
    predictions: np.ndarray, ground_truth: np.ndarray, classes: tuple[str, ...]
) -> list[dict]:
    """Return one row per class, with average precisions that are NaN without objects.

    Keys: "class", "num_gt" (not difficult), "ap", "ap_11pt", "ap_course".
    """
    matched = match(predictions, ground_truth)
    table = []
    for label, name in enumerate(classes):
        difficult = ground_truth[ground_truth[:, 1] == label, 2]
        row = {"class": name, "num_gt": int(np.sum(difficult == 0))}
        curve = precision_recall(predictions, ground_truth, matched, label)
        row["ap"] = average_precision(*curve, "area") if row["num_gt"] else np.nan
        row["ap_11pt"] = average_precision(*curve, "11pt") if row["num_gt"] else np.nan
        curve = course_precision_recall(predictions, ground_truth, matched, label)
        row["ap_course"] = average_precision(*curve, "course") if len(difficult) else np.nan
        table.append(row)
    return table


def mean_average_precision(table: list[dict], column: str = "ap") -> float:
    """Mean of a column of `per_class_table` over the classes with objects; 0 if there are none."""
    values = [row[column] for row in table if not np.isnan(row[column])]
    return float(np.mean(values)) if values else 0.0


def coco_average_precision(predictions: np.ndarray, ground_truth: np.ndarray) -> dict[str, float]:
    """COCO's AP@.5 and AP@.5:.95, by torchmetrics over faster-coco-eval.

    Difficult objects count as `iscrowd`.
    """
    metric = MeanAveragePrecision(
        backend="faster_coco_eval", max_detection_thresholds=[1, 10, MAX_DETECTIONS]
    )
    for image in np.unique(np.r_[predictions[:, 0], ground_truth[:, 0]]):
        p = torch.from_numpy(predictions[predictions[:, 0] == image])
        t = torch.from_numpy(ground_truth[ground_truth[:, 0] == image])
        metric.update(
            [{"boxes": p[:, 3:] * 1000, "scores": p[:, 2], "labels": p[:, 1].long()}],
            [{"boxes": t[:, 3:] * 1000, "labels": t[:, 1].long(), "iscrowd": t[:, 2].long()}],
        )
    values = metric.compute()
    return {"COCO AP@.5": float(values["map_50"]), "COCO AP@.5:.95": float(values["map"])}


def confusion(predictions: np.ndarray, ground_truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pairs of ground truth (rows) and predictions (columns), int64 [C + 1, C + 1].

    The last row and column are background.

    A detection above CONFIDENCE is matched to the object of its image with the highest IoU,
    whatever its class, if that is at least 0.5. The best scored detection of an object counts for
    it; its others, and those without a match, count as background. Difficult objects that are
    missed are left out.
    """
    predictions = predictions[predictions[:, 2] > CONFIDENCE]
    predictions = predictions[np.argsort(-predictions[:, 2], kind="stable")]
    best, iou = match(predictions, ground_truth, any_class=True)
    found = first_hits(best, iou >= 0.5)
    missed = ground_truth[:, 2] == 0
    missed[best[found]] = False

    labels = ground_truth[:, 1].astype(int)
    predicted = predictions[:, 1].astype(int)
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    np.add.at(counts, (labels[best[found]], predicted[found]), 1)
    np.add.at(counts, (num_classes, predicted[~found]), 1)
    np.add.at(counts, (labels[missed], num_classes), 1)
    return counts


@dataclass(frozen=True)
class Evaluation:
    """What a detector reaches on the validation split."""

    accuracies: dict[str, float]  # CellAccuracy.compute()
    precisions: dict[str, float]  # mean average precision by the name of its definition
    per_class: list[dict]  # per_class_table
    predictions: np.ndarray  # as from DetectionAccumulator
    ground_truth: np.ndarray
