"""Export of the app as a static Space: a page that runs the model in the visitor's browser."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from src.model.network import YOLOv3
from src.serving.drawing import class_colour
from src.serving.gradcam import LAYERS, MAX_EXPLAINED
from src.serving.images import IMAGE_SUFFIXES
from src.serving.onnx_model import export_onnx, model_facts
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, MIN_SCORE
from src.serving.session import BRIGHT_AREAS, credits_html, model_facts_html
from src.serving.space import new_folder, write_samples

PACKAGE = "onnxruntime-web@1.30.0"  # npm's name
CDN = f"https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/"
RUNTIME = (  # files of PACKAGE/dist; a browser refuses one with another SHA-384
    {
        "file": "ort-wasm-simd-threaded.wasm",
        "bytes": 14_239_897,
        "integrity": "sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    },
    {
        "file": "ort.wasm.bundle.min.mjs",
        "bytes": 73_054,
        "integrity": "sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG",
    },
)


def export_static_space(
    model: YOLOv3,
    folder: str | Path,
    samples: Sequence[str | Path | np.ndarray] = (),
    links: dict[str, str] | None = None,
    vendor: bool = False,
) -> Path:
    """Write a static Space into `folder` and return its path. An older export is replaced.

    samples: see `write_samples`. links: text -> address.
    vendor: copy onnxruntime-web into the folder with npm, for use without internet. The default
        loads it from a content delivery network (cdn.jsdelivr.net).
    Raises FileExistsError, see `new_folder`.
    """
    folder = new_folder(folder)
    shutil.copytree(Path(__file__).parent / "static", folder, dirs_exist_ok=True)
    write_samples(samples, folder / "samples")
    bytes_of_model = export_onnx(model, folder / "model.onnx").stat().st_size
    if vendor:
        copy_runtime(folder / "runtime")
    facts = page_facts(model, folder / "samples", links or {})
    address = "runtime/" if vendor else CDN
    facts["downloads"] = [
        {"url": "model.onnx", "bytes": bytes_of_model, "integrity": ""},
        *({"url": address + part["file"]} | part for part in RUNTIME),
    ]
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return folder


def page_facts(model: YOLOv3, samples: Path, links: dict[str, str]) -> dict:
    """Return what the page needs to know: of the model, the thresholds, the texts and samples."""
    return model_facts(model) | {
        "colours": [class_colour(label) for label in range(len(model.classes))],
        "heatmap_colours": heatmap_colours(),
        "confidence": CONFIDENCE,
        "iou_threshold": IOU_THRESHOLD,
        "min_score": MIN_SCORE,
        "bright_areas": BRIGHT_AREAS,
        "layers": list(LAYERS.items()),
        "max_explained": MAX_EXPLAINED,
        "samples": sorted(p.name for p in samples.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES),
        "credits_html": credits_html(samples),
        "about_html": model_facts_html(model, links),
    }


def heatmap_colours() -> list[list[int]]:
    """Return the RGB colours of `draw_heatmap` for the values 0, 1, ..., 255."""
    levels = np.arange(256, dtype=np.uint8)[:, None]
    return cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[:, 0, ::-1].tolist()


def copy_runtime(folder: Path) -> None:
    """Download PACKAGE with npm and copy the files of RUNTIME into a new folder."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        npm = ["npm", "install", PACKAGE, "--prefer-offline", "--ignore-scripts", "--silent"]
        subprocess.run([*npm, "--prefix", scratch], check=True)
        for part in RUNTIME:
            shutil.copy(Path(scratch, "node_modules/onnxruntime-web/dist", part["file"]), folder)
