"""Files of weights, and how a network starts from those of a backbone or of another detector."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BACKBONE = "backbone.safetensors"
CONFIG = "config.json"


def write_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that everybody may read; safetensors keeps it private."""
    save_file({name: value.contiguous() for name, value in weights.items()}, path, {"format": "pt"})
    path.chmod(0o644)


def save_backbone(backbone: nn.Module, folder: str | Path, width: float, metadata: dict) -> None:
    """Write the weights of a `Darknet53` in half precision, and a config.json beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(copy.deepcopy(backbone).half().state_dict(), folder / BACKBONE)
    (folder / CONFIG).write_text(json.dumps({"width": width, "metadata": metadata}, indent=1))


def format_metadata(metadata: dict) -> dict:
    """Return the metadata of weights with its metrics in one level, floats with three digits."""
    facts = {name: value for name, value in metadata.items() if name != "metrics"}
    facts |= metadata.get("metrics", {})
    return {name: f"{v:.3g}" if isinstance(v, float) else v for name, v in facts.items()}


def load_backbone(model: nn.Module, folder: str | Path) -> str:
    """Copy a pretrained backbone into a `YOLOv3` of the same width. Returns what was copied.

    Raises ValueError if the widths differ.
    """
    width = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["width"]
    if width != model.width:
        raise ValueError(
            f"The backbone in {folder} has width {width:g}, but the network has width "
            f"{model.width:g}. Set Config.width={width:g}, or pretrain at width {model.width:g}."
        )
    model.backbone.load_state_dict(load_file(Path(folder) / BACKBONE))
    return "the backbone"


@torch.no_grad()
def transfer_weights(model: nn.Module, source: nn.Module) -> str:
    """Copy a trained `YOLOv3` into one of other classes. Returns what was copied.

    Class logits are copied for the classes that both know; the others keep their initial weights.
    Anchors keep the source's pixels. Raises ValueError if the widths differ.
    """
    if source.width != model.width:
        raise ValueError(
            f"The pretrained weights have width {source.width:g}, but the network has width "
            f"{model.width:g}. Set Config.width={source.width:g}."
        )
    weights = {name: v for name, v in source.state_dict().items() if ".predict." not in name}
    model.load_state_dict(weights, strict=False)
    common = [name for name in model.classes if name in source.classes]
    rows = [*range(5), *(5 + model.classes.index(name) for name in common)]
    source_rows = [*range(5), *(5 + source.classes.index(name) for name in common)]
    for head, source_head in zip(model.heads, source.heads, strict=True):
        for name in ("weight", "bias"):
            target = getattr(head.predict, name).unflatten(0, (head.num_anchors, -1))
            values = getattr(source_head.predict, name).unflatten(0, (head.num_anchors, -1))
            target[:, rows] = values[:, source_rows].to(target)
    model.set_anchors(source.anchors_at(model.image_size))
    return f"all layers, anchors, and the logits of {len(common)} of {len(model.classes)} classes"
