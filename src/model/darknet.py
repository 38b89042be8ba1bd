"""Weight files published for Darknet: yolov3.weights (everything), darknet53.conv.74 (backbone)."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from src.model.network import ANCHORS, YOLOv3

BACKBONE_CONVOLUTIONS = 52
PUBLISHED = {  # number of float32 values -> the file
    62_001_757: "yolov3.weights",
    40_620_640: "darknet53.conv.74",
    41_645_640: "darknet53.weights, the ImageNet classifier; "
    "its backbone is published as darknet53.conv.74",
    63_052_381: "yolov3-spp.weights, a YOLOv3 with spatial pyramid pooling",
    8_858_734: "yolov3-tiny.weights, a network of 13 convolutions",
}


@torch.no_grad()
def load_darknet(model: YOLOv3, path: str | Path) -> str:
    """Copy the weights of a Darknet file into a network. Published files fit width 1 only.

    The file is a header (version 3 x int32, images seen int64; int32 before version 0.2), then
    float32: per convolution its batch norm (bias, weight, mean, variance) or its bias, then the
    kernel. PyTorch's epsilon, 1e-5 added to the variance, is that of Darknet's GPU code.
    If the file has 80 classes and the model another number, the last layer of each head is not
    loaded. With the heads, the anchors become Darknet's: the same pixels at any image size.
    Returns what was loaded: "everything", "all but the last layers" or "the backbone".
    Raises ValueError if the file has another size or values that are not finite.
    """
    contents = _expected_counts(model)
    values = _read_values(Path(path), contents, model.width)
    part = contents[len(values)]
    layers = _layers_in_file_order(model)
    if part == "the backbone":
        layers = layers[:BACKBONE_CONVOLUTIONS]
    else:
        model.set_anchors(torch.tensor(ANCHORS, dtype=torch.float64) * (416 / model.image_size))
    for tensors in layers:
        is_last = len(tensors) == 2
        if is_last and part == "all but the last layers":
            values = values[3 * 85 * (tensors[1].shape[1] + 1) :]
            continue
        for tensor in tensors:
            own = values[: tensor.numel()].view_as(tensor)
            values = values[tensor.numel() :]
            tensor.copy_(_objectness_first(own) if is_last else own)
    return part


def _read_values(path: Path, expected: dict[int, str], width: float) -> Tensor:
    """Return the float32 values of a file, whose number is one of `expected`."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        major, minor, _ = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    header = 20 if major * 10 + minor >= 2 else 16
    count = (size - header) / 4
    if count not in expected:
        sizes = " or ".join(f"{20 + 4 * number:,}" for number in expected)
        message = f"{path} has {size:,} bytes. Darknet weights of this network have {sizes}. "
        advice = "Download it again."
        if count in PUBLISHED:
            message = f"{path} is {PUBLISHED[count]}. "
            advice = "Use yolov3.weights or darknet53.conv.74."
        if width != 1:
            advice = f"Published weights fit width 1 only; this network has width {width:g}."
        raise ValueError(message + advice)
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=header))
    if not values.isfinite().all():
        raise ValueError(
            f"{path} has the right size, {size:,} bytes, but contains NaN or infinity. "
            "Download it again."
        )
    return values


def _expected_counts(model: YOLOv3) -> dict[int, str]:
    """Return the numbers of values that files for this network have, and what they contain."""
    counts = [sum(map(torch.numel, tensors)) for tensors in _layers_in_file_order(model)]
    inputs = sum(head.predict.in_channels + 1 for head in model.heads)
    missing = 3 * (80 - len(model.classes)) * inputs  # in the last layers, compared with 80 classes
    return {
        sum(counts[:BACKBONE_CONVOLUTIONS]): "the backbone",
        sum(counts) + missing: "all but the last layers",
        sum(counts): "everything",
    }


def _layers_in_file_order(model: nn.Module) -> list[list[Tensor]]:
    """Return the tensors of each convolution as in the file: five, or two without batch norm."""
    layers, kernel = [], None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.weight
            if module.bias is not None:
                layers.append([module.bias, kernel])
        elif isinstance(module, nn.BatchNorm2d):
            statistics = [module.running_mean, module.running_var]
            layers.append([module.bias, module.weight, *statistics, kernel])
    return layers


def _objectness_first(tensor: Tensor) -> Tensor:
    """Reorder the channels of each anchor: x, y, w, h, objectness, classes -> objectness first."""
    parts = tensor.unflatten(0, (3, -1))
    return torch.cat((parts[:, 4:5], parts[:, :4], parts[:, 5:]), dim=1).flatten(0, 1)
