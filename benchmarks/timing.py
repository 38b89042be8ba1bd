"""Rows of the table, and the clock."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

TURN = 0.05


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, against what, and what was wanted of it."""

    what: str
    ours: str
    against: str  # the named baseline and its figure
    ratio: float
    wanted: float = 0.0  # 0: no target, the figure is for information
    most: bool = False  # whether `wanted` is the most the ratio may be, not the least
    unit: str = "x"

    @property
    def met(self) -> str:
        """ "met", "not met" or, without a target, a dash."""
        if not self.wanted:
            return "-"
        return "met" if (self.ratio <= self.wanted if self.most else self.ratio >= self.wanted) else "not met"

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        target = f"{'at most' if self.most else 'at least'} {self.wanted:g}{self.unit}" if self.wanted else "-"
        ratio = f"{self.ratio:.0f}" if self.ratio >= 100 else f"{self.ratio:.3g}"
        return self.what, self.ours, self.against, ratio + self.unit, target, self.met


HEADER = ("measured", "here", "against", "ratio", "target", "")


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table with aligned columns."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells]
    lines = ["| " + " | ".join(line) + " |" for line in padded]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def seconds(*jobs: Callable[[], object], rounds: int = 5) -> list[float]:
    """The best time of each job. They take turns, so that whatever else the machine does meets all of them.

    In its turn a job is repeated for TURN seconds, at least once, and the mean of these runs counts.
    """
    for job in jobs:
        job()
    best = [float("inf")] * len(jobs)
    for _ in range(rounds):
        for number, job in enumerate(jobs):
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < TURN:
                job()
                count += 1
            best[number] = min(best[number], (time.perf_counter() - start) / count)
    return best


class Stopwatch:
    """Sums the time of `with` blocks: `wall` seconds, and `core` seconds that this process kept cores busy."""

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
    """torch with this many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def milliseconds(value: float) -> str:
    """A time in seconds as text."""
    return f"{value * 1e3:.2f} ms" if value < 0.01 else f"{value * 1e3:.0f} ms" if value < 10 else f"{value:.1f} s"
