"""Inference: reading of images, prediction, Grad-CAM, the app and its Space."""
