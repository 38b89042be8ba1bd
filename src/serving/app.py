"""The Gradio app, `python -m src.serving.app [WEIGHTS]`: detections of an image and heatmaps."""

import argparse
import html
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gradio as gr
from gradio_client.utils import is_file_obj

from src.serving.gradcam import LAYERS, METHODS
from src.serving.guard import NOT_UPLOADED, GuardedBlocks
from src.serving.images import IMAGE_SUFFIXES
from src.serving.predict import WEIGHTS, detections_to_dict
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Predictor
from src.serving.session import (
    ALL_DETECTIONS,
    ImageSession,
    analyze_image,
    credits_html,
    model_facts_html,
    render_detections,
    render_heatmap,
)

SESSION_TTL_S = 3600  # how long a visitor's image is kept
NO_IMAGE = f"Upload an image. It is kept for {SESSION_TTL_S // 60} minutes."
IMAGE_HEIGHT = 360  # of each of the three image panels, in CSS pixels
# One forward pass at a time, in order of arrival:
SERIALIZED = {"concurrency_id": "model", "concurrency_limit": 1}
LATEST_ONLY = {"trigger_mode": "always_last", "api_visibility": "private"}
STYLE = Path(__file__).with_name("app.css").read_text(encoding="utf-8")
LAUNCH_OPTIONS = {
    "theme": gr.themes.Base(
        primary_hue=gr.themes.colors.sky,
        neutral_hue=gr.themes.colors.slate,
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_500", block_label_text_color="*neutral_600"),
    "head": f"<style>{STYLE}</style>",
    "footer_links": ["api"],
    "ssr_mode": False,
    "max_file_size": "64mb",
    "state_session_capacity": 64,
    "enable_monitoring": False,
}


def build_app(
    predictor: Predictor,
    samples: str | Path = "",
    links: dict[str, str] | None = None,
    title: str = "YOLOv3 object detection with Grad-CAM",
) -> gr.Blocks:
    """Build the app. `.launch()` starts it, with LAUNCH_OPTIONS if not overridden.

    Programs use the endpoint /detect(image, confidence, iou_threshold).
    samples: a folder of example images, with their authors in LICENSES.txt.
    links: text -> address.
    """
    with GuardedBlocks(
        title=title, analytics_enabled=False, delete_cache=(60, SESSION_TTL_S)
    ) as page:
        gr.HTML(
            f"<h1>{html.escape(title)}</h1><p>YOLOv3 detects the objects in an image, Grad-CAM "
            "shows the evidence for each.</p>",
            padding=False,
            elem_id="top",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                image = _image_column(samples)
            with gr.Column(min_width=320):
                detections, thresholds = _detections_column()
            with gr.Column(min_width=320):
                explanation, choices = _explanation_column()
        gr.HTML(model_facts_html(predictor.model, links or {}), padding=False)
        _connect(predictor, image, detections, thresholds, explanation, choices)
        gr.api(_endpoint(predictor), api_name="detect", **SERIALIZED)
    page.launch = partial(page.launch, **LAUNCH_OPTIONS)
    return page.queue(max_size=200, api_open=False)  # every request goes through the queue


def _image_column(samples: str | Path) -> gr.Image:
    image = gr.Image(
        label="Image",
        type="filepath",
        image_mode=None,
        sources=["upload", "webcam", "clipboard"],
        height=IMAGE_HEIGHT,
        elem_id="image",
    )
    paths = sorted(Path(samples).glob("*")) if samples else []
    files = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    if files:  # the Hub doesn't keep an empty folder
        gr.Examples(
            [[str(path)] for path in files],
            image,
            label="Examples",
            elem_id="samples",
            examples_per_page=24,
        )
        gr.HTML(credits_html(samples), padding=False, elem_id="credits")
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
    image = _output_image("Detections", "detections")
    summary = gr.HTML(NO_IMAGE, padding=False, elem_id="summary")
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
    """Return [image, message] and [target, layers, method, opacity]."""
    image = _output_image("Explanation", "heatmap")
    message = gr.HTML(padding=False, elem_id="message")
    with gr.Group():
        target = gr.Dropdown([ALL_DETECTIONS], value="all", label="Explain", elem_id="target")
        layers = gr.Dropdown(
            [(label, key) for key, label in LAYERS.items()], label="Layers", elem_id="layers"
        )
        method = gr.Dropdown(
            [(label, key) for key, label in METHODS.items()], label="CAM method", elem_id="method"
        )
        opacity = gr.Slider(0, 1, 0.7, step=0.05, label="Heatmap opacity", elem_id="opacity")
    return [image, message], [target, layers, method, opacity]


def _endpoint(predictor: Predictor) -> Callable:
    """Return the function behind /detect; its docstring is part of the page's documentation."""

    def detect_file(
        image: gr.FileData, confidence: float = CONFIDENCE, iou_threshold: float = IOU_THRESHOLD
    ) -> dict:
        """Detect objects in an image: class, confidence and box of each, best first.

        A box is left, top, right, bottom in pixels. In Python: from gradio_client import
        handle_file, then image=handle_file("photo.jpg").
        """
        if not is_file_obj(image):
            raise gr.Error(NOT_UPLOADED, print_exception=False)
        try:
            session = analyze_image(predictor, image["path"])
            detections = session.detections(confidence, iou_threshold)
        except (TypeError, ValueError) as error:  # a threshold may be anything
            raise gr.Error(str(error), print_exception=False) from None
        return detections_to_dict(detections, predictor.classes, session.explainer.size)

    return detect_file


def on_threshold_change(
    session: ImageSession | None, selected: str | int, confidence: float, iou_threshold: float
) -> tuple:
    """Answer with image, summary, table and targets; the target is kept if it is still detected."""
    if session is None:
        return gr.skip(), NO_IMAGE, gr.skip(), gr.skip()
    drawn, summary, table, targets = render_detections(session, confidence, iou_threshold)
    kept = selected if selected in dict(targets).values() else "all"
    return drawn, summary, table, gr.Dropdown(targets, value=kept)


def on_row_select(
    session: ImageSession | None, confidence: float, iou_threshold: float, event: gr.SelectData
) -> int | str:
    """Answer with the target of a table row."""
    row = int(event.row_value[0]) - 1
    predictions = session.detections(confidence, iou_threshold).index if session else ()
    return int(predictions[row]) if row < len(predictions) else "all"


def explain(session: ImageSession | None, *settings) -> tuple:
    """Answer with heatmap and message; settings as in `render_heatmap`."""
    return (gr.skip(), NO_IMAGE) if session is None else render_heatmap(session, *settings)


def on_upload(
    predictor: Predictor, file: dict | None, confidence: float, iou_threshold: float
) -> tuple:
    """Answer with session, image, summary, table, targets, heatmap and message.

    file: as the page sends it, not preprocessed, so that load_image reports unreadable files.
    """
    if file is None:
        return _no_image(NO_IMAGE)
    try:
        session = analyze_image(predictor, file["path"])
    except ValueError as error:
        return _no_image(f'<div class="error-message" role="alert">{html.escape(str(error))}</div>')
    drawn, summary, table, targets = render_detections(session, confidence, iou_threshold)
    return session, drawn, summary, table, gr.Dropdown(targets, value="all"), gr.skip(), gr.skip()


def _no_image(summary: str) -> tuple:
    return None, None, summary, [], gr.Dropdown([ALL_DETECTIONS], value="all"), None, ""


def _connect(predictor, image, detections, thresholds, explanation, choices) -> None:
    """Connect the columns' components, as their functions return them.

    An upload costs one forward pass and leaves an ImageSession in `state`. From it the other events
    are answered, and a new heatmap follows each.
    """
    state = gr.State(time_to_live=SESSION_TTL_S)
    upload = image.change(
        partial(on_upload, predictor),
        inputs=[image, *thresholds],
        outputs=[state, *detections, choices[0], *explanation],
        preprocess=False,
        api_name="on_upload",
        **SERIALIZED,
        **LATEST_ONLY,
    )
    move_slider = gr.on(
        [slider.change for slider in thresholds],
        on_threshold_change,
        inputs=[state, choices[0], *thresholds],
        outputs=[*detections, choices[0]],
        show_progress="hidden",
        **LATEST_ONLY,
    )
    click_row = detections[-1].select(
        on_row_select,
        inputs=[state, *thresholds],
        outputs=choices[0],
        show_progress="hidden",
        api_visibility="private",
    )
    heatmap = {
        "fn": explain,
        "inputs": [state, *choices, *thresholds],
        "outputs": explanation,
        **SERIALIZED,
        **LATEST_ONLY,
    }
    for event in (upload, move_slider, click_row):
        event.then(**heatmap)
    gr.on([choice.input for choice in choices], **heatmap)


def main() -> None:
    """Serve the app on this machine."""
    parser = argparse.ArgumentParser("python -m src.serving.app", description=main.__doc__)
    parser.add_argument(
        "weights",
        nargs="?",
        default=WEIGHTS,
        help="a folder of exported weights, or a Hub id (default: the shipped weights)",
    )
    source = parser.parse_args().weights
    links = {} if Path(source).exists() else {"Model": f"https://huggingface.co/{source}"}
    build_app(Predictor.load(source), Path(source, "samples"), links).launch()


if __name__ == "__main__":
    main()
