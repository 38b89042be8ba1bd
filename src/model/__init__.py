"""The network, its boxes, and Darknet weight files."""
