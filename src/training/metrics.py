"""The course's three accuracies, average precision in four definitions, and per-class tables."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from src.model.boxes import cxcywh_to_xyxy, decode_above, nms
from src.training.loss import assign_targets

THRESHOLDS = (0.05, 0.5)  # of objectness, for object and no-object accuracy: the course's, and sure of object and edges


CONFIDENCE = 0.01  # detections that score less do not enter average precision


OVERLAP = 0.45  # NMS


COURSE_CONFIDENCE = 0.05


class CellAccuracy(Metric):
    """Class, object and no-object accuracy as the course defines them, over the cells that loss.py assigns.

    update(logits three [B, 3, G, G, 5 + C], targets [N, 6], anchors [3, 3, 2]); compute() -> fractions, named
    "class", and for each threshold t "object@t" (positives with objectness above t) and "no_object@t"
    (background with objectness at or below it). NaN where there was nothing to count.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        for name, size in (("positives", 1), ("background", 1), ("classes", 1), ("objects", 2), ("nothing", 2)):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: list[Tensor], targets: Tensor, anchors: Tensor) -> None:
        grids = [level.shape[2] for level in logits]
        cut = torch.tensor(THRESHOLDS, device=targets.device).logit()[:, None]  # of the logit: no sigmoid's rounding
        for level, found in zip(logits, assign_targets(targets, grids, anchors, len(logits[0])), strict=True):
            rows = found.gather(level).float()
            right = rows[:, 5:].argmax(dim=1) == targets[:, 1].long()
            background = ~(found.positive | found.ignored)
            objectness = level[..., 0].float()
            self.positives += found.owner.sum()
            self.background += background.sum()
            self.classes += (right & found.owner).sum()
            self.objects += ((rows[:, 0] > cut) & found.owner).sum(dim=1)
            self.nothing += ((objectness.flatten() <= cut) & background.flatten()).sum(dim=1)

    def compute(self) -> dict[str, Tensor]:
        values = {"class": self.classes[0] / self.positives[0]}
        for number, threshold in enumerate(THRESHOLDS):
            values[f"object@{threshold}"] = self.objects[number] / self.positives[0]
            values[f"no_object@{threshold}"] = self.nothing[number] / self.background[0]
        return values


class DetectionStore(Metric):
    """What was found and what was there, for average precision: rows of numbers, on the CPU.

    At most 100 detections an image, so memory is bounded by the number of images (6 kB each).
    `found` float32 [n, 7]: image, label, score, x1, y1, x2, y2; `truth` float32 [m, 7]: image, label, difficult,
    x1, y1, x2, y2; boxes in 0..1. Images are numbered apart on each process.
    """

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("truth", [], dist_reduce_fx="cat")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: list[Tensor], targets: Tensor, difficult: Tensor, anchors: Tensor) -> None:
        """logits of one batch, its targets [N, 6] and difficult bool [N]."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        first = int(self.images)
        for number, (boxes, scores) in enumerate(decode_above(logits, anchors, CONFIDENCE)):
            kept, labels = nms(boxes, scores, CONFIDENCE, OVERLAP, most=100)
            image = torch.full((len(kept), 1), float((first + number) * world + rank), device=boxes.device)
            rows = (image, labels[:, None].float(), scores[kept, labels][:, None], boxes[kept].clamp(0, 1))
            self.found.append(torch.cat(rows, dim=1))
        image = (targets[:, :1] + first) * world + rank
        rows = (image, targets[:, 1:2], difficult[:, None].float(), cxcywh_to_xyxy(targets[:, 2:6]))
        self.truth.append(torch.cat(rows, dim=1))
        self.images += len(logits[0])

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """(found [n, 7], truth [m, 7])."""
        parts = [rows if isinstance(rows, list) else [rows] for rows in (self.found, self.truth)]
        return tuple(torch.cat([torch.zeros(0, 7), *(part.cpu() for part in rows)]).numpy() for rows in parts)


def match(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the truth of its image and class that it overlaps most.

    found [n, 7], truth [m, 7] as in `DetectionStore`. Returns (index into truth [n], -1 where there is none; IoU [n]).
    """
    best, overlap = np.full(len(found), -1), np.zeros(len(found), dtype=np.float32)
    if not len(found):
        return best, overlap
    groups = [rows[:, :2].astype(np.int64) @ (10_000, 1) for rows in (found, truth)]  # one number for image and class
    orders = [np.argsort(group, kind="stable") for group in groups]
    found_keys, found_starts = np.unique(groups[0][orders[0]], return_index=True)
    starts, ends = (np.searchsorted(groups[1][orders[1]], found_keys, side=side) for side in ("left", "right"))
    for rows, start, end in zip(np.split(orders[0], found_starts[1:]), starts, ends, strict=True):
        if start < end:
            there = orders[1][start:end]
            iou = box_iou(torch.from_numpy(found[rows, 3:]), torch.from_numpy(truth[there, 3:])).numpy()
            best[rows], overlap[rows] = there[iou.argmax(axis=1)], iou.max(axis=1)
    return best, overlap


def precision_recall(found: np.ndarray, truth: np.ndarray, matched: tuple, label: int, course: bool = False) -> tuple:
    """Precision and recall [n] at each detection of one class, best first, at IoU 0.5; VOC devkit's greedy rule.

    A truth is found by the best scored detection that overlaps it most, the others are false. Detections of
    difficult objects are neither right nor wrong, unless `course`: then difficult ones count like all others,
    scores must exceed 0.05 and the overlap exceed 0.5. Raises nothing; no truth gives empty arrays.
    """
    best, overlap = matched
    wanted = truth[:, 1] == label
    total = wanted.sum() if course else (wanted & (truth[:, 2] == 0)).sum()
    rows = np.flatnonzero((found[:, 1] == label) & (found[:, 2] > (COURSE_CONFIDENCE if course else 0)))
    rows = rows[np.argsort(-found[rows, 2], kind="stable")]
    hit = overlap[rows] > 0.5 if course else overlap[rows] >= 0.5
    if not course:
        dropped = hit & (truth[best[rows], 2] == 1) if len(truth) else np.zeros(len(rows), dtype=bool)
        rows, hit = rows[~dropped], hit[~dropped]
    right = np.zeros(len(rows), dtype=bool)
    hits = np.flatnonzero(hit)
    right[hits[np.unique(best[rows[hits]], return_index=True)[1]]] = True
    if not total:
        return np.zeros(0), np.zeros(0)
    true = np.cumsum(right)
    return true / np.arange(1, len(rows) + 1), true / total


def area_under(precision: np.ndarray, recall: np.ndarray, rule: str) -> float:
    """Average precision of one class by `rule`.

    "area": the exact area under the curve made monotonous (VOC 2010 and later). "11 points": the mean of the best
    precision at recall 0, 0.1, ... 1 or beyond (VOC 2007). "course": trapezoids over the raw curve from (0, 1).
    """
    if rule == "11 points":
        return float(np.mean([precision[recall >= level - 1e-9].max(initial=0) for level in np.linspace(0, 1, 11)]))
    if rule == "course":
        return float(np.trapezoid(np.r_[1, precision], np.r_[0, recall]))
    best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(np.r_[0, recall]) * best_beyond))


def class_table(found: np.ndarray, truth: np.ndarray, classes: tuple[str, ...]) -> list[dict]:
    """A row for each class: "class", "objects" (not difficult), "area", "11 points", "course" (NaN without objects)."""
    matched, table = match(found, truth), []
    for label, name in enumerate(classes):
        counted = int(((truth[:, 1] == label) & (truth[:, 2] == 0)).sum())
        there = counted > 0, counted > 0, bool((truth[:, 1] == label).any())
        plain = precision_recall(found, truth, matched, label)
        curves = plain, plain, precision_recall(found, truth, matched, label, course=True)
        rules = ("area", "11 points", "course")
        measured = zip(curves, rules, there, strict=True)
        values = [area_under(*curve, rule) if any_ else np.nan for curve, rule, any_ in measured]
        table.append({"class": name, "objects": counted, **dict(zip(rules, values, strict=True))})
    return table


def mean_average_precision(table: list[dict], rule: str = "area") -> float:
    """Mean of a column of `class_table` over the classes that have objects; 0 where none has."""
    values = [row[rule] for row in table if not np.isnan(row[rule])]
    return float(np.mean(values)) if values else 0.0


def coco_average_precision(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """COCO's AP@.5 and AP@.5:.95, by torchmetrics over faster-coco-eval; difficult objects count as `iscrowd`."""
    metric = MeanAveragePrecision(backend="faster_coco_eval", max_detection_thresholds=[1, 10, 100])
    metric.warn_on_many_detections = False
    images = np.unique(np.r_[found[:, 0], truth[:, 0]])
    found, truth = (rows[np.argsort(rows[:, 0], kind="stable")] for rows in (found, truth))
    for image in images:
        f, t = (rows[slice(*np.searchsorted(rows[:, 0], [image, image + 0.5]))] for rows in (found, truth))
        f, t = torch.from_numpy(f), torch.from_numpy(t)
        metric.update(
            [{"boxes": f[:, 3:] * 1000, "scores": f[:, 2], "labels": f[:, 1].long()}],
            [{"boxes": t[:, 3:] * 1000, "labels": t[:, 1].long(), "iscrowd": t[:, 2].long()}],
        )
    values = metric.compute()
    return {"COCO AP@.5": float(values["map_50"]), "COCO AP@.5:.95": float(values["map"])}


def confusion(found: np.ndarray, truth: np.ndarray, num_classes: int, confidence: float = 0.25) -> np.ndarray:
    """Counts int64 [C + 1, C + 1]: row the true class, column the class found; the last of each is "nothing".

    Each detection above `confidence` claims the object of its image that it overlaps most, whatever its class, if
    that is by IoU 0.5 or more. The best to claim an object has found it; the others count as on nothing, as do those
    without a claim. Difficult objects are left out when not found.
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    found = found[found[:, 2] > confidence]
    found, anything = found[np.argsort(-found[:, 2], kind="stable")], truth.copy()
    anything[:, 1] = 0
    best, overlap = match(np.c_[found[:, :1], np.zeros(len(found)), found[:, 2:]].astype(np.float32), anything)
    hits = np.flatnonzero(overlap >= 0.5)
    first = hits[np.unique(best[hits], return_index=True)[1]]
    np.add.at(counts, (truth[best[first], 1].astype(int), found[first, 1].astype(int)), 1)
    wrong = np.setdiff1d(np.arange(len(found)), first)
    np.add.at(counts, (num_classes, found[wrong, 1].astype(int)), 1)
    missed = np.setdiff1d(np.flatnonzero(truth[:, 2] == 0), best[first])
    np.add.at(counts, (truth[missed, 1].astype(int), num_classes), 1)
    return counts


@dataclass(frozen=True)
class Evaluation:
    """What a detector reaches on the held-out split."""

    accuracies: dict[str, float]  # CellAccuracy.compute()
    precisions: dict[str, float]  # mean average precision by the name of its definition
    table: list[dict]  # class_table
    found: np.ndarray  # DetectionStore's rows
    truth: np.ndarray
