"""The page: a photograph in, what is in it and why out. The same in the notebook and in the Space."""

import html
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
import numpy as np
from gradio_client.utils import is_file_obj
from starlette.middleware import Middleware

from src.serving.drawing import class_colours, draw_detections, draw_heatmap
from src.serving.gradcam import METHODS, Explainer
from src.serving.guard import MAX_UPLOAD_BYTES, BoundedRequests, GuardedBlocks
from src.serving.images import load_image, resize_long_side
from src.serving.predictor import Detections, Predictor

MAX_PIXELS = 50_000_000
SESSION_TTL_S = 3600  # seconds that a visitor's photograph is
VIEW = 480, 1024  # pixels of the long side a picture is shown at, at least and at most
LAYERS = [
    ("The one that found it", "own"), ("All, averaged", "all"),
    ("Large things (stride 32)", 0), ("Middle (stride 16)", 1), ("Small things (stride 8)", 2),
]  # fmt: skip


METHOD_NAMES = {
    "hirescam": "HiResCAM: Grad-CAM cell by cell", "gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++",
    "eigencam": "EigenCAM: the same for every object",
}  # fmt: skip


FACTS = {"data": "Trained on", "epochs": "Epochs", "mAP50": "mAP at IoU 0.5", "weights": "Weights"}
ALL_DETECTIONS = ("Everything found", "all")
HEIGHT = 360  # pixels of each of the three pictures
SERIALIZED = {"concurrency_id": "model", "concurrency_limit": 1}  # visitors are answered in the order they came
LATEST_ONLY = {"trigger_mode": "always_last", "api_visibility": "private"}
THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.sky, neutral_hue=gr.themes.colors.slate, radius_size="md",
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
).set(body_text_color_subdued="*neutral_500", block_label_text_color="*neutral_600")  # fmt: skip


CSS = """
.gradio-container { max-width: min(1480px, 100%) !important; margin: auto }
.gradio-container .app, .gradio-container .app > .wrap, .gradio-container main { min-width: 0; max-width: 100% }
@media (max-width: 640px) { .gradio-container .app { padding: .5rem .75rem !important } }
#top h1 { font-size: 1.7rem; font-weight: 650; letter-spacing: -.02em; margin: 0 0 .15rem }
#top p { color: var(--body-text-color-subdued); margin: 0; font-size: 1rem }
#found, #why { min-height: 1.5rem; font-size: .95rem }
#why { color: var(--body-text-color-subdued) }
.problem { border-left: 3px solid #d55e00; padding: .3rem .7rem; background: #d55e0018 }
#table { --font-mono: var(--font); font-variant-numeric: tabular-nums }
#table .header-row { margin-bottom: .3rem }
#table .body-cell { cursor: pointer }
#about { border-top: 1px solid var(--border-color-primary); margin-top: 1rem; padding-top: .2rem; line-height: 1.5 }
#about h2 { font-size: 1rem; font-weight: 600; margin: 1rem 0 .4rem }
#about .chip { display: inline-flex; align-items: center; gap: .4em; margin: 0 .9em .3em 0 }
#about .chip i { width: .75em; height: .75em; border-radius: 2px }
#about dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: .6rem 1.2rem; margin: 0 }
#about dt { font-size: .8rem; color: var(--body-text-color-subdued) }
#about dd { margin: 0; font-variant-numeric: tabular-nums }
#about a { margin: 0 }
#about .links { margin-top: 1rem }
"""


INTRODUCTION = "Give it a photograph. It names and frames what it knows, and shows where it looked to decide."
HINT = "Add a photograph."
NO_IMAGE = f"Add a photograph first; each is kept for {SESSION_TTL_S // 60} minutes."


@dataclass
class ImageSession:
    """One visitor's photograph, after its one forward pass."""

    explainer: Explainer
    view: np.ndarray  # uint8 [h, w, 3], the photograph at the size it is shown
    seconds: float  # reading the file and the forward pass

    def found(self, confidence: float, iou_threshold: float) -> Detections:
        """In pixels of the photograph."""
        return self.explainer.candidates.detections(confidence, iou_threshold)

    def in_view(self, detections: Detections) -> Detections:
        """Boxes in pixels of the view."""
        scale = np.divide(self.view.shape[1::-1], self.explainer.size).astype(np.float32)
        return replace(detections, boxes=detections.boxes * np.tile(scale, 2))


class Page(GuardedBlocks):
    """Blocks that launch with the project's look and a queue; every argument of `launch` can still be given."""

    def launch(self, **options):
        defaults = {
            "theme": THEME, "head": f"<style>{CSS}</style>", "footer_links": ["api"], "ssr_mode": False,
            "max_file_size": MAX_UPLOAD_BYTES, "state_session_capacity": 64, "enable_monitoring": False,
            "app_kwargs": {"middleware": [Middleware(BoundedRequests)]},
        }  # fmt: skip
        return super().launch(**{**defaults, **options})


def analyze_image(predictor: Predictor, path: str | os.PathLike) -> ImageSession:
    """The one forward pass over a visitor's file. Raises ValueError whose text can be shown to them."""
    start = time.perf_counter()
    try:
        image = load_image(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "This file")) from None
    explainer = Explainer(predictor, image)
    seconds = time.perf_counter() - start
    return ImageSession(explainer, resize_long_side(image, int(np.clip(max(image.shape), *VIEW))), seconds)


def detect(predictor: Predictor, path: str | os.PathLike, confidence: float, iou_threshold: float) -> dict:
    """What the endpoint /detect answers: sizes and boxes in pixels of the photograph, best first."""
    visit = analyze_image(predictor, path)
    found = visit.found(confidence, iou_threshold)
    rows = zip(found.labels, found.scores, found.boxes, strict=True)
    width, height = visit.explainer.size
    detections = [
        {"class": predictor.classes[label], "confidence": round(float(score), 4), "box": box.round(1).tolist()}
        for label, score, box in rows
    ]
    return {"width": width, "height": height, "seconds": round(visit.seconds, 3), "detections": detections}


def render_detections(
    visit: ImageSession, confidence: float, iou_threshold: float
) -> tuple[np.ndarray, str, list[list], list[tuple]]:
    """No forward pass: the view with its boxes, a line of text, the table's rows, and what can be explained."""
    classes, found = visit.explainer.predictor.classes, visit.found(confidence, iou_threshold)
    colours = class_colours(len(classes))
    table, choices = [], []
    for row, (label, score, box) in enumerate(zip(found.labels, found.scores, found.boxes, strict=True)):
        dot = f'<span style="color:rgb{colours[label]}">&#9632;</span> {html.escape(classes[label])}'
        table.append([row + 1, dot, f"{100 * score:.1f}%", ", ".join(f"{edge:.0f}" for edge in box)])
        choices.append((f"{row + 1}: {classes[label]}, {100 * score:.0f}%", row))
    kinds = Counter(classes[label] for label in found.labels)
    choices = [ALL_DETECTIONS, *((f"Every {name} ({n})", name) for name, n in kinds.items()), *choices]
    width, height = visit.explainer.size
    what = {0: "Nothing found: ask for less confidence", 1: "1 object"}.get(len(found), f"{len(found)} objects")
    text = f"<b>{what}</b> &middot; {visit.seconds:.2f} s &middot; {width} &times; {height} pixels"
    return draw_detections(visit.view, visit.in_view(found), classes), text, table, choices


def render_heatmap(
    visit: ImageSession,
    target: str | int,
    layer: str | int,
    method: str,
    opacity: float,
    confidence: float,
    iou_threshold: float,
) -> tuple[np.ndarray, str]:
    """The view under its heatmap map, the explained boxes outlined, and a line of text."""
    classes = visit.explainer.predictor.classes
    found = visit.explainer.explain(target, layer, method, confidence, iou_threshold)
    heatmap = resize_long_side(found.heatmap, max(visit.view.shape))
    picture = draw_heatmap(visit.view, heatmap, opacity)
    picture = draw_detections(picture, visit.in_view(found.detections), classes, bool(found.message), found.explained)
    return picture, html.escape(found.message) or "Bright: where the network looked. Outlined: what it is about."


def model_facts_html(predictor: Predictor, links: dict[str, str]) -> str:
    """What the model is, knows and scores, as far as its `about` says; and where to find more."""
    about = {**predictor.model.metadata}
    about.update(about.pop("metrics", {}))
    facts = {FACTS.get(key, key): f"{value:.3g}" if isinstance(value, float) else value for key, value in about.items()}
    facts["Parameters"] = f"{sum(p.numel() for p in predictor.model.parameters()) / 1e6:.1f} million"
    facts["Input"] = f"{predictor.image_size} x {predictor.image_size} pixels"
    rows = "".join(f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd></div>" for key, value in facts.items())
    chips = "".join(
        f'<span class="chip"><i style="background:rgb{colour}"></i>{html.escape(name)}</span>'
        for name, colour in zip(predictor.classes, class_colours(len(predictor.classes)), strict=True)
    )
    where = " &middot; ".join(
        f'<a href="{html.escape(url, quote=True)}" target="_blank" rel="noopener">{html.escape(name)}</a>'
        for name, url in links.items()
    )
    return (
        f'<section id="about"><h2>What it can find</h2><p>{chips}</p><h2>The model</h2><dl>{rows}</dl>'
        f'<p class="links">{where}</p></section>'
    )


def build_app(
    source: Predictor | str | Path,
    samples: Sequence[str | Path] = (),
    links: dict[str, str] | None = None,
    title: str = "YOLOv3: what is there, and why",
) -> gr.Blocks:
    """The page for a predictor, or for weights in a folder or on the hub; `.launch()` opens it.

    samples: pictures to click. links: what a link says -> its address, e.g. the model, the code.
    The endpoint /detect(image, confidence, iou_threshold) answers programs.
    """
    predictor = source if isinstance(source, Predictor) else Predictor.load(source)
    with Page(title=title, analytics_enabled=False, delete_cache=(SESSION_TTL_S, SESSION_TTL_S)) as page:
        gr.HTML(f"<h1>{html.escape(title)}</h1><p>{INTRODUCTION}</p>", padding=False, elem_id="top")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                photo = _photo_column(samples)
            with gr.Column(min_width=320):
                found, thresholds = _found_column()
            with gr.Column(min_width=320):
                why, choices = _why_column()
        gr.HTML(model_facts_html(predictor, links or {}), padding=False)
        _connect(predictor, photo, found, thresholds, why, choices)
        gr.api(_endpoint(predictor), api_name="detect", **SERIALIZED)
    return page.queue(max_size=200, api_open=False)  # nobody passes the queue by


def _picture(label: str, name: str) -> gr.Image:
    buttons = ["download", "fullscreen"]
    return gr.Image(label=label, interactive=False, height=HEIGHT, format="jpeg", elem_id=name, buttons=buttons)


def _photo_column(samples: Sequence[str | Path]) -> gr.Image:
    photo = gr.Image(label="Photograph", type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"],
                     height=HEIGHT, elem_id="photo")  # fmt: skip
    if samples:
        gr.Examples([[str(path)] for path in samples], photo, label="Or try one of these", elem_id="samples")
    return photo


def _found_column() -> tuple[list, list]:
    """(picture, line of text, table), (confidence, iou_threshold)."""
    picture, line = _picture("What is there", "boxes"), gr.HTML(HINT, padding=False, elem_id="found")
    with gr.Group():
        confidence = gr.Slider(0.01, 0.95, 0.25, step=0.01, label="Confidence, at least", elem_id="confidence")
        iou_threshold = gr.Slider(0.05, 0.95, 0.45, step=0.05, label="Overlap of two boxes, at most", elem_id="iou_threshold")
    table = gr.Dataframe(
        headers=["#", "Class", "Score", "x1, y1, x2, y2"], datatype=["number", "html", "str", "str"],
        column_widths=["11%", "28%", "18%", "43%"], wrap=True, max_height=260, interactive=False, buttons=[],
        label="Click a row to explain it", elem_id="table",
    )  # fmt: skip
    return [picture, line, table], [confidence, iou_threshold]


def _why_column() -> tuple[list, list]:
    """(picture, line of text), (target, scale, method, opacity)."""
    picture, line = _picture("Why", "heatmap"), gr.HTML(padding=False, elem_id="why")
    with gr.Group():
        target = gr.Dropdown([ALL_DETECTIONS], value="all", label="Explain", elem_id="target")
        layer = gr.Dropdown(LAYERS, value="own", label="Scale of the network", elem_id="layer")
        names = [(METHOD_NAMES[method], method) for method in METHODS]
        method = gr.Dropdown(names, value=next(iter(METHODS)), label="Method", elem_id="method")
        opacity = gr.Slider(0, 1, 0.7, step=0.05, label="Opacity of the map", elem_id="opacity")
    return [picture, line], [target, layer, method, opacity]


def _endpoint(predictor: Predictor):
    """The function behind /detect."""

    def detect_file(image: gr.FileData, confidence: float = 0.25, iou_threshold: float = 0.45) -> dict:
        """Objects in a picture: class, confidence and box (left, top, right, bottom in pixels), best first."""
        if not is_file_obj(image):
            raise gr.Error("image must be an uploaded file")
        try:
            return detect(predictor, image["path"], confidence, iou_threshold)
        except ValueError as error:
            raise gr.Error(str(error)) from None

    return detect_file


def _connect(predictor: Predictor, photo: gr.Image, found: list, thresholds: list, why: list, choices: list) -> None:
    """What happens when. A photograph costs one forward pass; sliders and choices work on what it left in `visit`."""
    visit, target = gr.State(time_to_live=SESSION_TTL_S), choices[0]

    def on_upload(file: dict | None, *limits):
        """photo: the file as the page sent it, so that one which is no picture reaches load_image's message."""
        new, line = None, HINT
        try:
            new = analyze_image(predictor, file["path"]) if file else None
        except ValueError as error:
            gr.Warning(str(error))
            line = f'<div class="problem" role="alert">{html.escape(str(error))}</div>'
        if new is None:
            return None, None, line, [], gr.Dropdown([ALL_DETECTIONS], value="all"), None, ""
        picture, line, table, options = render_detections(new, *limits)
        return new, picture, line, table, gr.Dropdown(options, value="all"), gr.skip(), gr.skip()

    def on_threshold_change(now: ImageSession | None, chosen, *limits):
        if now is None:
            return gr.skip(), NO_IMAGE, gr.skip(), gr.skip()
        picture, line, table, options = render_detections(now, *limits)
        chosen = chosen if chosen in [value for _, value in options] else "all"
        return picture, line, table, gr.Dropdown(options, value=chosen)

    def explain(now: ImageSession | None, *settings):
        return render_heatmap(now, *settings) if now else (gr.skip(), NO_IMAGE)

    def on_row_select(event: gr.SelectData):
        return int(event.row_value[0]) - 1

    heatmap = {"fn": explain, "inputs": [visit, *choices, *thresholds], "outputs": why, **SERIALIZED, **LATEST_ONLY}
    photo.change(on_upload, [photo, *thresholds], [visit, *found, target, *why], preprocess=False,
                 **SERIALIZED, **LATEST_ONLY).then(**heatmap)  # fmt: skip
    gr.on([slider.change for slider in thresholds], on_threshold_change, [visit, target, *thresholds], [*found, target],
          show_progress="hidden", **LATEST_ONLY).then(**heatmap)  # fmt: skip
    found[2].select(on_row_select, None, target, api_visibility="private", show_progress="hidden").then(**heatmap)
    gr.on([choice.input for choice in choices], **heatmap)


if __name__ == "__main__":  # python -m src.app weights
    FOLDER = Path(sys.argv[1])
    build_app(FOLDER, samples=sorted(FOLDER.glob("samples/*.jpg"))).launch()
