"""One picture asked for, many asked for, one explained: each against the bare network."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.timing import Row, milliseconds, seconds
from src.data.shapes import draw_shapes
from src.model.network import YOLOv3
from src.serving.gradcam import MAX_EXPLAINED, explain
from src.serving.predictor import Predictor

SIDE, MANY = 416, 8


def rows() -> Iterator[Row]:
    """At width 1 and 416, on all cores."""
    pictures = [np.ascontiguousarray(record.image[:375]) for record in draw_shapes(MANY, 500)]
    predictor = _awake(pictures)
    picture = pictures[0]
    inputs, _ = predictor.preprocess(picture)

    @torch.inference_mode()
    def bare() -> None:
        predictor.model(inputs)

    ask, forward = seconds(lambda: predictor(picture), bare, rounds=5)
    against = f"bare forward pass, {milliseconds(forward)}"
    yield Row("Predictor, a 500 x 375 picture", milliseconds(ask), against, ask / forward, 1.1, True)
    yield from _heatmap(predictor, picture, bare)
    half = Predictor(copy.deepcopy(predictor.model).bfloat16(), SIDE, device="cpu")
    ways = lambda: [predictor(p) for p in pictures], lambda: predictor.batch(pictures), lambda: half.batch(pictures)
    one, many, fast = seconds(*ways, rounds=2)
    against = f"one at a time, {MANY / one:.2f} pictures/s"
    yield Row(f"Predictor, batches of {MANY}", f"{MANY / many:.2f} pictures/s", against, one / many)
    yield Row(f"Predictor, batches of {MANY}, bfloat16", f"{MANY / fast:.2f} pictures/s", against, one / fast)


def _awake(pictures: list[np.ndarray]) -> Predictor:
    """Untrained, but hundreds of its cells say something: batch norm has seen pictures, the last layers are random."""
    torch.manual_seed(0)
    model = YOLOv3(20, 1.0)
    predictor = Predictor(model, SIDE, device="cpu")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain mean of what it sees
    with torch.no_grad():
        for head in model.heads:
            head.predict.weight.normal_(std=0.05)
            head.predict.bias.view(3, -1)[:, 0] += 5
        model.train()(torch.cat([predictor.preprocess(picture)[0] for picture in pictures[:4]]))
    model.eval()
    return predictor


def _heatmap(predictor: Predictor, picture: np.ndarray, bare: Callable[[], None]) -> Iterator[Row]:
    """Grad-CAM with its detections: of the best one, and of as many as get a map each."""
    scores = predictor(picture, confidence=0.01).scores
    least = float(scores[MAX_EXPLAINED - 1] + scores[MAX_EXPLAINED]) / 2
    found = Counter(np.searchsorted((507, 2535), predictor(picture, least).index, side="right").tolist())
    best, everything, forward = seconds(
        lambda: explain(predictor, picture, 0), lambda: explain(predictor, picture, confidence=least), bare, rounds=3
    )
    against = f"bare forward pass, {milliseconds(forward)}"
    yield Row("Grad-CAM, the best detection", milliseconds(best), against, best / forward, 3.5, True)
    what = f"Grad-CAM, {found.total()} detections (the most) on {len(found)} of 3 scales"
    yield Row(what, milliseconds(everything), against, everything / forward, 3.5, True)
