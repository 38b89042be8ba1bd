"""Decode, NMS and every metric, for as many pictures as VOC07 test has."""

import resource
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.baselines import average_precision, detections, float_iou, loop_nms, tensor_iou
from benchmarks.synthetic_inputs import empty_logits, objects, plant
from benchmarks.timing import Row, Stopwatch, milliseconds, threads
from src.config import VOC_CLASSES
from src.model.boxes import cxcywh_to_xyxy, decode
from src.model.network import ANCHORS
from src.training.metrics import (
    MIN_SCORE,
    NMS_IOU,
    CellAccuracy,
    DetectionAccumulator,
    coco_average_precision,
    confusion,
    mean_average_precision,
    per_class_table,
)

IMAGES, BATCH, SUBSET = 4952, 32, 96


def batches(images: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Logits as a fair detector gives them, and targets, a batch at a time."""
    empty, anchors = empty_logits(BATCH), torch.tensor(ANCHORS)
    for first in range(0, images, BATCH):
        count = min(BATCH, images - first)
        targets = objects(count, 3, seed=first)
        logits = [level[:count].clone() for level in empty]
        plant(logits, targets, anchors, seed=first)
        yield logits, targets


def scores(images: int, all_metrics: bool = True) -> tuple[Stopwatch, dict[str, float], float]:
    """Time spent on `images` pictures, what came out, and candidates an image above 0.01 (of the first batch).

    Without `all_metrics`: decode, NMS and VOC's average precision alone.
    """
    cells, store, anchors, clock, candidates = CellAccuracy(), DetectionAccumulator(), torch.tensor(ANCHORS), Stopwatch(), 0.0
    for logits, targets in batches(images):
        with clock:
            if all_metrics:
                cells.update(logits, targets, anchors)
            store.update(logits, targets, torch.zeros(len(targets), dtype=torch.bool), anchors)
        candidates = candidates or (decode(logits, anchors)[1].amax(dim=2) > MIN_SCORE).sum().item() / len(logits[0])
    with clock:
        found, truth = store.compute()
        table = per_class_table(found, truth, VOC_CLASSES)
        values = {column: mean_average_precision(table, column) for column in ("ap", "ap_11pt", "ap_course")}
        if all_metrics:
            values |= {name: float(value) for name, value in cells.compute().items()}
            values |= coco_average_precision(found, truth)
            confusion(found, truth, len(VOC_CLASSES))
    return clock, values, candidates


def obvious_scores(images: int, iou: Callable) -> tuple[Stopwatch, float]:
    """Time and mean average precision (area) by lists and loops; no other metric."""
    anchors, found, truth, first, clock = torch.tensor(ANCHORS), [], [], 0, Stopwatch()
    for logits, targets in batches(images):
        with clock:
            for number, rows in enumerate(detections(logits, anchors, MIN_SCORE)):
                for label, score, *box in loop_nms(rows, NMS_IOU, 100, iou):
                    found.append([first + number, label, score, *(min(max(side, 0), 1) for side in box)])
            for row, box in zip(targets.tolist(), cxcywh_to_xyxy(targets[:, 2:]).tolist(), strict=True):
                truth.append([first + row[0], row[1], 0, *box])
            first += len(logits[0])
    with clock:
        values = [average_precision(found, truth, label, iou) for label in sorted({row[1] for row in truth})]
    return clock, sum(values) / len(values)


def rows() -> Iterator[Row]:
    """The whole split against the clock; an image of it against an image of a subset done by loops."""
    _, subset, candidates = scores(SUBSET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole, _, _ = scores(IMAGES)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    what = f"Evaluation, {IMAGES:,} images, {candidates:.0f} candidates each"
    yield Row(what, f"{whole.wall:.1f} s, {grown:.0f} MB more", "the limit, 60 s", whole.wall / 60, 1, True)
    with threads(1):
        each = scores(5 * SUBSET, all_metrics=False)[0].core / (5 * SUBSET)
    for name, iou, wanted in (("torch", tensor_iou, 20), ("float", float_iou, 0)):
        with threads(1):
            slow, value = obvious_scores(SUBSET, iou)
        if abs(value - subset["ap"]) > 1e-3:
            raise AssertionError(f"the loops find {value:.4f}, the metrics {subset['ap']:.4f}")
        slow = slow.core / SUBSET
        against = f"the same in Python, {name} IoU, {milliseconds(slow)}"
        yield Row("Decode, NMS, VOC mAP of an image, one core", milliseconds(each), against, slow / each, wanted)
