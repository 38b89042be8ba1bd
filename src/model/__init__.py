"""The network, and how its numbers become boxes."""

from src.model.network import YOLOv3

__all__ = ["YOLOv3"]
