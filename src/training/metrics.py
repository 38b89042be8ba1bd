"""The course's three accuracies, average precision in four definitions, and per-class tables."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from src.data.datamodule import world_and_rank
from src.model.boxes import cxcywh_to_xyxy, decode_above, nms
from src.serving.predictor import CONFIDENCE
from src.training.loss import assign_targets

# of objectness, for object and no-object accuracy
COURSE_THRESHOLD = 0.05
STRICT_THRESHOLD = 0.5
THRESHOLDS = (COURSE_THRESHOLD, STRICT_THRESHOLD)
MIN_SCORE = 0.01  # detections with a lower score do not enter average precision
NMS_IOU = 0.45
MAX_DETECTIONS = 100  # per image
COURSE_MIN_SCORE = 0.05
AP_METHODS = {
    "ap": "area",
    "ap_11pt": "11pt",
    "ap_course": "course",
}  # column of `per_class_table` -> method


class CellAccuracy(Metric):
    """Class, object and no-object accuracy as the course defines them.

    The positives are the loss's. Background is all but the positives and `Assigned.ignored`: what
    the loss ignores because its box overlaps an object counts here.

    update(logits three [B, 3, G, G, 5 + C], targets [N, 6], anchors [3, 3, 2]); compute() ->
    fractions: "class", and for each threshold t "object@t" (positives with objectness above t) and
    "no_object@t" (background with objectness at or below t). NaN if there is nothing to count.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        counts = (
            ("positives", 1),
            ("background", 1),
            ("classes", 1),
            ("objects", 2),
            ("no_objects", 2),
        )
        for name, size in counts:
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> None:
        grids = [level.shape[2] for level in logits]
        cut = torch.tensor(THRESHOLDS, device=targets.device).logit()[
            :, None
        ]  # of the logit: no rounding by sigmoid
        for level, assigned in zip(
            logits, assign_targets(targets, grids, anchors, len(logits[0])), strict=True
        ):
            rows = assigned.gather(level).float()
            correct = rows[:, 5:].argmax(dim=1) == targets[:, 1].long()
            background = ~(assigned.positive | assigned.ignored)
            objectness = level[..., 0].float()
            self.positives += assigned.valid.sum()
            self.background += background.sum()
            self.classes += (correct & assigned.valid).sum()
            self.objects += ((rows[:, 0] > cut) & assigned.valid).sum(dim=1)
            self.no_objects += ((objectness.flatten() <= cut) & background.flatten()).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        values = {"class": self.classes[0] / self.positives[0]}
        for number, threshold in enumerate(THRESHOLDS):
            values[f"object@{threshold}"] = self.objects[number] / self.positives[0]
            values[f"no_object@{threshold}"] = self.no_objects[number] / self.background[0]
        return values


class DetectionAccumulator(Metric):
    """Collect detections and ground truth of a split for average precision, as rows of numbers.

    At most 100 detections per image, so memory is bounded by the number of images (6 kB each).
    compute() -> predictions float32 [n, 7]: image, label, score, x1, y1, x2, y2; ground_truth
    float32 [m, 7]: image, label, difficult, x1, y1, x2, y2; boxes in 0..1. Each process numbers its
    images differently.
    """

    full_state_update = False

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
        for number, (boxes, scores) in enumerate(decode_above(logits, anchors, MIN_SCORE)):
            kept, labels = nms(boxes, scores, MIN_SCORE, NMS_IOU, max_detections=MAX_DETECTIONS)
            image = torch.full(
                (len(kept), 1), float((first + number) * world + rank), device=boxes.device
            )
            rows = (
                image,
                labels[:, None].float(),
                scores[kept, labels][:, None],
                boxes[kept].clamp(0, 1),
            )
            self.predictions.append(torch.cat(rows, dim=1))
        image = (targets[:, :1] + first) * world + rank
        rows = (image, targets[:, 1:2], difficult[:, None].float(), cxcywh_to_xyxy(targets[:, 2:6]))
        self.ground_truth.append(torch.cat(rows, dim=1))
        self.images += len(logits[0])

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (predictions [n, 7], ground_truth [m, 7])."""
        parts = [
            rows if isinstance(rows, list) else [rows]
            for rows in (self.predictions, self.ground_truth)
        ]
        return tuple(
            torch.cat([torch.zeros(0, 7), *(part.cpu() for part in rows)]).numpy() for rows in parts
        )


def _rows_by_key(keys: np.ndarray) -> dict[float, np.ndarray]:
    """Return the indices at which each value of `keys` [n] occurs, in ascending order."""
    order = np.argsort(keys, kind="stable")
    values, firsts = np.unique(keys[order], return_index=True)
    return dict(
        zip(values.tolist(), np.split(order, firsts[1:]), strict=False)
    )  # without keys, split returns one empty part


def match(predictions: np.ndarray, ground_truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match each detection to the object of its image and class with the highest IoU.

    predictions [n, 7], ground_truth [m, 7] as in `DetectionAccumulator`. Returns (index into
    ground_truth [n], -1 if there is none; IoU float64 [n]). IoUs are rounded to 6 digits: the
    coordinates, float32 in 0..1, would otherwise turn an IoU of exactly 0.5 into slightly more or
    less.
    """
    best, iou = np.full(len(predictions), -1), np.zeros(len(predictions))
    image_and_class = (
        rows[:, :2].astype(np.int64) @ (10_000, 1) for rows in (predictions, ground_truth)
    )
    detections, objects = map(_rows_by_key, image_and_class)
    for key in detections.keys() & objects.keys():
        rows, candidates = detections[key], objects[key]
        boxes = (
            torch.from_numpy(part[:, 3:]).double()
            for part in (predictions[rows], ground_truth[candidates])
        )
        pairs = box_iou(*boxes).numpy()
        best[rows], iou[rows] = candidates[pairs.argmax(axis=1)], pairs.max(axis=1).round(6)
    return best, iou


def precision_recall(
    predictions: np.ndarray,
    ground_truth: np.ndarray,
    matched: tuple,
    label: int,
    course: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall [n] at each detection of one class, best first, at IoU 0.5.

    Detections are matched by the greedy rule of VOC's devkit.

    matched: what `match` returns. Of the detections matched to one object the best scored is a true
    positive, the others are false positives. Detections of difficult objects count as neither,
    unless `course`: then difficult objects count like all others, scores must exceed 0.05 and the
    IoU must exceed 0.5. Both are empty without objects.
    """
    best, iou = matched
    objects = ground_truth[:, 1] == label
    total = objects.sum() if course else (objects & (ground_truth[:, 2] == 0)).sum()
    if not total:
        return np.zeros(0), np.zeros(0)
    rows = np.flatnonzero(
        (predictions[:, 1] == label) & (predictions[:, 2] > (COURSE_MIN_SCORE if course else 0))
    )
    rows = rows[np.argsort(-predictions[rows, 2], kind="stable")]
    hit = iou[rows] > 0.5 if course else iou[rows] >= 0.5
    if not course:
        dropped = hit & (ground_truth[best[rows], 2] == 1)
        rows, hit = rows[~dropped], hit[~dropped]
    true_positive = np.zeros(len(rows), dtype=bool)
    hits = np.flatnonzero(hit)
    true_positive[hits[np.unique(best[rows[hits]], return_index=True)[1]]] = True
    true = np.cumsum(true_positive)
    return true / np.arange(1, len(rows) + 1), true / total


def average_precision(precision: np.ndarray, recall: np.ndarray, method: str = "area") -> float:
    """Average precision of one class.

    method: "area", the exact area under the monotone curve (VOC 2010 and later); "11pt", the mean
    of the best precision at recall 0, 0.1, ... 1 or beyond (VOC 2007); "course", trapezoids under
    the raw curve from (0, 1).
    """
    if method == "11pt":
        return float(
            np.mean(
                [
                    precision[recall >= level - 1e-9].max(initial=0)
                    for level in np.linspace(0, 1, 11)
                ]
            )
        )
    if method == "course":
        return float(np.trapezoid(np.r_[1, precision], np.r_[0, recall]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.r_[0, recall]) * envelope))


def per_class_table(
    predictions: np.ndarray, ground_truth: np.ndarray, classes: tuple[str, ...]
) -> list[dict]:
    """Return one row per class, with average precisions that are NaN without objects.

    Keys: "class", "num_gt" (not difficult), "ap", "ap_11pt", "ap_course".
    """
    matched, table = match(predictions, ground_truth), []
    for label, name in enumerate(classes):
        objects = ground_truth[ground_truth[:, 1] == label]
        row = {"class": name, "num_gt": int((objects[:, 2] == 0).sum())}
        for column, method in AP_METHODS.items():
            course = method == "course"
            counted = len(objects) if course else row["num_gt"]
            curve = precision_recall(predictions, ground_truth, matched, label, course)
            row[column] = average_precision(*curve, method) if counted else np.nan
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
    metric.warn_on_many_detections = False
    detections, objects = _rows_by_key(predictions[:, 0]), _rows_by_key(ground_truth[:, 0])
    for image in sorted(detections.keys() | objects.keys()):
        p = torch.from_numpy(predictions[detections.get(image, [])])
        t = torch.from_numpy(ground_truth[objects.get(image, [])])
        metric.update(
            [{"boxes": p[:, 3:] * 1000, "scores": p[:, 2], "labels": p[:, 1].long()}],
            [{"boxes": t[:, 3:] * 1000, "labels": t[:, 1].long(), "iscrowd": t[:, 2].long()}],
        )
    values = metric.compute()
    return {"COCO AP@.5": float(values["map_50"]), "COCO AP@.5:.95": float(values["map"])}


def confusion(
    predictions: np.ndarray,
    ground_truth: np.ndarray,
    num_classes: int,
    confidence: float = CONFIDENCE,
) -> np.ndarray:
    """Count pairs of ground truth (rows) and predictions (columns), int64 [C + 1, C + 1].

    The last row and column are background.

    A detection above `confidence` is matched to the object of its image with the highest IoU,
    whatever its class, if that is at least 0.5. The best scored detection of an object counts for
    it; its others, and those without a match, count as background. Difficult objects that are
    missed are left out.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    predictions = predictions[predictions[:, 2] > confidence]
    predictions = predictions[np.argsort(-predictions[:, 2], kind="stable")]
    one_class = [rows.astype(np.float32) for rows in (predictions, ground_truth)]
    for rows in one_class:
        rows[:, 1] = 0
    best, iou = match(*one_class)
    hits = np.flatnonzero(iou >= 0.5)
    first = hits[np.unique(best[hits], return_index=True)[1]]
    np.add.at(
        counts, (ground_truth[best[first], 1].astype(int), predictions[first, 1].astype(int)), 1
    )
    false = np.setdiff1d(np.arange(len(predictions)), first)
    np.add.at(counts, (num_classes, predictions[false, 1].astype(int)), 1)
    missed = np.setdiff1d(np.flatnonzero(ground_truth[:, 2] == 0), best[first])
    np.add.at(counts, (ground_truth[missed, 1].astype(int), num_classes), 1)
    return counts


@dataclass(frozen=True)
class Evaluation:
    """What a detector reaches on the validation split."""

    accuracies: dict[str, float]  # CellAccuracy.compute()
    precisions: dict[str, float]  # mean average precision by the name of its definition
    per_class: list[dict]  # per_class_table
    predictions: np.ndarray  # as from DetectionAccumulator
    ground_truth: np.ndarray
