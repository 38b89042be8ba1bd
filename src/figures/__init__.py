"""Figures of images and numbers."""
