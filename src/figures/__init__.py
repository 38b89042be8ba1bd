"""Figures: they draw and decide nothing."""
