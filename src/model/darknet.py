"""Weight files published for Darknet: darknet53.conv.74 (the backbone) and yolov3.weights (the whole network)."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BACKBONE_CONVOLUTIONS = 52


def load_darknet(model: nn.Module, path: str | Path) -> str:
    """Copy the weights of a Darknet file into a `YOLOv3` of width 1.

    The file is a header (version 3 x int32, images seen int64; int32 before version 0.2), then float32: for
    each convolution in order its batch norm (bias, weight, mean, variance) or its bias, then the kernel.
    If a file of 80 classes is read into a network with another class count, the three last layers stay as they are.
    Returns what was read, in words. Raises ValueError if the size of the file is none of the three.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        major, minor, _ = struct.unpack("<3i", file.read(12).ljust(12, b"\0"))
        file.seek(min(size, 20 if major * 10 + minor >= 2 else 16))
        values = torch.from_numpy(np.fromfile(file, dtype="<f4"))
    layers = _layers_in_file_order(model)
    backbone = sum(tensor.numel() for tensor in sum(layers[:BACKBONE_CONVOLUTIONS], []))
    whole = sum(tensor.numel() for tensor in sum(layers, []))
    last_80 = sum(3 * (80 - len(model.classes)) * (head.predict.in_channels + 1) for head in model.heads)
    expected = {backbone: "backbone", whole + last_80: "all but the last layers", whole: "everything"}
    if len(values) not in expected or not values.isfinite().all():
        sizes = " or ".join(f"{20 + 4 * count:,}" for count in expected)
        raise ValueError(
            f"{path} holds {size:,} bytes; Darknet weights for this net hold {sizes}. "
            "Published files fit width 1 alone; at width 1, download it again"
        )
    read = expected[len(values)]
    with torch.no_grad():
        for tensors in layers if read != "backbone" else layers[:BACKBONE_CONVOLUTIONS]:
            if len(tensors) == 2 and read == "all but the last layers":
                values = values[3 * 85 * (tensors[1].shape[1] + 1) :]
                continue
            for tensor in tensors:
                part, values = values[: tensor.numel()], values[tensor.numel() :]
                tensor.copy_(_objectness_first(part.view_as(tensor)) if len(tensors) == 2 else part.view_as(tensor))
    return read


def _layers_in_file_order(model: nn.Module) -> list[list[Tensor]]:
    """The tensors of each convolution in the order of Darknet's files; two if it has no batch norm."""
    layers, kernel = [], None
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.weight
            if module.bias is not None:
                layers.append([module.bias, kernel])
        elif isinstance(module, nn.BatchNorm2d):
            layers.append([module.bias, module.weight, module.running_mean, module.running_var, kernel])
    return layers


def _objectness_first(tensor: Tensor) -> Tensor:
    """Darknet's channels x, y, w, h, objectness, classes -> objectness, x, y, w, h, classes, for three anchors."""
    parts = tensor.unflatten(0, (3, -1))
    return torch.cat((parts[:, 4:5], parts[:, :4], parts[:, 5:]), dim=1).flatten(0, 1)
