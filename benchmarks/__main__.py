"""`python -m benchmarks [names]`: one table, every row a ratio against a baseline timed in the same run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not take the cores of loader processes

import importlib
import sys
import time
import warnings

PARTS = ("loader", "training", "evaluation", "inference")


def main(names: list[str]) -> None:
    """Measure the named parts, all by default, and print the table."""
    warnings.filterwarnings("ignore")
    from benchmarks.timing import table

    found, start = [], time.perf_counter()
    for name in names or PARTS:
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            found.append(row)
            print(f"[{time.perf_counter() - start:4.0f} s] " + "  ".join(row.cells()), file=sys.stderr, flush=True)
    print("\n" + table(found))
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes on {os.cpu_count()} cores")


if __name__ == "__main__":
    main(sys.argv[1:])
