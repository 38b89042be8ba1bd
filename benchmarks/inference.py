"""Prediction and Grad-CAM, compared with the forward pass of the network alone."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.timing import Row, milliseconds, seconds
from src.data.shapes import draw_shapes
from src.model.network import YOLOv3
from src.serving.gradcam import MAX_EXPLAINED, explain
from src.serving.predictor import Predictor

IMAGE_SIZE, IMAGES = 416, 8


def rows() -> Iterator[Row]:
    """Yield all rows: width 1 and 416 pixels on all cores."""
    images = [np.ascontiguousarray(record.image[:375]) for record in draw_shapes(IMAGES, 500)]
    predictor = _responsive_predictor(images)
    image = images[0]
    inputs, _ = predictor.preprocess(image)

    @torch.inference_mode()
    def forward_pass() -> None:
        predictor.fused(inputs)

    ours, forward = seconds(lambda: predictor(image), forward_pass, rounds=5)
    baseline = f"forward pass alone, fused batch norm, {milliseconds(forward)}"
    name = "Predictor, one 500 x 375 image"
    yield Row(name, milliseconds(ours), baseline, ours / forward, 1.1, True)
    yield from _gradcam(predictor, image, forward_pass)


def _responsive_predictor(images: list[np.ndarray]) -> Predictor:
    """Return a predictor of an untrained network with hundreds of detections.

    Batch norm is calibrated, the last layers are random.
    """
    torch.manual_seed(0)
    model = YOLOv3(20, 1.0)
    predictor = Predictor(model, IMAGE_SIZE, device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean over the batches
    with torch.no_grad():
        for head in model.heads:
            head.predict.weight.normal_(std=0.05)
            head.predict.bias.view(3, -1)[:, 0] += 5
        model.train()(torch.cat([predictor.preprocess(image)[0] for image in images[:4]]))
    model.eval()
    return predictor


def _gradcam(
    predictor: Predictor, image: np.ndarray, forward_pass: Callable[[], None]
) -> Iterator[Row]:
    """Measure Grad-CAM with its detections: of the best, and of the maximum number of them.

    Each heatmap costs a backward pass from the heads to stage 3.
    """
    scores = predictor(image, confidence=0.01).scores
    confidence = float(scores[MAX_EXPLAINED - 1] + scores[MAX_EXPLAINED]) / 2
    best, everything, forward = seconds(
        lambda: explain(predictor, image, 0),
        lambda: explain(predictor, image, confidence=confidence),
        forward_pass,
        rounds=3,
    )
    baseline = f"forward pass alone, fused batch norm, {milliseconds(forward)}"
    yield Row("Grad-CAM, best detection", milliseconds(best), baseline, best / forward, 3.5, True)
    name = f"Grad-CAM, {MAX_EXPLAINED} detections (the maximum)"
    yield Row(name, milliseconds(everything), baseline, everything / forward)
