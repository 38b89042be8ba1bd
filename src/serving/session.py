"""What the page shows: detections and heatmaps of a visitor's image, facts about the model."""

import html
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from src.model.network import YOLOv3
from src.model.pretrained import format_metadata
from src.serving.drawing import class_colour, draw_detections, draw_explanation
from src.serving.gradcam import Explainer, Explanation
from src.serving.images import LICENSES, load_image, resize_long_side
from src.serving.predictor import Detections, Predictor

ALL_DETECTIONS = ("All detections", "all")
BRIGHT_AREAS = (
    "Bright areas are the evidence for the score. With the default method, LayerCAM, this was "
    "tested: if only the brightest quarter of the image stays sharp, most of the score remains. "
    "They show what the network looks at, not whether it is right."
)
LICENSE_TEXTS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
}
CREDIT = re.compile(  # an entry of LICENSES.txt
    r"^(\S.*?)(?:  .*)?\n(?:  .*\n)*?  author: (.+)\n  licence: (.+)\n  source: (.+)", re.M
)
FACTS = {  # metadata of the weights -> what a visitor reads
    "data": "Training data",
    "epochs": "Training epochs",
    "mAP50": "Mean average precision (mAP)",
    "class accuracy": "Objects with the right class",
    "object accuracy": "Objects recognized as objects",
    "no-object accuracy": "Background recognized as background",
}


@dataclass
class ImageSession:
    """A visitor's image after its one forward pass."""

    explainer: Explainer
    view: np.ndarray  # uint8 [h, w, 3], the image as displayed

    def detections(self, confidence: float, iou_threshold: float) -> Detections:
        """Return the detections, boxes in pixels of the original image."""
        return self.explainer.candidates.detections(confidence, iou_threshold)

    def explain(self, target: str | int, layers: str, method: str, *thresholds) -> Explanation:
        """Compute a heatmap [h, w] on the view.

        target: "all", a class name, or the index of one of the network's predictions, which is
            replaced by "all" if it is not detected at these thresholds.
        """
        if isinstance(target, int):
            rows = self.detections(*thresholds).index.tolist()
            target = rows.index(target) if target in rows else "all"
        result = self.explainer.explain(target, layers, method, *thresholds)
        return replace(result, heatmap=resize_long_side(result.heatmap, max(self.view.shape)))

    def scale_to_view(self, detections: Detections) -> Detections:
        """Convert boxes from pixels of the original image to pixels of the view."""
        scale = np.divide(self.view.shape[1::-1], self.explainer.size).astype(np.float32)
        return replace(detections, boxes=detections.boxes * np.tile(scale, 2))


def analyze_image(predictor: Predictor, path: str | Path) -> ImageSession:
    """Read a visitor's file and run the forward pass.

    Raises ValueError with a message for the visitor.
    """
    try:
        image = load_image(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "This file")) from None
    view = resize_long_side(image, int(np.clip(max(image.shape), 480, 1024)))
    return ImageSession(Explainer(predictor, image), view)


def render_detections(
    session: ImageSession, confidence: float, iou_threshold: float
) -> tuple[np.ndarray, str, list[list], list[tuple]]:
    """Return the view with boxes, the summary, the table's rows and the targets to explain."""
    detections = session.detections(confidence, iou_threshold)
    classes = session.explainer.predictor.classes
    names = [classes[label] for label in detections.labels]
    targets = [ALL_DETECTIONS, *((f"Class {name}", name) for name in dict.fromkeys(names))]
    table = []
    for row, name in enumerate(names):
        score = f"{100 * detections.scores[row]:.1f}%"
        colour = class_colour(detections.labels[row])
        square = f'<span style="color:rgb{colour}">&#9632;</span>'
        box = ", ".join(f"{edge:.0f}" for edge in detections.boxes[row])
        table.append([row + 1, f"{square} {html.escape(name)}", score, box])
        targets.append((f"{row + 1}: {name}, {score}", int(detections.index[row])))
    drawn = draw_detections(session.view, session.scale_to_view(detections), classes)
    size = " &times; ".join(map(str, session.explainer.size))
    count = f"Detections: {len(detections) or 'none. Lower the confidence threshold.'}"
    return drawn, f"<b>{count}</b> &middot; {size} pixels", table, targets


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
    drawn = draw_explanation(session.view, on_view, session.explainer.predictor.classes, opacity)
    return drawn, html.escape(result.message) or BRIGHT_AREAS


def model_facts_html(model: YOLOv3, links: dict[str, str]) -> str:
    """List the model's classes, metadata, metrics and links (text -> address)."""
    metadata = format_metadata(model.metadata)
    facts = {FACTS.get(name, name.capitalize()): value for name, value in metadata.items()}
    facts["Parameters"] = f"{model.num_parameters / 1e6:.1f} million"
    chips = "".join(
        f'<span class="chip"><i style="background:rgb{class_colour(label)}"></i>'
        f"{html.escape(name)}</span>"
        for label, name in enumerate(model.classes)
    )
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )
    anchors = " &middot; ".join(_link(text, address) for text, address in links.items())
    return (
        f'<section id="model"><h2>Classes</h2><p>{chips}</p><h2>Model</h2><dl>{rows}</dl>'
        f'<p class="links">{anchors}</p></section>'
    )


def credits_html(samples: str | Path) -> str:
    """Name the authors of the example images, by licence, with links to sources and licences.

    They are read from LICENSES.txt in the images' folder, if it has one. An entry starts with the
    file's name, ended by two spaces or the line; the lines "  author: ...", "  licence: ..." and
    "  source: ..." follow.
    """
    path = Path(samples, LICENSES)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    credits = {}
    for name, author, licence, source in sorted(CREDIT.findall(text)):
        if Path(samples, name).is_file():
            credits.setdefault(licence, []).append(_link(f"{Path(name).stem} by {author}", source))
    return "".join(
        f"<p>{_link(licence, LICENSE_TEXTS.get(licence, ''))}: {', '.join(links)}</p>"
        for licence, links in sorted(credits.items())
    )


def _link(text: str, address: str) -> str:
    """Return an HTML link, or only the text if the address is none, such as "(none named)"."""
    if not address.startswith(("https://", "http://")):
        return html.escape(text)
    return (
        f'<a href="{html.escape(address)}" target="_blank" rel="noopener">{html.escape(text)}</a>'
    )
