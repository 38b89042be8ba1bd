"""The Gradio app: upload an image, see its detections and their Grad-CAM heatmaps. Used by the notebook and the Space."""

import html
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import gradio as gr
import numpy as np
from gradio_client.utils import is_file_obj
from starlette.middleware import Middleware

from src.model.network import format_metadata
from src.serving.drawing import class_colours, draw_detections, draw_heatmap
from src.serving.gradcam import METHOD_NAMES, Explainer, Explanation
from src.serving.guard import MAX_UPLOAD_BYTES, NOT_UPLOADED, BoundedRequests, GuardedBlocks
from src.serving.images import load_image, resize_long_side
from src.serving.predict import detections_to_dicts
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Detections, Predictor

MAX_PIXELS = 50_000_000
SESSION_TTL_S = 3600  # how long a visitor's image is kept
VIEW_SIZE = 480, 1024  # smallest and largest long side of a displayed image, in pixels
IMAGE_HEIGHT = 360  # of each of the three image panels, in CSS pixels
ALL_DETECTIONS = ("All detections", "all")
LAYERS = [
    ("The detection's own scale", "own"),
    ("Mean of all scales", "all"),
    ("Stride 32 (large objects)", 0),
    ("Stride 16 (medium objects)", 1),
    ("Stride 8 (small objects)", 2),
]
METADATA_NAMES = {
    "data": "Training data",
    "epochs": "Epochs",
    "mAP50": "mAP at IoU 0.5",
    "weights": "Weights",
}
SERIALIZED = {
    "concurrency_id": "model",
    "concurrency_limit": 1,
}  # one forward pass at a time, in order of arrival
LATEST_ONLY = {"trigger_mode": "always_last", "api_visibility": "private"}
INTRODUCTION = "Upload an image. YOLOv3 detects the objects in it, and Grad-CAM shows the evidence for each detection."
HINT = "Upload an image."
NO_IMAGE = f"Upload an image first. Images are kept for {SESSION_TTL_S // 60} minutes."
CSS = (Path(__file__).parent / "app.css").read_text(encoding="utf-8")
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.sky,
    neutral_hue=gr.themes.colors.slate,
    radius_size="md",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(body_text_color_subdued="*neutral_500", block_label_text_color="*neutral_600")
logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio's requests to its own server


@dataclass
class ImageSession:
    """A visitor's image after its one forward pass."""

    explainer: Explainer
    view: np.ndarray  # uint8 [h, w, 3], the image as displayed
    seconds: float  # for reading the file and the forward pass

    def detections(self, confidence: float, iou_threshold: float) -> Detections:
        """Return the detections, boxes in pixels of the original image."""
        return self.explainer.candidates.detections(confidence, iou_threshold)

    def row(self, prediction: int, confidence: float, iou_threshold: float) -> int | str:
        """Return the row of the detection that is this prediction of the network, "all" if it is not detected."""
        rows = np.flatnonzero(self.detections(confidence, iou_threshold).index == prediction)
        return int(rows[0]) if len(rows) else "all"

    @cached_property
    def explain(self):
        """`Explainer.explain` in the size of the view; the last result is kept, for other opacities."""

        @lru_cache(maxsize=1)
        def explain(
            target: str | int, layer: str | int, method: str, *thresholds: float
        ) -> Explanation:
            if isinstance(target, int):
                target = self.row(target, *thresholds)
            result = self.explainer.explain(target, layer, method, *thresholds)
            return replace(result, heatmap=resize_long_side(result.heatmap, max(self.view.shape)))

        return explain

    def scale_to_view(self, detections: Detections) -> Detections:
        """Convert boxes from pixels of the original image to pixels of the view."""
        scale = np.divide(self.view.shape[1::-1], self.explainer.size).astype(np.float32)
        return replace(detections, boxes=detections.boxes * np.tile(scale, 2))


class Page(GuardedBlocks):
    """Blocks that launch with the app's style and limits; each argument of `launch` can be overridden."""

    def launch(self, **options):
        defaults = {
            "theme": THEME,
            "head": f"<style>{CSS}</style>",
            "footer_links": ["api"],
            "ssr_mode": False,
            "max_file_size": MAX_UPLOAD_BYTES,
            "state_session_capacity": 64,
            "enable_monitoring": False,
            "app_kwargs": {"middleware": [Middleware(BoundedRequests)]},
        }
        return super().launch(**(defaults | options))


def analyze_image(predictor: Predictor, path: str | os.PathLike) -> ImageSession:
    """Read a visitor's file and run the forward pass. Raises ValueError with a message for the visitor."""
    start = time.perf_counter()
    try:
        image = load_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "This file")) from None
    explainer = Explainer(predictor, image)
    seconds = time.perf_counter() - start
    return ImageSession(
        explainer, resize_long_side(image, int(np.clip(max(image.shape), *VIEW_SIZE))), seconds
    )


def detect(
    predictor: Predictor, path: str | os.PathLike, confidence: float, iou_threshold: float
) -> dict:
    """Return the answer of the endpoint /detect: image size and detections, in pixels of the image, best first."""
    session = analyze_image(predictor, path)
    detections = session.detections(confidence, iou_threshold)
    width, height = session.explainer.size
    rows = detections_to_dicts(detections, predictor.classes)
    return {
        "width": width,
        "height": height,
        "seconds": round(session.seconds, 3),
        "detections": rows,
    }


def render_detections(
    session: ImageSession, confidence: float, iou_threshold: float
) -> tuple[np.ndarray, str, list[list], list[tuple]]:
    """Return the view with boxes, the summary, the table's rows and the choices of the explanation's target."""
    classes, detections = (
        session.explainer.predictor.classes,
        session.detections(confidence, iou_threshold),
    )
    colours = class_colours(len(classes))
    table, single = [], []
    for row, (label, score, box) in enumerate(
        zip(detections.labels, detections.scores, detections.boxes, strict=True)
    ):
        name = (
            f'<span style="color:rgb{colours[label]}">&#9632;</span> {html.escape(classes[label])}'
        )
        table.append(
            [row + 1, name, f"{100 * score:.1f}%", ", ".join(f"{edge:.0f}" for edge in box)]
        )
        single.append(
            (f"{row + 1}: {classes[label]}, {100 * score:.0f}%", int(detections.index[row]))
        )
    counts = Counter(classes[label] for label in detections.labels)
    choices = [
        ALL_DETECTIONS,
        *((f"Class {name} ({count})", name) for name, count in counts.items()),
        *single,
    ]
    n, (width, height) = len(detections), session.explainer.size
    title = (
        f"{n} detection{'s' * (n != 1)}" if n else "No detections. Lower the confidence threshold."
    )
    summary = (
        f"<b>{title}</b> &middot; {session.seconds:.2f} s &middot; {width} &times; {height} pixels"
    )
    return (
        draw_detections(session.view, session.scale_to_view(detections), classes),
        summary,
        table,
        choices,
    )


def render_heatmap(
    session: ImageSession,
    target: str | int,
    layer: str | int,
    method: str,
    opacity: float,
    confidence: float,
    iou_threshold: float,
) -> tuple[np.ndarray, str]:
    """Return the view with the heatmap and the explained boxes, and a message; target as in the choices of the page."""
    classes = session.explainer.predictor.classes
    result = session.explain(target, layer, method, confidence, iou_threshold)
    image = draw_heatmap(session.view, result.heatmap, opacity)
    detections = session.scale_to_view(result.detections)
    image = draw_detections(
        image, detections, classes, labels=result.is_candidate, rows=result.explained
    )
    return image, html.escape(
        result.message
    ) or "Bright areas raise the scores of the outlined detections."


def model_facts_html(predictor: Predictor, links: dict[str, str]) -> str:
    """List the model's classes, metadata, metrics and links."""
    facts = {
        METADATA_NAMES.get(name, name): value
        for name, value in format_metadata(predictor.model.metadata).items()
    }
    facts["Parameters"] = f"{predictor.model.num_parameters / 1e6:.1f} million"
    facts["Input"] = f"{predictor.image_size} x {predictor.image_size} pixels"
    rows = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd></div>"
        for key, value in facts.items()
    )
    chips = "".join(
        f'<span class="chip"><i style="background:rgb{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(
            predictor.classes, class_colours(len(predictor.classes)), strict=True
        )
    )
    anchors = " &middot; ".join(
        f'<a href="{html.escape(url, quote=True)}" target="_blank" rel="noopener">{html.escape(name)}</a>'
        for name, url in links.items()
    )
    return (
        f'<section id="model"><h2>Classes</h2><p>{chips}</p><h2>Model</h2><dl>{rows}</dl>'
        f'<p class="links">{anchors}</p></section>'
    )


def build_app(
    source: Predictor | str | Path,
    samples: Sequence[str | Path] = (),
    links: dict[str, str] | None = None,
    title: str = "YOLOv3 object detection with Grad-CAM",
) -> gr.Blocks:
    """Build the app for a predictor, or for weights in a folder or on the Hub; `.launch()` starts it.

    samples: example images. links: text -> address, for example of the model or the code.
    Programs use the endpoint /detect(image, confidence, iou_threshold).
    """
    predictor = source if isinstance(source, Predictor) else Predictor.load(source)
    with Page(
        title=title, analytics_enabled=False, delete_cache=(SESSION_TTL_S, SESSION_TTL_S)
    ) as page:
        gr.HTML(f"<h1>{html.escape(title)}</h1><p>{INTRODUCTION}</p>", padding=False, elem_id="top")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                image = _image_column(samples)
            with gr.Column(min_width=320):
                detections, thresholds = _detections_column()
            with gr.Column(min_width=320):
                explanation, choices = _explanation_column()
        gr.HTML(model_facts_html(predictor, links or {}), padding=False)
        _connect(predictor, image, detections, thresholds, explanation, choices)
        gr.api(_endpoint(predictor), api_name="detect", **SERIALIZED)
    return page.queue(max_size=200, api_open=False)  # every request goes through the queue


def _image_column(samples: Sequence[str | Path]) -> gr.Image:
    image = gr.Image(
        label="Image",
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        height=IMAGE_HEIGHT,
        elem_id="image",
    )
    if samples:
        gr.Examples(
            [[str(path)] for path in samples], image, label="Example images", elem_id="samples"
        )
    return image


def _output_image(label: str, elem_id: str) -> gr.Image:
    return gr.Image(
        label=label,
        interactive=False,
        height=IMAGE_HEIGHT,
        format="jpeg",
        elem_id=elem_id,
        buttons=["download", "fullscreen"],
    )


def _detections_column() -> tuple[list, list]:
    """Return [image, summary, table] and [confidence, iou_threshold]."""
    image, summary = (
        _output_image("Detections", "detections"),
        gr.HTML(HINT, padding=False, elem_id="summary"),
    )
    with gr.Group():
        confidence = gr.Slider(
            0.01, 0.95, CONFIDENCE, step=0.01, label="Confidence threshold", elem_id="confidence"
        )
        iou_threshold = gr.Slider(
            0.05, 0.95, IOU_THRESHOLD, step=0.05, label="NMS IoU threshold", elem_id="iou_threshold"
        )
    table = gr.Dataframe(
        headers=["#", "Class", "Score", "x1, y1, x2, y2"],
        datatype=["number", "html", "str", "str"],
        column_widths=["11%", "28%", "18%", "43%"],
        wrap=True,
        max_height=260,
        interactive=False,
        buttons=[],
        label="Click a row to explain it",
        elem_id="table",
    )
    return [image, summary, table], [confidence, iou_threshold]


def _explanation_column() -> tuple[list, list]:
    """Return [image, message] and [target, layer, method, opacity]."""
    image, message = (
        _output_image("Explanation", "heatmap"),
        gr.HTML(padding=False, elem_id="message"),
    )
    with gr.Group():
        target = gr.Dropdown([ALL_DETECTIONS], value="all", label="Explain", elem_id="target")
        layer = gr.Dropdown(LAYERS, value="own", label="Target layer", elem_id="layer")
        methods = [(name, method) for method, name in METHOD_NAMES.items()]
        method = gr.Dropdown(methods, value=methods[0][1], label="CAM method", elem_id="method")
        opacity = gr.Slider(0, 1, 0.7, step=0.05, label="Heatmap opacity", elem_id="opacity")
    return [image, message], [target, layer, method, opacity]


def _endpoint(predictor: Predictor):
    """Return the function behind /detect; its docstring is part of the page's API documentation."""

    def detect_file(
        image: gr.FileData, confidence: float = CONFIDENCE, iou_threshold: float = IOU_THRESHOLD
    ) -> dict:
        """Detect objects in an image: class, confidence and box (left, top, right, bottom in pixels), best first.

        In Python: from gradio_client import handle_file, then image=handle_file("photo.jpg").
        """
        if not is_file_obj(image):
            raise gr.Error(NOT_UPLOADED, print_exception=False)
        try:
            return detect(predictor, image["path"], confidence, iou_threshold)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return detect_file


def on_threshold_change(
    session: ImageSession | None, selected: str | int, confidence: float, iou_threshold: float
) -> tuple:
    """Answer with image, summary, table and targets of the detections at other thresholds; keep the target if it remains."""
    if session is None:
        return gr.skip(), NO_IMAGE, gr.skip(), gr.skip()
    drawn, summary, table, options = render_detections(session, confidence, iou_threshold)
    selected = selected if selected in [value for _, value in options] else "all"
    return drawn, summary, table, gr.Dropdown(options, value=selected)


def on_row_select(
    session: ImageSession | None, confidence: float, iou_threshold: float, event: gr.SelectData
) -> int | str:
    """Answer with the target of a table row."""
    row = int(event.row_value[0]) - 1
    predictions = session.detections(confidence, iou_threshold).index if session else ()
    return int(predictions[row]) if row < len(predictions) else "all"


def explain(session: ImageSession | None, *settings) -> tuple:
    """Answer with heatmap and message; settings as in `render_heatmap`."""
    if session is None:
        return gr.skip(), NO_IMAGE
    try:
        return render_heatmap(session, *settings)
    except ValueError as error:  # an .onnx file has no Grad-CAM
        return None, html.escape(str(error))


def _connect(
    predictor: Predictor,
    image: gr.Image,
    detections: list,
    thresholds: list,
    explanation: list,
    choices: list,
) -> None:
    """Connect the events. An upload costs one forward pass; the other events use the ImageSession it leaves in `state`."""
    state, target = gr.State(time_to_live=SESSION_TTL_S), choices[0]

    def on_upload(file: dict | None, *limits):
        """file: as the page sends it, not preprocessed, so that load_image reports unreadable files."""
        session, summary = None, HINT
        try:
            session = analyze_image(predictor, file["path"]) if file else None
        except ValueError as error:
            gr.Warning(str(error))
            summary = f'<div class="error-message" role="alert">{html.escape(str(error))}</div>'
        if session is None:
            return None, None, summary, [], gr.Dropdown([ALL_DETECTIONS], value="all"), None, ""
        drawn, summary, table, options = render_detections(session, *limits)
        return (
            session,
            drawn,
            summary,
            table,
            gr.Dropdown(options, value="all"),
            gr.skip(),
            gr.skip(),
        )

    heatmap = {
        "fn": explain,
        "inputs": [state, *choices, *thresholds],
        "outputs": explanation,
        **SERIALIZED,
        **LATEST_ONLY,
    }
    image.change(
        on_upload,
        [image, *thresholds],
        [state, *detections, target, *explanation],
        preprocess=False,
        **SERIALIZED,
        **LATEST_ONLY,
    ).then(**heatmap)
    gr.on(
        [slider.change for slider in thresholds],
        on_threshold_change,
        [state, target, *thresholds],
        [*detections, target],
        show_progress="hidden",
        **LATEST_ONLY,
    ).then(**heatmap)
    detections[2].select(
        on_row_select,
        [state, *thresholds],
        target,
        api_visibility="private",
        show_progress="hidden",
    ).then(**heatmap)
    gr.on([choice.input for choice in choices], **heatmap)


if __name__ == "__main__":  # python -m src.serving.app weights
    FOLDER = Path(sys.argv[1])
    build_app(FOLDER, samples=sorted(FOLDER.glob("samples/*.jpg"))).launch()
