"""`python -m benchmarks [names]`: one table; every row is a ratio to a baseline that is timed in the same run.

`python -m benchmarks peers|gpu|memory [options]`: other implementations, one GPU, GPU memory; see COMMANDS.
"""

import os
import sys

if sys.argv[1:2] != ["peers"]:  # whose threads wait as they do for users
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # waiting threads must not occupy the cores of loader processes

import importlib
import time
import warnings

PARTS = ("loader", "training", "evaluation", "inference")
COMMANDS = {
    "peers": "benchmarks.peers.compare",
    "gpu": "benchmarks.gpu",
    "memory": "benchmarks.memory",
}


def main(names: list[str]) -> None:
    """Measure the named parts, or all if none is named, and print the table."""
    if unknown := set(names) - set(PARTS):
        sys.exit(f"Unknown benchmarks {sorted(unknown)}. Choose from {', '.join(PARTS)}.")
    warnings.filterwarnings("ignore")
    from benchmarks.timing import table

    rows, start = [], time.perf_counter()
    for name in names or PARTS:
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            rows.append(row)
            print(
                f"[{time.perf_counter() - start:4.0f} s] " + "  ".join(row.cells()),
                file=sys.stderr,
                flush=True,
            )
    print("\n" + table(rows))
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes on {os.cpu_count()} cores")


if __name__ == "__main__":
    if command := COMMANDS.get("".join(sys.argv[1:2])):
        importlib.import_module(command).main(sys.argv[2:])
    else:
        main(sys.argv[1:])
