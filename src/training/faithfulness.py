"""Insertion and deletion: does a heatmap mark the pixels that a detection's score depends on?

Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421, for detectors 2021,
https://arxiv.org/abs/2006.03204.
"""

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

from src.serving.predictor import Detections, Predictor

FRACTIONS = (0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.40)  # of the pixels
BLUR = 20 / 320  # sigma of the Gaussian blur per pixel of the image's long side
SAME_OBJECT = 0.5  # IoU with the detection's box


def insertion_deletion(
    predictor: Predictor, image: np.ndarray, detections: Detections, row: int, heatmap: np.ndarray
) -> tuple[float, float]:
    """Measure the heatmap [H, W] of one of the detections in an image, uint8 [H, W, 3].

    Insertion: the pixels that the heatmap ranks highest replace those of a blurred copy. High is
    good: these pixels are enough for the score. Deletion: the blurred pixels replace them. Low is
    good: without these pixels there is no such score. Both are the mean over FRACTIONS of the
    detection's score divided by its score on the whole image.
    """
    box, label = detections.boxes[row], detections.labels[row]
    blurred = cv2.GaussianBlur(image, (0, 0), BLUR * max(image.shape))
    order = np.argsort(-heatmap, axis=None, kind="stable")
    rank = np.argsort(order).reshape(*heatmap.shape, 1)  # [H, W, 1], 0: the highest
    inserted, deleted = [], []
    for fraction in FRACTIONS:
        marked = rank < round(fraction * heatmap.size)  # [H, W, 1]
        inserted.append(score(predictor, np.where(marked, image, blurred), box, label))
        deleted.append(score(predictor, np.where(marked, blurred, image), box, label))
    whole = score(predictor, image, box, label)
    return float(np.mean(inserted)) / whole, float(np.mean(deleted)) / whole


def score(predictor: Predictor, image: np.ndarray, box: np.ndarray, label: int) -> float:
    """Return the best score for a class among the predictions at a box [4], xyxy in pixels."""
    candidates = predictor.candidates(image)
    boxes = candidates.boxes.clamp(min=0).minimum(torch.tensor(candidates.size * 2))  # as `box` is
    overlap = box_iou(boxes, torch.from_numpy(box)[None])[:, 0]  # [k]
    scores = candidates.scores[overlap >= SAME_OBJECT, label]
    return float(scores.max()) if len(scores) else 0.0
