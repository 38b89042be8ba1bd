"""Detect objects in an image, a video or a folder of them, and save the results.

python -m src.serving.predict SOURCE [--weights FOLDER] [--save FOLDER] [--heatmap]
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from src.serving.drawing import draw_detections, draw_explanation
from src.serving.images import IMAGE_SUFFIXES, load_image
from src.serving.predictor import CONFIDENCE, IOU_THRESHOLD, Detections, Predictor

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
DEFAULT_FPS = 25.0  # if a video does not state its own
WEIGHTS = Path(__file__).parents[2] / "weights"


def predict(
    source: str | Path,
    predictor: Predictor,
    folder: str | Path = "runs/predict",
    confidence: float = CONFIDENCE,
    iou_threshold: float = IOU_THRESHOLD,
    heatmap: bool = False,
) -> list[dict]:
    """Save copies of images and videos with their detections drawn, and predictions.json.

    source: an image, a video (saved as MP4, without sound), or a folder of them.
    heatmap: also save the heatmap of each image's detections.
    Returns the content of predictions.json: per image its name (of a video also "frame", from 0),
    width, height and the detections, see `detections_to_dict`; of an unreadable file "error".
    Raises FileNotFoundError if `source` is missing or has no supported file, ValueError if an
    option doesn't fit.
    """
    files = source_files(Path(source))
    folder = Path(folder)
    if files[0].parent.resolve() == folder.resolve():
        raise ValueError(f"{folder} contains the source. Choose another folder for the results.")
    folder.mkdir(parents=True, exist_ok=True)
    thresholds = (confidence, iou_threshold)
    entries = []
    for file in files:
        if file.suffix.lower() in VIDEO_SUFFIXES:
            entries += predict_video(file, predictor, folder, thresholds)
        else:
            entries.append(predict_image(file, predictor, folder, thresholds, heatmap))
    text = json.dumps(entries, ensure_ascii=False, indent=1)
    (folder / "predictions.json").write_text(text, encoding="utf-8")
    print(f"Results: {folder}")
    return entries


def source_files(source: Path) -> list[Path]:
    """Return the file `source`, or the images and videos in the folder `source`, sorted.

    Raises FileNotFoundError if there is none.
    """
    suffixes = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    files = [source] if source.is_file() else sorted(source.glob("[!.]*"))
    files = [path for path in files if path.suffix.lower() in suffixes]
    if not files:
        raise FileNotFoundError(
            f"{source} is missing, not a supported file, or a folder without one. "
            f"Supported files: {', '.join(suffixes)}."
        )
    return files


def predict_image(
    file: Path, predictor: Predictor, folder: Path, thresholds: tuple, heatmap: bool
) -> dict:
    """Save the results of an image in its format, and return them."""
    try:
        image = load_image(file)
    except ValueError as error:
        print(error)
        return {"image": file.name, "error": str(error)}
    drawn, result = detect(predictor, image, thresholds)
    Image.fromarray(drawn).save(folder / file.name, quality=90)
    if heatmap:
        from src.serving.gradcam import explain  # loads matplotlib, through grad-cam

        explanation = explain(predictor, image, "all", "all", "layercam", *thresholds)
        drawn = draw_explanation(image, explanation, predictor.classes)
        Image.fromarray(drawn).save(folder / f"{file.stem}_heatmap{file.suffix}", quality=90)
    print(f"{file.name}: {len(result['detections'])} detections", flush=True)
    return {"image": file.name, **result}


def predict_video(file: Path, predictor: Predictor, folder: Path, thresholds: tuple) -> list[dict]:
    """Save a video of the results, and return those of each frame."""
    capture = cv2.VideoCapture(str(file))
    fps = capture.get(cv2.CAP_PROP_FPS)
    writer = cv2.VideoWriter(
        str(folder / f"{file.stem}.mp4"),
        cv2.VideoWriter_fourcc(*"mp4v"),
        fps if 0 < fps < 1000 else DEFAULT_FPS,
        (int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))),
    )
    entries = []
    while (frame := capture.read()[1]) is not None:
        drawn, result = detect(predictor, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), thresholds)
        writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
        entries.append({"image": file.name, "frame": len(entries), **result})
    writer.release()
    if not entries:
        error = f"{file} can't be read as a video. Check that it plays."
        print(error)
        return [{"image": file.name, "error": error}]
    print(f"{file.name}: {len(entries)} frames", flush=True)
    return entries


def detect(
    predictor: Predictor, image: np.ndarray, thresholds: tuple[float, float]
) -> tuple[np.ndarray, dict]:
    """Return a copy of uint8 [H, W, 3] RGB with its detections drawn, and size and detections."""
    detections = predictor(image, *thresholds)
    drawn = draw_detections(image, detections, predictor.classes)
    return drawn, detections_to_dict(detections, predictor.classes, image.shape[1::-1])


def detections_to_dict(detections: Detections, classes: list[str], size: tuple[int, int]) -> dict:
    """Return "width" and "height" of an image, and "detections", best first.

    Each detection has "class", "confidence" and "box": left, top, right, bottom in pixels.
    """
    columns = (detections.labels, detections.scores, detections.boxes)
    return {
        "width": size[0],
        "height": size[1],
        "detections": [
            {
                "class": classes[label],
                "confidence": round(float(score), 4),
                "box": box.astype(float).round(1).tolist(),
            }
            for label, score, box in zip(*columns, strict=True)
        ],
    }


def main() -> None:
    """Run the command. The exit status is 1 if a file can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m src.serving.predict",
        description="Detect objects and save the results.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", help="an image, a video, or a folder of them")
    parser.add_argument("--weights", default=WEIGHTS, help="exported weights: a folder or Hub id")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="confidence threshold")
    parser.add_argument(
        "--iou-threshold", type=float, default=IOU_THRESHOLD, help="NMS IoU threshold"
    )
    parser.add_argument("--save", default="runs/predict", metavar="FOLDER", help="for the results")
    parser.add_argument(
        "--heatmap", action="store_true", help="also save the heatmap of each image"
    )
    args = parser.parse_args()
    try:
        entries = predict(
            args.source,
            Predictor.load(args.weights),
            args.save,
            args.confidence,
            args.iou_threshold,
            args.heatmap,
        )
    except (OSError, ValueError, ImportError) as error:
        sys.exit(str(error))
    sys.exit(any("error" in entry for entry in entries))


if __name__ == "__main__":
    main()
