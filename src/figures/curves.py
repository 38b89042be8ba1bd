"""Figures of numbers: data sets, training curves, average precision, latency."""

import csv
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.config import Config
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
    counted,
    with_style,
)
from src.model.network import STRIDES
from src.serving.images import get_image_size
from src.training.metrics import THRESHOLDS, match, precision_recall
from src.training.report import NAMES, course_targets


def _box_sizes(records: Sequence) -> np.ndarray:
    """Return width and height of all boxes [n, 2], as fractions of the letterboxed image."""
    sizes = [
        (record.boxes[:, 2:] - record.boxes[:, :2]) / max(get_image_size(record.image))
        for record in records
    ]
    return np.concatenate([np.zeros((0, 2)), *sizes])


@with_style
def plot_dataset_summary(records: Sequence, classes: Sequence[str]) -> Figure:
    """Plot the number of objects per class."""
    figure = NotebookFigure(max(2.2, 0.22 * len(classes) + 0.9))
    axis = figure.subplots()
    counts = np.bincount(np.concatenate([r.labels for r in records]), minlength=len(classes))
    bars = axis.barh(classes, counts, color=colours(len(classes)), edgecolor=INK, linewidth=0.4)
    axis.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=FONT_POINTS, color=SOFT)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    title = f"{counted(counts.sum(), 'object')} in {counted(len(records), 'image')}"
    axis.set(title=title, xlabel="objects")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@with_style
def plot_anchors(records: Sequence, anchors: Sequence) -> Figure:
    """Plot width against height of all objects, and of the anchors [3][3]."""
    figure = NotebookFigure(4.3, width=5.4)
    axis = figure.subplots()
    axis.scatter(*_box_sizes(records).T, s=6, color=SOFT, alpha=0.3, linewidths=0)
    for scale, stride, colour, marker in zip(anchors, STRIDES, SERIES, "s^o", strict=True):
        style = {"s": 75, "c": colour, "marker": marker, "edgecolors": "white", "zorder": 3}
        axis.scatter(*np.transpose(scale), label=f"anchors of stride {stride}", **style)
    axis.set(xscale="log", yscale="log", xlim=(0.012, 1.1), ylim=(0.012, 1.1), aspect="equal")
    axis.set(xlabel="width, in % of the image size", ylabel="height, in % of the image size")
    axis.set_title("Width and height of objects (grey) and anchors")
    for side in (axis.xaxis, axis.yaxis):
        side.set_ticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["2", "5", "10", "20", "50", "100"])
        side.set_ticks([], minor=True)
    axis.legend(loc="lower right", handletextpad=0.2)
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
    """Read one column of a metrics.csv: (x, values), with x = "epoch" or "step".

    Both are empty if the column is missing. The last of several rows with the same x counts (a
    resumed run). An incomplete last line is ignored (a run in progress).
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
def plot_training_curves(path: str | Path, config: Config) -> Figure:
    """Plot a finished or running training from its metrics.csv: all loss terms that it has.

    config: settings of the run, for the course targets and the epoch in which mosaics end.
    """
    with open(path, encoding="utf-8") as file:
        header = next(csv.reader(file))
    losses = [name for name in header if name.startswith("train/")]
    terms = [name for name in losses if name != "train/loss"]
    layout = [["train/loss", "lr"], terms, [*NAMES, "map"]]
    figure = NotebookFigure(7.6)
    axes = figure.subplot_mosaic([[[row]] for row in layout if row])
    for name in ("train/loss", *terms):
        _loss(axes[name], path, name.removeprefix("train/"))
    axes["train/loss"].set_title("Total loss")
    for key, target in course_targets(config).items():
        _accuracy(axes[key], path, key, target)
    _curve(axes["map"], path, "val/mAP50", color=VAL)
    axes["map"].set(title="mAP at IoU 0.5", ylim=(0, 1))
    rates = axes.pop("lr")
    rates.plot(*read_curve(path, "lr", "step"), color=INK)
    rates.set(title="Learning rate (OneCycle)", xlabel="step")
    rates.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _from_zero(rates)
    for axis in axes.values():
        axis.axvline(config.close_mosaic_epoch, color=SOFT, linestyle=":", label="mosaics end")
        axis.set(xlabel="epoch", xlim=(0, max(1, axis.get_xlim()[1])))
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes["train/loss"].legend()
    return figure


def _loss(axis: Axes, path: str | Path, term: str) -> None:
    """Plot one loss term of training and validation."""
    dashed = (0, (4, 1.2))
    _curve(axis, path, f"train/{term}", color=TRAIN, linestyle=dashed, label="training (mosaics)")
    _curve(axis, path, f"val/{term}", color=VAL, label="validation")
    axis.set_title(f"{term} loss".capitalize())
    _from_zero(axis)


def _from_zero(axis: Axes) -> None:
    """Start the y axis at 0 and end it slightly above the highest value."""
    highest = axis.dataLim.y1
    axis.set_ylim(0, 1.08 * highest if 0 < highest < np.inf else 1)


def _accuracy(axis: Axes, path: str | Path, key: str, target: float) -> None:
    """Plot one accuracy in % with its target, at both objectness thresholds if it has them."""
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
    axis.set_title(NAMES[key].capitalize())
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
        x = np.r_[recall[:1] * 0, recall]  # from recall 0; empty without predictions
        y = np.r_[envelope[:1], envelope]
        axis.fill_between(x, y, step="pre", color=colours(len(per_class))[label], alpha=0.55)
        axis.plot(x, y, drawstyle="steps-pre", color=INK, linewidth=1)
        axis.set(xlim=(0, 1), ylim=(0, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axis.set_title(f"{row['class']}  AP {row['ap']:.2f}", fontsize=9)
    for axis in axes[len(per_class) :]:
        axis.set_axis_off()
    figure.suptitle("Precision and recall of each class at IoU 0.5", fontsize=9.5, weight="bold")
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


@with_style
def plot_per_class_ap(per_class: Sequence[dict]) -> Figure:
    """Plot the average precision of each class at IoU 0.5 (VOC's, area), and their mean."""
    figure = NotebookFigure(max(2.6, 0.23 * len(per_class) + 0.8))
    axis = figure.subplots()
    names = [f"{row['class']} ({row['num_gt']:,})" for row in per_class]
    values = np.array([row["ap"] for row in per_class])
    mean = np.nanmean(values)
    axis.barh(
        names, np.nan_to_num(values), color=colours(len(per_class)), edgecolor=INK, linewidth=0.4
    )
    for row, value in enumerate(values):
        text = "no objects" if np.isnan(value) else f"{value:.2f}"
        axis.text(1.02, row, text, va="center", fontsize=FONT_POINTS)  # no line crosses it there
    axis.axvline(mean, color=INK, linestyle="--", linewidth=1.2, label=f"mean {mean:.3f}")
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(
        title="Average precision of each class at IoU 0.5",
        xlim=(0, 1),
        xlabel="average precision",
        ylabel="class (validation objects)",
    )
    return figure


@with_style
def plot_confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Plot the confusion matrix [C + 1, C + 1] of `metrics.confusion`."""
    names = [*classes, "background"]
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = NotebookFigure(0.32 * len(names) + 1.2, width=min(9.0, 0.5 * len(names) + 2.4))
    axis = figure.subplots()
    axis.grid(visible=False)
    axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if fractions[row, column] > 0.55 else INK
        style = {"ha": "center", "va": "center", "fontsize": FONT_POINTS, "color": colour}
        axis.text(column, row, f"{counts[row, column]:,}", **style)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.axhline(len(classes) - 0.5, color=SOFT, linewidth=0.8)
    axis.axvline(len(classes) - 0.5, color=SOFT, linewidth=0.8)
    axis.set(title="Confusion matrix", ylabel="true class")
    axis.set_xlabel("predicted class (colour: fraction of the row)")
    return figure


@with_style
def plot_multiscale_sizes(sizes: Sequence[int]) -> Figure:
    """Plot the image size at each step of a multi-resolution run, and how often each occurs."""
    figure = NotebookFigure(2.6)
    axis = figure.subplots()
    axis.step(np.arange(len(sizes)), sizes, where="post", color=VAL, linewidth=1.2)
    unique, counts = np.unique(sizes, return_counts=True)
    names = [
        f"{size} ({count / len(sizes):.0%})" for size, count in zip(unique, counts, strict=True)
    ]
    axis.set(xlabel="step", ylabel="image size, pixels (steps)", title="Image size during training")
    axis.set_yticks(unique, names)
    return figure


@with_style
def plot_size_comparison(
    sizes: Sequence[int], map50: dict[str, Sequence[float]], latencies: Sequence[float]
) -> Figure:
    """Plot mAP at IoU 0.5 and latency against the image size at test time.

    map50: the name of each run -> one value per size. latencies: milliseconds per image and size.
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
    bottom = max(0, np.floor(100 * (low - margin)) / 100)
    top = min(1, np.ceil(100 * (high + margin)) / 100)
    axis_range = f"(axis from {bottom:.2f} to {top:.2f})"
    left.set(title="Accuracy", ylabel=f"mAP at IoU 0.5 {axis_range}", ylim=(bottom, top))
    right.set(title="Latency of one image", ylabel="milliseconds", ylim=(0, None))
    for axis in (left, right):
        axis.set(xlabel="image size at test time, pixels", xticks=sizes)
    left.legend(loc="best")
    return figure
