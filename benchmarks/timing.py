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
        """ "met", "not met", or a dash if there is no target."""
        if not self.target:
            return "-"
        return (
            "met"
            if (self.ratio <= self.target if self.upper_bound else self.ratio >= self.target)
            else "not met"
        )

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        target = (
            f"{'at most' if self.upper_bound else 'at least'} {self.target:g}{self.unit}"
            if self.target
            else "-"
        )
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
    """Measure the best time of each job. The jobs take turns, so that other load on the machine affects all of them.

    In its turn a job runs at least once and for at least MIN_TURN_S seconds; the mean of these runs counts.
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


class Stopwatch:
    """Add up the time of `with` blocks: `wall` seconds, and `core` seconds of processor time of this process."""

    def __init__(self):
        self.wall = self.core = 0.0

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.wall += time.perf_counter() - self.start[0]
        self.core += time.process_time() - self.start[1]


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
    return (
        f"{value * 1e3:.2f} ms"
        if value < 0.01
        else f"{value * 1e3:.0f} ms"
        if value < 10
        else f"{value:.1f} s"
    )
