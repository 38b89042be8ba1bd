"""The network, its boxes, and Darknet weight files."""

from src.model.network import YOLOv3

__all__ = ["YOLOv3"]
