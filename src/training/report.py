"""The course's results table, and the metadata of weights."""

from dataclasses import dataclass

from src.config import DATASETS, Config
from src.training.metrics import THRESHOLDS, Evaluation

COURSE_THRESHOLD, STRICT_THRESHOLD = THRESHOLDS
HEADER = (
    "validation split",
    "course target",
    f"at {COURSE_THRESHOLD}",
    f"at {STRICT_THRESHOLD}",
    "",
)
NOTE = f"Objectness thresholds {COURSE_THRESHOLD} and {STRICT_THRESHOLD}; the course target applies at {COURSE_THRESHOLD}."
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
        value, strict = (
            accuracies[key if key == "class" else f"{key}@{threshold}"] for threshold in THRESHOLDS
        )
        rows.append(
            {
                "name": NAMES[key],
                "target": target,
                "value": value,
                "strict": strict,
                "passed": value >= target,
            }
        )
    return rows


@dataclass(frozen=True)
class ResultsTable:
    """The three accuracies with the course targets, and the average precisions: text in a terminal, a table in a notebook."""

    evaluation: Evaluation
    config: Config

    def _rows(self) -> list[tuple[str, ...]]:
        """Cells of the rows: name, course target, value at both thresholds, verdict."""
        rows = []
        for row in result_rows(self.evaluation.accuracies, self.config):
            values = (f"{row[key]:.2%}" for key in ("target", "value", "strict"))
            rows.append((row["name"], *values, "pass" if row["passed"] else "not yet"))
        return rows + [
            (name, "", f"{value:.4f}", "", "") for name, value in self.evaluation.precisions.items()
        ]

    def _repr_markdown_(self) -> str:
        return markdown_table(HEADER, self._rows()) + f"\n\n{NOTE}"

    def __repr__(self) -> str:
        lines = [
            f"{cells[0]:<22}{cells[1]:>14}{cells[2]:>10}{cells[3]:>10}  {cells[4]}"
            for cells in (HEADER, *self._rows())
        ]
        lines.insert(1, "-" * 65)
        return "\n".join(
            [
                *lines,
                "",
                NOTE,
                f"Weights, metrics.csv and settings of this run: {self.config.run_dir}/",
            ]
        )


def markdown_table(header: tuple, rows: list[tuple]) -> str:
    """Format a table in Markdown."""
    return "\n".join(
        "| " + " | ".join(map(str, row)) + " |" for row in (header, ("---",) * len(header), *rows)
    )


def training_metadata(
    accuracies: dict[str, float], map50: float, config: Config, epochs: str
) -> dict:
    """Describe weights: training data, epochs (such as "3 of 40") and metrics on the validation split."""
    data = f"{config.shapes_train:,} synthetic images of {len(config.classes)} shapes"
    if config.dataset != "shapes":
        data = f"{DATASETS[config.dataset]} {', '.join(config.train_splits)}"
    values = {row["name"]: row["value"] for row in result_rows(accuracies, config)}
    metrics = {"mAP50": map50, **values, "objectness threshold": COURSE_THRESHOLD}
    return {
        "data": data,
        "epochs": epochs,
        "weights": "averaged over the steps (EMA)",
        "metrics": metrics,
    }
