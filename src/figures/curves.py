"""Figures of numbers: data sets, training curves, average precision, latency."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from src.config import Config
from src.figures.style import (
    FONT_POINTS,
    INK,
    SOFT,
    TARGET,
    TRAIN,
    VAL,
    NotebookFigure,
    colours,
    with_style,
)
from src.serving.images import get_image_size
from src.training.lr_finder import LRFinderResult
from src.training.metrics import COURSE_THRESHOLD, match, precision_recall
from src.training.report import NAMES, course_targets

PERCENTAGES = (1, 3, 10, 30, 100)  # labels of a logarithmic axis


def _bars(names: Sequence[str], values: Sequence, style: str, **labels) -> NotebookFigure:
    """Plot one horizontal bar per class in its colour, and its value in this format."""
    axis = NotebookFigure(0.23 * len(names) + 1).add_subplot(**labels)
    bars = axis.barh(names, values, color=colours(len(names)), edgecolor=INK, linewidth=0.4)
    axis.bar_label(bars, fmt=style, padding=3, fontsize=FONT_POINTS)
    axis.invert_yaxis()
    return axis.figure


@with_style
def plot_dataset_summary(records: Sequence, classes: Sequence[str]) -> NotebookFigure:
    """Plot the number of objects per class."""
    counts = np.bincount(np.concatenate([r.labels for r in records]), minlength=len(classes))
    return _bars(
        classes,
        counts,
        "{:,.0f}",
        title=f"{counts.sum():,} objects in {len(records):,} images",
        xlabel="objects",
    )


@with_style
def plot_anchors(records: Sequence, anchors: Sequence) -> NotebookFigure:
    """Plot width against height of all objects, and of the anchors, in % of the image."""
    axis = NotebookFigure(4.3, width=5.4).add_subplot(aspect="equal")
    sizes = [(r.boxes[:, 2:] - r.boxes[:, :2]) / max(get_image_size(r.image)) for r in records]
    axis.scatter(*100 * np.concatenate(sizes).T, s=6, color=SOFT, alpha=0.3, linewidths=0)
    for scale, stride, marker in zip(anchors, (32, 16, 8, 4, 2), "s^oDv", strict=False):
        label = f"anchors of stride {stride}"
        axis.scatter(*100 * np.transpose(scale), s=60, marker=marker, label=label)
    axis.set(
        title="Width and height of objects (grey) and anchors",
        xlabel="width, in % of the image size",
        ylabel="height, in % of the image size",
        xscale="log",
        yscale="log",
        xticks=PERCENTAGES,
        yticks=PERCENTAGES,
        xticklabels=PERCENTAGES,
        yticklabels=PERCENTAGES,
        xlim=(1, 110),
        ylim=(1, 110),
    )
    axis.legend()
    return axis.figure


@with_style
def plot_lr_finder(result: LRFinderResult) -> NotebookFigure:
    """Plot the loss against the learning rate, and mark the suggestion."""
    axis = NotebookFigure(3.0).add_subplot(
        title="Range test",
        xlabel="learning rate",
        ylabel="training loss (smoothed)",
        xscale="log",
    )
    axis.plot(result.rates, result.losses, color=VAL)
    axis.axvline(result.suggestion, color=TARGET, label=f"suggestion: {result.suggestion:.2g}")
    axis.legend()
    return axis.figure


@with_style
def plot_training_curves(path: str | Path, config: Config) -> NotebookFigure:
    """Plot a training from its metrics.csv: all loss terms that it has, lr, accuracies, mAP.

    Object and no-object accuracy are at the course's threshold.
    """
    rows = np.genfromtxt(path, delimiter=",", names=True, deletechars="")
    epochs = (rows["step"] + 1) * (rows["epoch"][-1] + 1) / (rows["step"][-1] + 1)
    terms = [name.removeprefix("train/") for name in rows.dtype.names if name.startswith("train/")]
    losses = [f"{term} loss" for term in terms if term != "loss"]
    rows_of_panels = (["loss", "learning rate"], losses, [*NAMES.values(), "mAP"])
    figure = NotebookFigure(7.6)
    axes = figure.subplot_mosaic([[[panels]] for panels in rows_of_panels])

    def plot(panel: str, column: str, line: str = "-", color: str = VAL, label: str = "") -> None:
        filled = ~np.isnan(rows[column])
        axes[panel].plot(epochs[filled], rows[column][filled], line, color=color, label=label)

    plot("learning rate", "lr")
    plot("mAP", "val/mAP50", ".-")
    for term in terms:
        panel = term if term == "loss" else f"{term} loss"
        plot(panel, f"train/{term}", ".--", TRAIN, "training")
        plot(panel, f"val/{term}", ".-", VAL, "validation")
    for title, axis in axes.items():
        axis.axvline(config.close_mosaic_epoch, color=SOFT, linestyle=":", label="mosaics end")
        axis.set(title=title, xlabel="epoch", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes["loss"].legend()
    for key, target in course_targets(config).items():
        threshold = "" if key == "class" else f"@{COURSE_THRESHOLD}"
        plot(NAMES[key], f"val/accuracy/{key}{threshold}", ".-", label=f"validation {threshold}")
        axis = axes[NAMES[key]]
        axis.axhline(target, color=TARGET, linestyle="--", label=f"target {target:.0%}")
        axis.set_ylim(0.9 if key == "no_object" else 0, 1)
        axis.legend()
    return figure


@with_style
def plot_precision_recall(
    predictions: np.ndarray, ground_truth: np.ndarray, per_class: Sequence[dict]
) -> NotebookFigure:
    """Plot one precision-recall curve per class, at IoU 0.5. Its area is VOC's AP.

    predictions [n, 7], ground_truth [m, 7] and per_class: as in an `Evaluation`.
    """
    columns = 4 if len(per_class) % 5 else 5
    rows = -(-len(per_class) // columns)
    figure = NotebookFigure(1.75 * rows + 0.4)
    matched = match(predictions, ground_truth)
    for label, row in enumerate(per_class):
        precision, recall = precision_recall(predictions, ground_truth, matched, label)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        axis = figure.add_subplot(
            rows,
            columns,
            label + 1,
            title=f"{row['class']}  AP {row['ap']:.2f}",
            xticks=[0, 0.5, 1],
            yticks=[0, 0.5, 1],
            xlim=(0, 1),
            ylim=(0, 1.03),
        )
        colour = colours(len(per_class))[label]
        axis.stairs(envelope, np.r_[0, recall], fill=True, facecolor=colour, edgecolor=INK)
    figure.suptitle("Precision (y) against recall (x) of each class at IoU 0.5", fontsize=9.5)
    return figure


@with_style
def plot_per_class_ap(per_class: Sequence[dict]) -> NotebookFigure:
    """Plot the average precision of each class at IoU 0.5 (VOC's, area)."""
    names = [f"{row['class']} ({row['num_gt']:,})" for row in per_class]
    values = np.array([row["ap"] for row in per_class])  # NaN without objects
    return _bars(
        names,
        np.nan_to_num(values),
        "{:.2f}",
        title=f"Average precision of each class at IoU 0.5 (mean {np.nanmean(values):.3f})",
        xlabel="average precision",
        ylabel="class (objects)",
        xlim=(0, 1.05),
    )


@with_style
def plot_confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> NotebookFigure:
    """Plot the confusion matrix [C + 1, C + 1] of `metrics.confusion`."""
    names = [*classes, "background"]
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = NotebookFigure(0.32 * len(names) + 1.2, width=min(9.0, 0.5 * len(names) + 2.4))
    axis = figure.add_subplot(
        title="Confusion matrix",
        xlabel="predicted class (colour: fraction of the row)",
        ylabel="true class",
    )
    axis.grid(visible=False)
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(counts):
        colour = "white" if fractions[row, column] > 0.55 else INK
        axis.text(
            column,
            row,
            f"{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=FONT_POINTS,
            color=colour,
        )
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    return figure


@with_style
def plot_multiscale_sizes(sizes: Sequence[int]) -> NotebookFigure:
    """Plot the image size at each step of a multi-resolution run."""
    axis = NotebookFigure(2.6).add_subplot(
        title="Image size during training",
        xlabel="step",
        ylabel="pixels",
        yticks=sorted(set(sizes)),
    )
    axis.step(range(len(sizes)), sizes, where="post", color=VAL, linewidth=1.2)
    return axis.figure


@with_style
def plot_size_comparison(
    sizes: Sequence[int], map50: dict[str, Sequence[float]], latencies: Sequence[float]
) -> NotebookFigure:
    """Plot mAP at IoU 0.5 and latency against the image size at test time.

    map50: the name of each run -> one value per size. latencies: milliseconds per image and size.
    """
    figure = NotebookFigure(3.3)
    labels = {"xlabel": "image size at test time, pixels", "xticks": sizes}
    left = figure.add_subplot(1, 2, 1, title="mAP at IoU 0.5", **labels)
    for name, values in map50.items():
        left.plot(sizes, values, marker="o", label=name)
    left.legend()
    right = figure.add_subplot(1, 2, 2, title="Latency of one image, milliseconds", **labels)
    right.plot(sizes, latencies, color=INK, marker="o")
    right.set_ylim(bottom=0)
    return figure
