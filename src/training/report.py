"""The assignment's table: what was asked, what was reached."""

from src.config import Config
from src.training.metrics import THRESHOLDS, Evaluation

COURSE_THRESHOLD, STRICT_THRESHOLD = THRESHOLDS
NAMES = {"class": "class accuracy", "no_object": "no-object accuracy", "object": "object accuracy"}


def targets(config: Config) -> dict[str, float]:
    """What the assignment asks for by epoch 40, with full kernels and with reduced ones."""
    asked = (0.80, 0.98, 0.78) if config.width >= 1 else (0.75, 0.95, 0.70)
    return dict(zip(NAMES, asked, strict=True))


def rows(accuracies: dict[str, float], config: Config) -> list[dict]:
    """One row for each of the three accuracies: "name", "wanted", "reached", "strict", "passed"; parts of 1.

    "reached" is at objectness threshold 0.05, "strict" at 0.5; class accuracy has no threshold, so both are the same.
    """
    table = []
    for key, wanted in targets(config).items():
        reached, strict = (
            accuracies[key if key == "class" else f"{key}@{threshold}"] for threshold in (COURSE_THRESHOLD, STRICT_THRESHOLD)
        )
        table.append({"name": NAMES[key], "wanted": wanted, "reached": reached, "strict": strict, "passed": reached >= wanted})
    return table


def results_table(evaluation: Evaluation, config: Config) -> str:
    """The three accuracies beside the assignment's, and the average precisions, as text for a terminal."""
    head = f"{'held-out split':<22}{'asked for':>10}{f'at {COURSE_THRESHOLD}':>10}{f'at {STRICT_THRESHOLD}':>10}"
    lines = [head, "-" * (len(head) + 8)]
    for row in rows(evaluation.accuracies, config):
        numbers = "".join(f"{100 * row[key]:>9.2f}%" for key in ("wanted", "reached", "strict"))
        lines.append(f"{row['name']:<22}{numbers}  {'pass' if row['passed'] else 'NOT YET'}")
    lines.append("-" * len(lines[1]))
    lines += [f"{name:<22}{'':>10}{value:>10.4f}" for name, value in evaluation.precisions.items()]
    lines += [
        "",
        f"Columns 'at {COURSE_THRESHOLD}' and 'at {STRICT_THRESHOLD}': threshold of objectness; {COURSE_THRESHOLD} is the course's and decides.",
        "",
    ]
    lines.append(f"Weights, metrics.csv and settings of this run: {config.run_dir}/")
    return "\n".join(lines)


def about(accuracies: dict[str, float], map50: float, config: Config, trained: str) -> dict:
    """What travels with weights: what they were trained on, for how long ("3 of 40" epochs), and what they reach."""
    data = f"{config.shapes_train:,} drawn pictures of {len(config.classes)} shapes"
    if config.dataset == "voc":
        data = "PASCAL VOC " + ", ".join(config.train_splits)
    reached = {row["name"]: row["reached"] for row in rows(accuracies, config)}
    metrics = {"mAP50": map50, **reached, "objectness threshold": COURSE_THRESHOLD}
    return {"data": data, "epochs": trained, "weights": "averaged over the steps (EMA)", "metrics": metrics}
