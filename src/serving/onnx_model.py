"""ONNX: a detector as one file that runs without PyTorch, and the model that runs it for `Predictor`."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from src.model.boxes import decode
from src.model.network import STRIDES, YOLOv3, fuse_batch_norms

AXES = {  # names of the dynamic axes
    "images": {0: "batch", 2: "size", 3: "size"},
    "boxes": {0: "batch", 1: "predictions"},
    "scores": {0: "batch", 1: "predictions"},
}


class _DecodedYOLOv3(nn.Module):
    """Images float [B, 3, S, S] in 0..1 -> boxes and scores of `decode`."""

    def __init__(self, model: YOLOv3):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return decode(self.model(images), self.model.anchors_at(images.shape[-1]))


def export_onnx(model: YOLOv3, path: str | Path) -> Path:
    """Write a model as one float32 ONNX file, for any number of images B and any size S that is a multiple of 32.

    Input: images float [B, 3, S, S] in 0..1, RGB, letterboxed.
    Outputs of `boxes.decode`: boxes [B, K, 4] xyxy in 0..1, not clipped, and scores [B, K, C], objectness times class
    probability. NMS is not in the graph: `Predictor.load(path)` applies `boxes.nms`.
    The file's metadata_props are JSON: classes, image_size, strides, anchors (width and height in pixels, the same at
    any S), num_parameters, metadata.
    Raises ImportError if onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(
            "The export to ONNX needs onnxscript. Run `pip install onnxscript`."
        ) from error
    program = torch.onnx.export(
        _DecodedYOLOv3(fuse_batch_norms(model).cpu()).eval(),
        (torch.zeros(2, 3, 64, 64),),
        input_names=["images"],
        output_names=["boxes", "scores"],
        dynamic_shapes={"images": dict.fromkeys(AXES["images"], torch.export.Dim.DYNAMIC)},
        dynamo=True,
        verbose=False,
    )
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        for axis, name in AXES[value.name].items():
            value.shape[axis] = name
    program.model.metadata_props.update(
        {name: json.dumps(value) for name, value in _facts(model).items()}
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    program.save(part, external_data=False)
    os.replace(part, path)
    return path


def _facts(model: YOLOv3) -> dict:
    """Return the file's metadata."""
    return {
        "classes": model.classes,
        "image_size": model.image_size,
        "strides": STRIDES,
        "anchors": [
            [[edge * model.image_size for edge in anchor] for anchor in scale]
            for scale in model.anchor_sizes
        ],
        "num_parameters": model.num_parameters,
        "metadata": model.metadata,
    }


class OnnxModel:
    """A file written by `export_onnx`, run by onnxruntime on the CPU with as many threads as PyTorch uses.

    `classes`, `image_size`, `metadata` and `num_parameters` are those of the exported YOLOv3.
    """

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError, ValueError if the file is not an export, and ImportError without onnxruntime."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path} is missing. Write it with export_onnx(model, {str(path)!r})."
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"{path} needs onnxruntime. Run `pip install onnxruntime`. In a Space, add it to requirements.txt."
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            facts = self.session.get_modelmeta().custom_metadata_map
            self.classes, self.image_size, self.metadata, self.num_parameters = (
                json.loads(facts[name])
                for name in ("classes", "image_size", "metadata", "num_parameters")
            )
        except Exception as error:  # onnxruntime has an exception class per error code
            raise ValueError(
                f"{path} is not a file of export_onnx: {error!r}. Export it again."
            ) from None

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images float [B, 3, S, S] in 0..1 -> boxes [B, K, 4] and scores [B, K, C] of `decode`."""
        if images.shape[2] != images.shape[3] or images.shape[3] % 32:
            raise ValueError(
                f"The model takes images [B, 3, S, S] with S a multiple of 32, not {list(images.shape)}."
            )
        outputs = self.session.run(["boxes", "scores"], {"images": images.numpy()})
        return tuple(map(torch.from_numpy, outputs))
