"""The course's results table, and the metadata of weights."""

from src.config import Config
from src.training.metrics import THRESHOLDS, Evaluation

COURSE_THRESHOLD, STRICT_THRESHOLD = THRESHOLDS
NAMES = {"class": "class accuracy", "no_object": "no-object accuracy", "object": "object accuracy"}


def course_targets(config: Config) -> dict[str, float]:
    """Return the accuracies that the assignment requires by epoch 40: higher at full width than at reduced width."""
    values = (0.80, 0.98, 0.78) if config.width >= 1 else (0.75, 0.95, 0.70)
    return dict(zip(NAMES, values, strict=True))


def result_rows(accuracies: dict[str, float], config: Config) -> list[dict]:
    """One row per accuracy: "name", "target", "value", "strict" (fractions) and "passed".

    "value" is at objectness threshold 0.05, "strict" at 0.5. Class accuracy has no threshold, so both are the same.
    """
    rows = []
    for key, target in course_targets(config).items():
        value, strict = (accuracies[key if key == "class" else f"{key}@{threshold}"] for threshold in THRESHOLDS)
        rows.append({"name": NAMES[key], "target": target, "value": value, "strict": strict, "passed": value >= target})
    return rows


def results_table(evaluation: Evaluation, config: Config) -> str:
    """Format the three accuracies with the course targets, and the average precisions, for a terminal."""
    head = f"{'validation split':<22}{'course target':>14}{f'at {COURSE_THRESHOLD}':>10}{f'at {STRICT_THRESHOLD}':>10}"
    rule = "-" * (len(head) + 9)
    lines = [head, rule]
    for row in result_rows(evaluation.accuracies, config):
        values = f"{row['target']:>14.2%}{row['value']:>10.2%}{row['strict']:>10.2%}"
        lines.append(f"{row['name']:<22}{values}  {'pass' if row['passed'] else 'not yet'}")
    lines.append(rule)
    lines += [f"{name:<22}{'':>14}{value:>10.4f}" for name, value in evaluation.precisions.items()]
    lines += [
        "",
        f"at {COURSE_THRESHOLD}, at {STRICT_THRESHOLD}: objectness threshold. The course target applies at {COURSE_THRESHOLD}.",
        "",
        f"Weights, metrics.csv and settings of this run: {config.run_dir}/",
    ]
    return "\n".join(lines)


def training_metadata(accuracies: dict[str, float], map50: float, config: Config, epochs: str) -> dict:
    """Describe weights: training data, epochs (such as "3 of 40") and metrics on the validation split."""
    data = f"{config.shapes_train:,} synthetic images of {len(config.classes)} shapes"
    if config.dataset == "voc":
        data = "PASCAL VOC " + ", ".join(config.train_splits)
    values = {row["name"]: row["value"] for row in result_rows(accuracies, config)}
    metrics = {"mAP50": map50, **values, "objectness threshold": COURSE_THRESHOLD}
    return {"data": data, "epochs": epochs, "weights": "averaged over the steps (EMA)", "metrics": metrics}
