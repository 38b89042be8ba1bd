"""A visitor's image: one forward pass, then any number of detections and heatmaps from it."""

import html
import os
import time
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from src.serving.drawing import class_colours, draw_detections, draw_explanation
from src.serving.gradcam import Explainer, Explanation
from src.serving.images import load_image, resize_long_side
from src.serving.predict import detections_to_dicts
from src.serving.predictor import Detections, Predictor

MAX_PIXELS = 50_000_000
VIEW_SIZE = 480, 1024  # smallest and largest long side of a displayed image, in pixels
ALL_DETECTIONS = ("All detections", "all")
BRIGHT_AREAS = (
    "Bright areas are the pixels that are enough for the score: with only these, and the rest of "
    "the image blurred, the detection would remain. They show what the network looks at, not "
    "whether it is right."
)


@dataclass
class ImageSession:
    """A visitor's image after its one forward pass."""

    explainer: Explainer
    view: np.ndarray  # uint8 [h, w, 3], the image as displayed
    seconds: float  # for reading the file and the forward pass
    last: dict[tuple, Explanation] = field(default_factory=dict)  # settings -> the last heatmap

    @property
    def classes(self) -> list[str]:
        """The class names of the model."""
        return self.explainer.predictor.classes

    def detections(self, confidence: float, iou_threshold: float) -> Detections:
        """Return the detections, boxes in pixels of the original image."""
        return self.explainer.candidates.detections(confidence, iou_threshold)

    def row(self, prediction: int, confidence: float, iou_threshold: float) -> int | str:
        """Return the row of the detection that is this prediction of the network.

        Returns "all" if it is not detected at these thresholds.
        """
        rows = np.flatnonzero(self.detections(confidence, iou_threshold).index == prediction)
        return int(rows[0]) if len(rows) else "all"

    def explain(self, target: str | int, layers: str, method: str, *thresholds) -> Explanation:
        """Compute a heatmap [h, w] on the view. The last one is kept, for other opacities.

        target: "all", a class name, or the index of one of the network's predictions.
        """
        settings = (target, layers, method, *thresholds)
        if settings not in self.last:
            if isinstance(target, int):
                target = self.row(target, *thresholds)
            result = self.explainer.explain(target, layers, method, *thresholds)
            heatmap = resize_long_side(result.heatmap, max(self.view.shape))
            self.last = {settings: replace(result, heatmap=heatmap)}
        return self.last[settings]

    def scale_to_view(self, detections: Detections) -> Detections:
        """Convert boxes from pixels of the original image to pixels of the view."""
        scale = np.divide(self.view.shape[1::-1], self.explainer.size).astype(np.float32)
        return replace(detections, boxes=detections.boxes * np.tile(scale, 2))


def analyze_image(predictor: Predictor, path: str | os.PathLike) -> ImageSession:
    """Read a visitor's file and run the forward pass.

    Raises ValueError with a message for the visitor.
    """
    start = time.perf_counter()
    try:
        image = load_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "This file")) from None
    explainer = Explainer(predictor, image)
    seconds = time.perf_counter() - start
    view = resize_long_side(image, int(np.clip(max(image.shape), *VIEW_SIZE)))
    return ImageSession(explainer, view, seconds)


def detect(
    predictor: Predictor, path: str | os.PathLike, confidence: float, iou_threshold: float
) -> dict:
    """Return the answer of the endpoint /detect: the image's size, and its detections."""
    session = analyze_image(predictor, path)
    detections = session.detections(confidence, iou_threshold)
    width, height = session.explainer.size
    return {
        "width": width,
        "height": height,
        "seconds": round(session.seconds, 3),
        "detections": detections_to_dicts(detections, predictor.classes),
    }


def render_detections(
    session: ImageSession, confidence: float, iou_threshold: float
) -> tuple[np.ndarray, str, list[list], list[tuple]]:
    """Return the view with boxes, the summary, the table's rows and the targets to explain."""
    detections = session.detections(confidence, iou_threshold)
    drawn = draw_detections(session.view, session.scale_to_view(detections), session.classes)
    return drawn, _summary(session, len(detections)), *_table_and_targets(session, detections)


def _summary(session: ImageSession, count: int) -> str:
    title = f"{count} detection{'s' * (count != 1)}"
    if not count:
        title = "No detections. Lower the confidence threshold."
    width, height = session.explainer.size
    size = f"{width} &times; {height} pixels"
    return f"<b>{title}</b> &middot; {session.seconds:.2f} s &middot; {size}"


def _table_and_targets(
    session: ImageSession, detections: Detections
) -> tuple[list[list], list[tuple]]:
    """Return the table's rows, and the choices (text, value) of what to explain."""
    classes = session.classes
    colours = class_colours(len(classes))
    counts = Counter(classes[label] for label in detections.labels)
    targets = [ALL_DETECTIONS]
    targets += [(f"Class {name} ({count})", name) for name, count in counts.items()]
    table = []
    for row, label in enumerate(detections.labels):
        name, score = classes[label], detections.scores[row]
        square = f'<span style="color:rgb{colours[label]}">&#9632;</span>'
        box = ", ".join(f"{edge:.0f}" for edge in detections.boxes[row])
        table.append([row + 1, f"{square} {html.escape(name)}", f"{100 * score:.1f}%", box])
        targets.append((f"{row + 1}: {name}, {100 * score:.0f}%", int(detections.index[row])))
    return table, targets


def render_heatmap(
    session: ImageSession,
    target: str | int,
    layers: str,
    method: str,
    opacity: float,
    confidence: float,
    iou_threshold: float,
) -> tuple[np.ndarray, str]:
    """Return the view with the heatmap and the explained boxes, and a message.

    target, layers, method: see `ImageSession.explain`. opacity: see `draw_heatmap`.
    """
    result = session.explain(target, layers, method, confidence, iou_threshold)
    on_view = replace(result, detections=session.scale_to_view(result.detections))
    drawn = draw_explanation(session.view, on_view, session.classes, opacity)
    return drawn, html.escape(result.message) or BRIGHT_AREAS
