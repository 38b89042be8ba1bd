"""Rows of the results table, and clocks."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIN_TURN_S = 0.05


@dataclass(frozen=True)
class Row:
    """One row of the table: a measurement, its baseline, their ratio and its target."""

    name: str
    ours: str
    baseline: str  # its name and its figure
    ratio: float
    target: float = 0.0  # 0: no target, for information
    upper_bound: bool = False  # whether the ratio may be at most `target`, instead of at least
    unit: str = "x"

    @property
    def met(self) -> str:
        """Whether the target is met, or a dash if there is none."""
        if not self.target:
            return "-"
        met = self.ratio <= self.target if self.upper_bound else self.ratio >= self.target
        return "met" if met else "not met"

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        bound = "at most" if self.upper_bound else "at least"
        target = f"{bound} {self.target:g}{self.unit}" if self.target else "-"
        ratio = f"{self.ratio:.0f}" if self.ratio >= 100 else f"{self.ratio:.3g}"
        return self.name, self.ours, self.baseline, ratio + self.unit, target, self.met


HEADER = ("measured", "this project", "baseline", "ratio", "target", "")


def table(rows: list[Row]) -> str:
    """Format the rows as a Markdown table with aligned columns."""
    return markdown([HEADER, *(row.cells() for row in rows)])


def markdown(lines: list[tuple[str, ...]]) -> str:
    """Format lines of cells, the header first, as a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def seconds(*jobs: Callable[[], object], rounds: int = 5) -> list[float]:
    """Measure the best time of each job. They take turns, so other load affects all of them.

    In its turn a job runs at least once and for at least MIN_TURN_S seconds; the mean counts.
    """
    for job in jobs:
        job()
    best = [float("inf")] * len(jobs)
    for _ in range(rounds):
        for number, job in enumerate(jobs):
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < MIN_TURN_S:
                job()
                count += 1
            best[number] = min(best[number], (time.perf_counter() - start) / count)
    return best


def now() -> float:
    """Return the seconds of a clock; waits until the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def threads(count: int):
    """Run the block with this many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def milliseconds(value: float) -> str:
    """Format a time in seconds."""
    if value >= 10:
        return f"{value:.1f} s"
    return f"{value * 1e3:.{2 if value < 0.01 else 0}f} ms"
