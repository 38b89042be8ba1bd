"""Decoding, NMS and all metrics for as many images as VOC2007 test has."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.baselines import average_precision, detections, float_iou, loop_nms, tensor_iou
from benchmarks.peers.serve import peak_memory, reset_peak_memory
from benchmarks.synthetic_inputs import background_logits, plant, random_objects
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
    """Batches of logits of a mediocre detector, and their targets."""
    background, anchors = background_logits(BATCH), torch.tensor(ANCHORS)
    for first in range(0, images, BATCH):
        count = min(BATCH, images - first)
        targets = random_objects(count, 3, seed=first)
        logits = [level[:count].clone() for level in background]
        plant(logits, targets, anchors, seed=first)
        yield logits, targets


def evaluate(images: int, all_metrics: bool = True) -> tuple[Stopwatch, dict[str, float], float]:
    """Measure the evaluation of `images` images: time, metrics, and candidates per image above 0.01 (of the first batch).

    all_metrics False: decoding, NMS and VOC's average precision only.
    """
    cells, store, anchors, clock, candidates = (
        CellAccuracy(),
        DetectionAccumulator(),
        torch.tensor(ANCHORS),
        Stopwatch(),
        0.0,
    )
    for logits, targets in batches(images):
        with clock:
            if all_metrics:
                cells.update(logits, targets, anchors)
            store.update(logits, targets, torch.zeros(len(targets), dtype=torch.bool), anchors)
        candidates = candidates or (
            decode(logits, anchors)[1].amax(dim=2) > MIN_SCORE
        ).sum().item() / len(logits[0])
    with clock:
        predictions, ground_truth = store.compute()
        table = per_class_table(predictions, ground_truth, VOC_CLASSES)
        values = {
            column: mean_average_precision(table, column)
            for column in ("ap", "ap_11pt", "ap_course")
        }
        if all_metrics:
            values |= {name: float(value) for name, value in cells.compute().items()}
            values |= coco_average_precision(predictions, ground_truth)
            confusion(predictions, ground_truth, len(VOC_CLASSES))
    return clock, values, candidates


def evaluate_by_loops(images: int, iou: Callable) -> tuple[Stopwatch, float]:
    """Measure the baseline, lists and loops: time and mean average precision (area); no other metric."""
    anchors, predictions, ground_truth, first, clock = torch.tensor(ANCHORS), [], [], 0, Stopwatch()
    for logits, targets in batches(images):
        with clock:
            for number, rows in enumerate(detections(logits, anchors, MIN_SCORE)):
                for label, score, *box in loop_nms(rows, NMS_IOU, 100, iou):
                    predictions.append(
                        [first + number, label, score, *(min(max(x, 0), 1) for x in box)]
                    )
            for row, box in zip(
                targets.tolist(), cxcywh_to_xyxy(targets[:, 2:]).tolist(), strict=True
            ):
                ground_truth.append([first + row[0], row[1], 0, *box])
            first += len(logits[0])
    with clock:
        labels = sorted({row[1] for row in ground_truth})
        values = [average_precision(predictions, ground_truth, label, iou) for label in labels]
    return clock, sum(values) / len(values)


def rows() -> Iterator[Row]:
    """Yield the time of the whole split, and the time per image against loops on a subset."""
    _, subset, candidates = evaluate(SUBSET)
    before = reset_peak_memory()
    whole, _, _ = evaluate(IMAGES)
    growth = peak_memory() - before
    name = f"Evaluation, {IMAGES:,} images, {candidates:.0f} candidates each"
    yield Row(
        name, f"{whole.wall:.1f} s, {growth:.0f} MB more", "limit of 60 s", whole.wall / 60, 1, True
    )
    with threads(1):
        ours = evaluate(SUBSET, all_metrics=False)[0].core / SUBSET
    for kind, iou, target in (("torch", tensor_iou, 20), ("float", float_iou, 0)):
        with threads(1):
            clock, value = evaluate_by_loops(SUBSET, iou)
        if abs(value - subset["ap"]) > 1e-3:
            raise AssertionError(
                f"The loops compute a mAP of {value:.4f}, the metrics {subset['ap']:.4f}."
            )
        loops = clock.core / SUBSET
        baseline = f"Python loops, {kind} IoU, {milliseconds(loops)}"
        yield Row(
            "Decode, NMS and VOC mAP per image, one core",
            milliseconds(ours),
            baseline,
            loops / ours,
            target,
        )
