"""The command line of the benchmarks: `python -m benchmarks --help`."""

import argparse
import importlib
import os
import sys
import time
import warnings

# Waiting threads must not occupy the cores of loader processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

PARTS = {  # rows of one table; each is a ratio to a baseline that is timed in the same run
    "loader": "training samples: mosaics, augmentation, cache, processes",
    "training": "targets and loss, and the share of a step outside the network",
    "evaluation": "decoding, NMS and all metrics for as many images as VOC2007 test has",
    "inference": "prediction and Grad-CAM",
}
COMMANDS = {  # each has options of its own
    "heatmaps": "insertion and deletion of every heatmap offered, on VOC or the synthetic data set",
    "gpu": "smoke test, images per second and memory of one GPU",
    "ultralytics": "time of a training step and of a prediction, beside ultralytics' YOLOv3",
    "ablations": "what each part of the training recipe is worth on VOC",
}


def measure(names: list[str]) -> None:
    """Measure the named parts, or all if none is named, and print the table."""
    from benchmarks.timing import table

    warnings.filterwarnings("ignore")
    rows = []
    start = time.perf_counter()
    for name in names or PARTS:
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            rows.append(row)
            elapsed = time.perf_counter() - start
            print(f"[{elapsed:4.0f} s] " + "  ".join(row.cells()), file=sys.stderr, flush=True)
    print("\n" + table(rows))
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes on {os.cpu_count()} cores")


def main(arguments: list[str]) -> None:
    """Measure, or run a command with the arguments that follow its name."""
    if arguments[:1] and arguments[0] in COMMANDS:
        importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
        return
    lines = [f"  {name:12} {text}" for name, text in {**PARTS, **COMMANDS}.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure all of the first four, or the named ones of them, or run a command.",
        epilog="\n".join([*lines, "", "Options of a command: python -m benchmarks COMMAND --help"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args(arguments).names
    if unknown := set(names) - set(PARTS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}")
    measure(names)


if __name__ == "__main__":
    main(sys.argv[1:])
