"""`python -m benchmarks gpu [PART ...] [options]`: what to measure on one GPU, ten minutes in total.

smoke       training, validation and prediction on the synthetic data set; versions
throughput  training images per second in float16 and bfloat16
loader      training samples per second by number of loader processes
train       train and evaluate on the VOCdevkit in VOC_ROOT, as many epochs as fit into the remaining time

Every result is printed and written to OUT/results.md and OUT/PART.json as soon as it is known. If a part fails or runs out
of time, its error is written and the next part starts; the exit status is then 1. The last part may use all remaining time,
each other one half of it. Everything runs on a CPU too (not on Windows): --size 64 --width 0.0625 --batch 4 --seconds 0.1.
"""

import argparse
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu_parts import Result, device_name, loader, smoke, throughput
from benchmarks.gpu_training import train

Part = Callable[
    [argparse.Namespace, float], Iterator[Result]
]  # called with the options and its limit in seconds
PARTS: dict[str, Part] = {
    "smoke": smoke,
    "throughput": throughput,
    "loader": loader,
    "train": train,
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; `out` becomes a Path."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="limit of all parts together, default 10"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder of the results, default runs/gpu"
    )
    parser.add_argument("--width", type=float, default=1.0, help="width multiplier, default 1")
    parser.add_argument("--size", type=int, default=416, help="image size in pixels, default 416")
    parser.add_argument("--batch", type=int, default=32, help="images per batch, default 32")
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="minimum time of a measurement of speed, default 5",
    )
    parser.add_argument(
        "--backbone", default="", help="folder of pretrained weights that train starts from"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        help="maximum number of epochs of train, default: what fits",
    )
    parser.add_argument(
        "--max-lr",
        type=float,
        default=0.0,
        help="peak learning rate of train, default: by the range test",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"Unknown parts {sorted(unknown)}. Choose from {', '.join(PARTS)}.")
    return options


def main(arguments: list[str]) -> None:
    """Run the parts and exit with status 1 if one failed."""
    options = parse(arguments)
    names = [name for name in PARTS if name in (options.parts or PARTS)]
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGALRM, raise_timeout)
    deadline, succeeded = time.monotonic() + 60 * options.minutes, []
    for name in names:
        seconds = (deadline - time.monotonic()) / (1 if name == names[-1] else 2)
        succeeded.append(run_part(name, options, max(0.1, seconds)))
    sys.exit(0 if all(succeeded) else 1)


class PartTimeout(BaseException):
    """The time of a part is over. Not an Exception, which code that expects an error of the disk would handle."""


def raise_timeout(*_) -> None:
    raise PartTimeout("The time of this part is over. Use more --minutes, or name this part alone.")


def run_part(name: str, options: argparse.Namespace, seconds: float) -> bool:
    """Run a part for at most `seconds` and write each of its results. Returns whether it succeeded."""
    results, start = [], time.monotonic()

    def write(result: Result) -> None:
        results.append(result | {"seconds_since_start": round(time.monotonic() - start, 1)})
        content = {"device": device_name(), "options": vars(options), "results": results}
        (options.out / f"{name}.json").write_text(
            json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8"
        )
        line = f"| {name} | {result['measured']} | {result['result']} |"
        with open(options.out / "results.md", "a", encoding="utf-8") as file:
            file.write(
                line + "\n"
                if file.tell()
                else f"| part | measured | result |\n| --- | --- | --- |\n{line}\n"
            )
        print(line, flush=True)

    gc.collect()
    torch.cuda.empty_cache()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for result in PARTS[name](options, seconds):
            write(result)
        return True
    except (Exception, PartTimeout) as error:  # any error: continue with the next part
        signal.setitimer(signal.ITIMER_REAL, 0)
        traceback.print_exc()
        text = " ".join(str(error).split())
        write(
            {
                "measured": "failed",
                "result": f"{type(error).__name__}: {text}"[:500],
                "traceback": traceback.format_exc(),
            }
        )
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
