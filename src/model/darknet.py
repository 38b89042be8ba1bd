"""Weight files published for Darknet: yolov3.weights (the whole network) and darknet53.conv.74 (the backbone)."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BACKBONE_CONVOLUTIONS = 52
PUBLISHED = {  # number of float32 values -> the file
    62_001_757: "yolov3.weights",
    40_620_640: "darknet53.conv.74",
    41_645_640: "darknet53.weights, the ImageNet classifier; its backbone is published as darknet53.conv.74",
    63_052_381: "yolov3-spp.weights, a YOLOv3 with spatial pyramid pooling",
    8_858_734: "yolov3-tiny.weights, a network of 13 convolutions",
}


def load_darknet(model: nn.Module, path: str | Path) -> str:
    """Copy the weights of a Darknet file into a `YOLOv3`. Published files fit width 1 only.

    The file is a header (version 3 x int32, images seen int64; int32 before version 0.2), then float32: per convolution
    its batch norm (bias, weight, mean, variance) or its bias, then the kernel. PyTorch's epsilon, 1e-5 added to the
    variance, is that of Darknet's GPU code.
    If the file has 80 classes and the model another number, the last layer of each head is not loaded.
    Returns what was loaded: "everything", "all but the last layers" or "backbone".
    Raises ValueError if the file has another size or values that are not finite.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        major, minor, _ = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
    header = 20 if major * 10 + minor >= 2 else 16
    count = (size - header) / 4
    layers = _layers_in_file_order(model)
    backbone = sum(tensor.numel() for tensor in sum(layers[:BACKBONE_CONVOLUTIONS], []))
    whole = sum(tensor.numel() for tensor in sum(layers, []))
    last_80 = sum(
        3 * (80 - len(model.classes)) * (head.predict.in_channels + 1) for head in model.heads
    )
    parts = {backbone: "backbone", whole + last_80: "all but the last layers", whole: "everything"}
    part = parts.get(count)
    if part is None:
        raise ValueError(_explain_size(path, size, count, list(parts), model.width))
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=header))
    if not values.isfinite().all():
        raise ValueError(
            f"{path} has the right size, {size:,} bytes, but contains NaN or infinity. Download it again."
        )
    _copy_values(
        values,
        layers if part != "backbone" else layers[:BACKBONE_CONVOLUTIONS],
        part != "all but the last layers",
    )
    return part


def _explain_size(path: Path, size: int, count: float, expected: list[int], width: float) -> str:
    """Say what a file of `count` values is, and what to do."""
    if count in PUBLISHED:
        message, advice = (
            f"{path} is {PUBLISHED[count]}.",
            "Use yolov3.weights or darknet53.conv.74.",
        )
    else:
        sizes = " or ".join(f"{20 + 4 * values:,}" for values in expected)
        message, advice = (
            f"{path} has {size:,} bytes. Darknet weights of this network have {sizes}.",
            "Download it again.",
        )
    return f"{message} {advice if width == 1 else f'Published weights fit width 1 only; this network has width {width:g}.'}"


@torch.no_grad()
def _copy_values(values: Tensor, layers: list[list[Tensor]], with_last_layers: bool) -> None:
    """Copy the values of a file into the layers, and skip the last layers of 80 classes unless `with_last_layers`."""
    for tensors in layers:
        is_last = len(tensors) == 2
        if is_last and not with_last_layers:
            values = values[3 * 85 * (tensors[1].shape[1] + 1) :]
            continue
        for tensor in tensors:
            part, values = values[: tensor.numel()].view_as(tensor), values[tensor.numel() :]
            tensor.copy_(_objectness_first(part) if is_last else part)


def _layers_in_file_order(model: nn.Module) -> list[list[Tensor]]:
    """Return the tensors of each convolution in the order of Darknet's files: five, or two without batch norm."""
    layers, kernel = [], None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.weight
            if module.bias is not None:
                layers.append([module.bias, kernel])
        elif isinstance(module, nn.BatchNorm2d):
            layers.append(
                [module.bias, module.weight, module.running_mean, module.running_var, kernel]
            )
    return layers


def _objectness_first(tensor: Tensor) -> Tensor:
    """Reorder the channels x, y, w, h, objectness, classes of three anchors to objectness, x, y, w, h, classes."""
    parts = tensor.unflatten(0, (3, -1))
    return torch.cat((parts[:, 4:5], parts[:, :4], parts[:, 5:]), dim=1).flatten(0, 1)
