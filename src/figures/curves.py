"""Figures of numbers: data sets, training curves, precision, speed. They show what they get, and decide nothing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from src.figures.style import INK, SCALES, SOFT, TARGET, TRAIN, VAL, NotebookFigure, colours, with_style
from src.model.network import STRIDES
from src.serving.images import image_size_of
from src.training.callbacks import read_metrics
from src.training.metrics import THRESHOLDS, match, precision_recall
from src.training.report import NAMES

TERMS = {
    "box_loss": "box",
    "object_loss": "objectness, positives",
    "no_object_loss": "objectness, background",
    "class_loss": "class",
}


def _box_sides(records: Sequence) -> np.ndarray:
    """Width and height of every object [n, 2], in sides of the square that its picture is letterboxed into."""
    sides = [(r.boxes[:, 2:] - r.boxes[:, :2]) / max(image_size_of(r.image)) for r in records]
    return np.concatenate([np.zeros((0, 2)), *sides])


@with_style
def plot_dataset_summary(records: Sequence, classes: Sequence[str]) -> Figure:
    """How many objects each class has, and how large objects are."""
    figure = NotebookFigure(max(2.8, 0.22 * len(classes) + 0.9))
    left, right = figure.subplots(1, 2)
    counts = np.bincount(np.concatenate([r.labels for r in records]), minlength=len(classes))
    bars = left.barh(classes, counts, color=colours(len(classes)), edgecolor=INK, linewidth=0.4)
    left.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=8, color=SOFT)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set(title=f"{counts.sum():,} objects in {len(records):,} pictures", xlabel="objects")
    left.margins(x=0.12)
    sizes = np.sqrt(_box_sides(records).prod(axis=1))
    right.hist(sizes, bins=np.geomspace(0.01, 1, 31), color=VAL, edgecolor="white", linewidth=0.5)
    right.set(title="How large they are", xlabel="√(width × height), in % of the picture's side", ylabel="objects")
    right.set_xscale("log")
    right.set_xticks([0.01, 0.03, 0.1, 0.3, 1], ["1", "3", "10", "30", "100"])
    right.set_xticks([], minor=True)
    right.grid(axis="x", visible=False)
    return figure


@with_style
def plot_anchors(records: Sequence, anchors: Sequence) -> Figure:
    """Shapes of all objects under the nine anchors [3][3] (width, height), and the anchors as boxes."""
    figure = NotebookFigure(4.3)
    left, right = figure.subplots(1, 2)
    left.scatter(*_box_sides(records).T, s=6, color=SOFT, alpha=0.3, linewidths=0)
    for scale, (stride, colour, marker) in enumerate(zip(STRIDES, SCALES, "s^o", strict=True)):
        name = f"anchors of stride {stride}"
        left.scatter(*np.transpose(anchors[scale]), s=75, c=colour, marker=marker, edgecolors="white", label=name, zorder=3)
        for width, height in anchors[scale]:
            corner = 0.5 - width / 2, 0.5 - height / 2
            right.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=1.8))
    left.set(xscale="log", yscale="log", xlim=(0.012, 1.1), ylim=(0.012, 1.1), aspect="equal")
    left.set(xlabel="width, in % of the picture's side", ylabel="height, in % of the picture's side")
    left.set_title("Shapes of the objects (grey)")
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["2", "5", "10", "20", "50", "100"])
        axis.set_ticks([], minor=True)
    left.legend(loc="lower right", handletextpad=0.2)
    right.set(xlim=(0, 1), ylim=(1, 0), aspect="equal", title="The nine anchors in a picture", xticks=[], yticks=[])
    for spine in right.spines.values():
        spine.set_visible(True)
    return figure


@with_style
def plot_lr_finder(found) -> Figure:
    """A `LRFinderResult`: loss against learning rate, the suggestion marked."""
    figure = NotebookFigure(3.0)
    axis = figure.subplots()
    axis.plot(found.rates, found.losses, color=VAL)
    axis.axvline(found.suggestion, color=TARGET, linestyle="--", linewidth=1.4)
    low, high = np.nanmin(found.losses), max(found.losses[: found.rates.index(found.suggestion) + 1])
    axis.set(xscale="log", xlabel="learning rate", ylabel="training loss (smoothed)", title="Learning-rate range test")
    span = max(high - low, 0.01 * abs(high))
    axis.set_ylim(low - 0.15 * span, high + 0.25 * span)
    axis.annotate(f"  suggestion: {found.suggestion:.2g}", (found.suggestion, 0.9), xycoords=("data", "axes fraction"),
                  color=TARGET, fontweight="bold")  # fmt: skip
    return figure


def read_curve(path: str | Path, name: str, x: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
    """Column `name` of a metrics.csv against "epoch" or "step"; both empty where it is not there (yet).

    Of rows with the same x the last counts, so a resumed run has no seam; a line still being written is left out.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = read_metrics(line for line in lines if line.endswith("\n"))
    values = {int(row[x]): float(row[name]) for row in rows if row.get(x) and row.get(name)}
    order = sorted(values)
    return np.array(order, dtype=int), np.array([values[key] for key in order])


def _curve(axis: Axes, path: str | Path, name: str, **style) -> None:
    """One column against the epoch, counted from 1, as far as it goes."""
    epochs, values = read_curve(path, name)
    axis.plot(epochs + 1, values, marker="o" if 0 < len(values) < 3 else "", markersize=4, **style)


@with_style
def plot_training_curves(path: str | Path, targets: dict[str, float]) -> Figure:
    """A run drawn from its metrics.csv alone, finished or not.

    targets: parts of 1 asked of "class", "no_object" and "object" accuracy.
    """
    figure = NotebookFigure(7.6)
    layout = [["loss", "loss", "rate", "rate"], [*TERMS], ["a class", "a no_object", "a object", "map"]]
    axes = figure.subplot_mosaic(layout)
    for key, title in {"loss": "Total loss", **{term: f"Loss: {name}" for term, name in TERMS.items()}}.items():
        _curve(axes[key], path, f"train/{key}", color=TRAIN, linestyle=(0, (4, 1.2)), label="training, mosaics")
        _curve(axes[key], path, f"val/{key}", color=VAL, label="held out")
        axes[key].set_title(title)
        _from_zero(axes[key])
    axes["loss"].legend()
    for key, name in NAMES.items():
        _accuracy(axes[f"a {key}"], path, key, targets[key])
        axes[f"a {key}"].set_title(name.capitalize())
    _curve(axes["map"], path, "val/mAP50", color=VAL)
    axes["map"].set(title="mAP at IoU 0.5", ylim=(0, 1))
    _rate(axes["rate"], path)
    for key, axis in axes.items():
        if key != "rate":
            axis.set_xlabel("epoch")
            axis.set_xlim(0, None if axis.get_xlim()[1] > 1 else 1)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return figure


def _rate(axis: Axes, path: str | Path) -> None:
    """The learning rate; its column bears the name of the optimizer and of a parameter group."""
    with open(path, encoding="utf-8") as file:
        names = [name for name in file.readline().strip().split(",") if name.startswith("lr-")]
    for name in names[:1]:
        axis.plot(*read_curve(path, name, "step"), color=INK)
    axis.set(title="Learning rate (OneCycle)", xlabel="step")
    _from_zero(axis)


def _from_zero(axis: Axes) -> None:
    """Start the y axis at 0 and leave a little room above the highest value."""
    highest = axis.dataLim.y1
    axis.set_ylim(0, 1.08 * highest if 0 < highest < np.inf else 1)


def _accuracy(axis: Axes, path: str | Path, key: str, wanted: float) -> None:
    """One of the three accuracies in %, at both thresholds of objectness where it has any, and what the assignment asks."""
    if key == "class":
        _curve(axis, path, "val/accuracy/class", color=VAL)
    else:
        for threshold, line in zip(THRESHOLDS, ("-", (0, (1, 1))), strict=True):
            style = {"color": VAL, "linestyle": line, "label": f"threshold {threshold}"}
            _curve(axis, path, f"val/accuracy/{key}@{threshold}", **style)
    axis.axhline(wanted, color=TARGET, linestyle="--", linewidth=1.2, label=f"asked: {100 * wanted:.0f}%")
    axis.legend(loc="lower right")
    axis.set_ylim(0.9 if key == "no_object" else 0, 1.005)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


@with_style
def plot_precision_recall(found: np.ndarray, truth: np.ndarray, table: Sequence[dict]) -> Figure:
    """One panel a class, at IoU 0.5; found [n, 7], truth [m, 7], table as in an `Evaluation`."""
    columns = 4 if len(table) % 5 else 5
    rows = -(-len(table) // columns)
    figure = NotebookFigure(1.75 * rows + 0.4)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    matched = match(found, truth)
    for label, (axis, row) in enumerate(zip(axes, table, strict=False)):
        precision, recall = precision_recall(found, truth, matched, label)
        best = np.maximum.accumulate(precision[::-1])[::-1]  # the curve that "area" measures
        x, y = np.r_[recall[:1] * 0, recall], np.r_[best[:1], best]  # from recall 0; empty where nothing was found
        axis.fill_between(x, y, step="pre", color=colours(len(table))[label], alpha=0.55)
        axis.plot(x, y, drawstyle="steps-pre", color=INK, linewidth=1)
        axis.set(xlim=(0, 1), ylim=(0, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axis.set_title(f"{row['class']}  AP {row['ap']:.2f}", fontsize=9)
    for axis in axes[len(table) :]:
        axis.set_axis_off()
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


@with_style
def plot_per_class_ap(table: Sequence[dict]) -> Figure:
    """Average precision of every class at IoU 0.5, VOC's area under the curve, and their mean."""
    figure = NotebookFigure(max(2.6, 0.23 * len(table) + 0.8))
    axis = figure.subplots()
    names = [f"{row['class']} ({row['num_gt']:,})" for row in table]
    values = np.array([row["ap"] for row in table])
    bars = axis.barh(names, np.nan_to_num(values), color=colours(len(table)), edgecolor=INK, linewidth=0.4)
    texts = [f"{value:.2f}" if value == value else "no objects" for value in values]
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axis.bar_label(bars, texts, padding=3, fontsize=8, bbox=clear, zorder=4)
    mean = np.nanmean(values)
    axis.axvline(mean, color=INK, linestyle="--", linewidth=1.2)
    axis.annotate(f"mean {mean:.3f}", (mean, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8.5)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(
        xlim=(0, 1.06),
        xlabel="average precision at IoU 0.5",
        ylabel="class (held-out objects)",
        xticks=np.arange(0, 1.1, 0.2),
    )
    return figure


@with_style
def plot_confusion_matrix(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts [C + 1, C + 1] as `metrics.confusion` gives them; shades are parts of a row."""
    names = [*classes, "nothing"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = NotebookFigure(0.32 * len(names) + 1.2, width=min(9.0, 0.5 * len(names) + 2.4))
    axis = figure.subplots()
    axis.grid(visible=False)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[row, column] > 0.55 else INK
        axis.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7.5, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(length=0)
    axis.axhline(len(classes) - 0.5, color=SOFT, linewidth=0.8)
    axis.axvline(len(classes) - 0.5, color=SOFT, linewidth=0.8)
    axis.set(xlabel="found as   ·   the darker, the larger a part of its row", ylabel="what is there")
    return figure


@with_style
def plot_multiscale_sizes(sides: Sequence[int]) -> Figure:
    """The side of the batch at each step of a multi-resolution run, and how often each was drawn."""
    figure = NotebookFigure(2.8)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    left.step(np.arange(len(sides)), sides, where="post", color=VAL, linewidth=1.2)
    left.set(xlabel="step", ylabel="side of the batch, pixels", title="Drawn as training goes", yticks=sorted(set(sides)))
    drawn, counts = np.unique(sides, return_counts=True)
    gap = np.diff(drawn).min() if len(drawn) > 1 else 32
    bars = right.barh(drawn, counts / len(sides), height=0.7 * gap, color=VAL)
    right.bar_label(bars, [f"{100 * share:.0f} %" for share in counts / len(sides)], padding=3, fontsize=8)
    right.set(title="Part of the steps", xticks=[])
    right.margins(x=0.3)
    right.grid(visible=False)
    return figure


@with_style
def plot_size_comparison(runs: dict[str, Sequence[dict]]) -> Figure:
    """Runs by name, each a row for every test size: "size" (pixels), "mAP50" and "milliseconds" (an image)."""
    figure = NotebookFigure(3.3)
    left, right = figure.subplots(1, 2)
    for (name, rows), colour, marker in zip(runs.items(), SCALES, "os^", strict=False):
        sizes = [row["size"] for row in rows]
        style = {"color": colour, "marker": marker, "markersize": 6, "markeredgecolor": "white", "label": name}
        left.plot(sizes, [row["mAP50"] for row in rows], **style)
        right.plot(sizes, [row["milliseconds"] for row in rows], **style)
    left.set(title="How well", ylabel="mAP at IoU 0.5", ylim=(0, 1))
    right.set(title="How fast", ylabel="milliseconds an image", ylim=(0, None))
    for axis in (left, right):
        axis.set(xlabel="side at test time, pixels", xticks=sizes)
    left.legend(loc="lower right")
    return figure
