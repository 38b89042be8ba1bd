"""Figures of numbers: data sets, training curves, average precision, latency."""

import csv
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.figures.style import (
    FONT_POINTS,
    INK,
    SERIES,
    SOFT,
    TARGET,
    TRAIN,
    VAL,
    NotebookFigure,
    colours,
    with_style,
)
from src.model.network import STRIDES
from src.serving.images import get_image_size
from src.training.metrics import THRESHOLDS, match, precision_recall
from src.training.report import NAMES


def _box_sizes(records: Sequence) -> np.ndarray:
    """Return width and height of all boxes [n, 2], as fractions of the letterboxed image."""
    sizes = [
        (record.boxes[:, 2:] - record.boxes[:, :2]) / max(get_image_size(record.image))
        for record in records
    ]
    return np.concatenate([np.zeros((0, 2)), *sizes])


@with_style
def plot_dataset_summary(records: Sequence, classes: Sequence[str]) -> Figure:
    """Plot the number of objects per class, and the sizes of the objects."""
    figure = NotebookFigure(max(2.8, 0.22 * len(classes) + 0.9))
    left, right = figure.subplots(1, 2)
    counts = np.bincount(np.concatenate([r.labels for r in records]), minlength=len(classes))
    bars = left.barh(classes, counts, color=colours(len(classes)), edgecolor=INK, linewidth=0.4)
    left.bar_label(
        bars, [f"{count:,}" for count in counts], padding=3, fontsize=FONT_POINTS, color=SOFT
    )
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(title=f"{counts.sum():,} objects in {len(records):,} images", xlabel="objects")
    left.margins(x=0.12)
    sizes = np.sqrt(_box_sizes(records).prod(axis=1))
    right.hist(sizes, bins=np.geomspace(0.01, 1, 31), color=VAL, edgecolor="white", linewidth=0.5)
    right.set(
        title="Object size", xlabel="√(width × height), in % of the image size", ylabel="objects"
    )
    right.set_xscale("log")
    right.set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["1", "3", "10", "30", "100"])
    right.set_xticks([], minor=True)
    right.grid(axis="x", visible=False)
    return figure


@with_style
def plot_anchors(records: Sequence, anchors: Sequence) -> Figure:
    """Plot width against height of all objects with the nine anchors [3][3] (width, height), and the anchors as boxes."""
    figure = NotebookFigure(4.3)
    left, right = figure.subplots(1, 2)
    left.scatter(*_box_sizes(records).T, s=6, color=SOFT, alpha=0.3, linewidths=0)
    for scale, (stride, colour, marker) in enumerate(zip(STRIDES, SERIES, "s^o", strict=True)):
        name = f"anchors of stride {stride}"
        left.scatter(
            *np.transpose(anchors[scale]),
            s=75,
            c=colour,
            marker=marker,
            edgecolors="white",
            label=name,
            zorder=3,
        )
        for width, height in anchors[scale]:
            corner = 0.5 - width / 2, 0.5 - height / 2
            right.add_patch(
                Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.8)
            )
    left.set(xscale="log", yscale="log", xlim=(0.012, 1.1), ylim=(0.012, 1.1), aspect="equal")
    left.set(xlabel="width, in % of the image size", ylabel="height, in % of the image size")
    left.set_title("Width and height of the objects (grey)")
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["2", "5", "10", "20", "50", "100"])
        axis.set_ticks([], minor=True)
    left.legend(loc="lower right", handletextpad=0.2)
    right.set(
        xlim=(0, 1),
        ylim=(1, 0),
        aspect="equal",
        title="The nine anchors, centred in an image",
        xticks=[],
        yticks=[],
    )
    for spine in right.spines.values():
        spine.set_visible(True)
    return figure


@with_style
def plot_lr_finder(result) -> Figure:
    """Plot the loss of a `LRFinderResult` against the learning rate, and mark the suggestion."""
    figure = NotebookFigure(3.0)
    axis = figure.subplots()
    axis.plot(result.rates, result.losses, color=VAL)
    axis.axvline(result.suggestion, color=TARGET, linestyle="--", linewidth=1.4)
    low, high = (
        np.nanmin(result.losses),
        max(result.losses[: result.rates.index(result.suggestion) + 1]),
    )
    axis.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="training loss (smoothed)",
        title="Learning-rate range test",
    )
    span = max(high - low, 0.01 * abs(high))
    axis.set_ylim(low - 0.15 * span, high + 0.25 * span)
    axis.annotate(
        f"  suggestion: {result.suggestion:.2g}",
        (result.suggestion, 0.9),
        xycoords=("data", "axes fraction"),
        color=TARGET,
        fontweight="bold",
    )
    return figure


def read_curve(path: str | Path, name: str, x: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
    """Read one column of a metrics.csv: (x, values), with x = "epoch" or "step". Both are empty if the column is missing.

    The last of several rows with the same x counts (a resumed run). An incomplete last line is ignored (a run in progress).
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    values = {int(row[x]): float(row[name]) for row in rows if row.get(x) and row.get(name)}
    order = sorted(values)
    return np.array(order, dtype=int), np.array([values[key] for key in order])


def _curve(axis: Axes, path: str | Path, name: str, **style) -> None:
    """Plot one column against the epoch, counted from 1."""
    epochs, values = read_curve(path, name)
    axis.plot(epochs + 1, values, marker="o" if 0 < len(values) < 3 else "", markersize=4, **style)


@with_style
def plot_training_curves(path: str | Path, targets: dict[str, float]) -> Figure:
    """Plot a finished or running training from its metrics.csv.

    targets: the course targets of "class", "no_object" and "object" accuracy, in 0..1.
    """
    figure = NotebookFigure(7.6)
    with open(path, encoding="utf-8") as file:
        header = next(csv.reader(file))
    terms = [name[6:] for name in header if name.startswith("train/") and name != "train/loss"]
    titles = {
        "loss": "Total loss",
        **{f"{term} loss": f"{term} loss".capitalize() for term in terms},
    }
    layout = [["loss", "lr"], [f"{term} loss" for term in terms], [*NAMES, "map"]]
    axes = figure.subplot_mosaic([[[row]] for row in layout if row])
    for key, title in titles.items():
        name, style = key.removesuffix(" loss"), {"color": TRAIN, "linestyle": (0, (4, 1.2))}
        _curve(axes[key], path, f"train/{name}", label="training (mosaics)", **style)
        _curve(axes[key], path, f"val/{name}", color=VAL, label="validation")
        axes[key].set_title(title)
        _from_zero(axes[key])
    axes["loss"].legend()
    for key, name in NAMES.items():
        _accuracy(axes[key], path, key, targets[key])
        axes[key].set_title(name.capitalize())
    _curve(axes["map"], path, "val/mAP50", color=VAL)
    axes["map"].set(title="mAP at IoU 0.5", ylim=(0, 1))
    axes["lr"].plot(*read_curve(path, "lr", "step"), color=INK)
    axes["lr"].set(title="Learning rate (OneCycle)", xlabel="step")
    _from_zero(axes["lr"])
    for key, axis in axes.items():
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if key != "lr":
            axis.set_xlabel("epoch")
            axis.set_xlim(0, None if axis.get_xlim()[1] > 1 else 1)
    return figure


def _from_zero(axis: Axes) -> None:
    """Start the y axis at 0 and end it slightly above the highest value."""
    highest = axis.dataLim.y1
    axis.set_ylim(0, 1.08 * highest if 0 < highest < np.inf else 1)


def _accuracy(axis: Axes, path: str | Path, key: str, target: float) -> None:
    """Plot one of the three accuracies in %, at both objectness thresholds (class accuracy has none), and its target."""
    if key == "class":
        _curve(axis, path, "val/accuracy/class", color=VAL)
    else:
        for threshold, line in zip(THRESHOLDS, ("-", (0, (1, 1))), strict=True):
            style = {"color": VAL, "linestyle": line, "label": f"threshold {threshold}"}
            _curve(axis, path, f"val/accuracy/{key}@{threshold}", **style)
    axis.axhline(
        target, color=TARGET, linestyle="--", linewidth=1.2, label=f"target: {100 * target:.0f}%"
    )
    axis.legend(loc="best")
    axis.set_ylim(0.9 if key == "no_object" else 0, 1.005)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@with_style
def plot_precision_recall(
    predictions: np.ndarray, ground_truth: np.ndarray, per_class: Sequence[dict]
) -> Figure:
    """Plot one precision-recall curve per class, at IoU 0.5.

    predictions [n, 7], ground_truth [m, 7] and per_class: as in an `Evaluation`.
    """
    columns = 4 if len(per_class) % 5 else 5
    rows = -(-len(per_class) // columns)
    figure = NotebookFigure(1.75 * rows + 0.4)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    matched = match(predictions, ground_truth)
    for label, (axis, row) in enumerate(zip(axes, per_class, strict=False)):
        precision, recall = precision_recall(predictions, ground_truth, matched, label)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]  # VOC's AP is the area under it
        x, y = (
            np.r_[recall[:1] * 0, recall],
            np.r_[envelope[:1], envelope],
        )  # from recall 0; empty without predictions
        axis.fill_between(x, y, step="pre", color=colours(len(per_class))[label], alpha=0.55)
        axis.plot(x, y, drawstyle="steps-pre", color=INK, linewidth=1)
        axis.set(xlim=(0, 1), ylim=(0, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axis.set_title(f"{row['class']}  AP {row['ap']:.2f}", fontsize=9)
    for axis in axes[len(per_class) :]:
        axis.set_axis_off()
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


@with_style
def plot_per_class_ap(per_class: Sequence[dict]) -> Figure:
    """Plot the average precision of each class at IoU 0.5 (VOC's area under the curve), and their mean."""
    figure = NotebookFigure(max(2.6, 0.23 * len(per_class) + 0.8))
    axis = figure.subplots()
    names = [f"{row['class']} ({row['num_gt']:,})" for row in per_class]
    values = np.array([row["ap"] for row in per_class])
    mean = np.nanmean(values)
    bars = axis.barh(
        names, np.nan_to_num(values), color=colours(len(per_class)), edgecolor=INK, linewidth=0.4
    )
    texts = ["no objects" if np.isnan(value) else f"{value:.2f}" for value in values]
    white_background = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axis.bar_label(bars, texts, padding=3, fontsize=FONT_POINTS, bbox=white_background, zorder=4)
    axis.axvline(mean, color=INK, linestyle="--", linewidth=1.2)
    axis.annotate(
        f"mean {mean:.3f}",
        (mean, 1),
        xycoords=("data", "axes fraction"),
        ha="center",
        va="bottom",
        fontsize=FONT_POINTS,
    )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(
        xlim=(0, 1.06),
        xlabel="average precision at IoU 0.5",
        ylabel="class (validation objects)",
        xticks=np.arange(0, 1.1, 0.2),
    )
    return figure


@with_style
def plot_confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Plot the confusion matrix [C + 1, C + 1] of `metrics.confusion`; the colour shows the fraction of a row."""
    names = [*classes, "background"]
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = NotebookFigure(0.32 * len(names) + 1.2, width=min(9.0, 0.5 * len(names) + 2.4))
    axis = figure.subplots()
    axis.grid(visible=False)
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
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
    axis.tick_params(length=0)
    axis.axhline(len(classes) - 0.5, color=SOFT, linewidth=0.8)
    axis.axvline(len(classes) - 0.5, color=SOFT, linewidth=0.8)
    axis.set(xlabel="predicted class (colour: fraction of the row)", ylabel="true class")
    return figure


@with_style
def plot_multiscale_sizes(sizes: Sequence[int]) -> Figure:
    """Plot the image size at each step of a multi-resolution run, and the fraction of the steps at each size."""
    figure = NotebookFigure(2.8)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    left.step(np.arange(len(sizes)), sizes, where="post", color=VAL, linewidth=1.2)
    left.set(
        xlabel="step",
        ylabel="image size, pixels",
        title="Image size during training",
        yticks=sorted(set(sizes)),
    )
    unique, counts = np.unique(sizes, return_counts=True)
    gap = np.diff(unique).min() if len(unique) > 1 else 32
    bars = right.barh(unique, counts / len(sizes), height=0.7 * gap, color=VAL)
    right.bar_label(
        bars, [f"{count / len(sizes):.0%}" for count in counts], padding=3, fontsize=FONT_POINTS
    )
    right.set(title="Steps", xticks=[])
    right.margins(x=0.3)
    right.grid(visible=False)
    return figure


@with_style
def plot_size_comparison(
    sizes: Sequence[int], map50: dict[str, Sequence[float]], latencies: Sequence[float]
) -> Figure:
    """Plot mAP at IoU 0.5 and latency against the image size at test time.

    map50: the name of each run -> one value per size. latencies: milliseconds per image, one per size.
    """
    figure = NotebookFigure(3.3)
    left, right = figure.subplots(1, 2)
    style = {"markersize": 6, "markeredgecolor": "white"}
    for (name, values), colour, marker in zip(
        map50.items(), cycle(SERIES), cycle("os^D"), strict=False
    ):
        left.plot(sizes, values, color=colour, marker=marker, label=name, **style)
    right.plot(sizes, latencies, color=INK, marker="o", **style)
    low, high = min(map(min, map50.values())), max(map(max, map50.values()))
    margin = max(0.01, 0.25 * (high - low))
    limits = (
        max(0, np.floor(100 * (low - margin)) / 100),
        min(1, np.ceil(100 * (high + margin)) / 100),
    )
    left.set(
        title="Accuracy",
        ylabel=f"mAP at IoU 0.5 (axis from {limits[0]:.2f} to {limits[1]:.2f})",
        ylim=limits,
    )
    right.set(title="Latency of one image", ylabel="milliseconds", ylim=(0, None))
    for axis in (left, right):
        axis.set(xlabel="image size at test time, pixels", xticks=sizes)
    left.legend(loc="best")
    return figure
