"""The process of one peer: it runs jobs on request and measures time and memory. Imports nothing of this project."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CANDIDATES = 100  # predictions per image above the confidence threshold; all networks are untrained

Job = Callable[[], int]  # run once; returns how many images it processed


def serve(start: Callable[[dict], tuple[dict, dict[str, Callable[[], Job]]]]) -> None:
    """Answer requests on stdin with JSON lines on the file descriptor settings["answers"], until stdin ends.

    sys.argv[1]: settings as JSON. start(settings) returns information about the peer, and a function per job that prepares it.
    A request is {"job": name, "seconds": minimum time}. An answer has "seconds" per image and "memory", the peak in MB; or
    "error".
    """
    settings, prepared = json.loads(sys.argv[1]), {}
    answers = os.fdopen(settings["answers"], "w", buffering=1)
    cv2.setNumThreads(settings["cores"])
    torch.set_num_threads(settings["cores"])
    torch.manual_seed(0)
    info, jobs = start(settings)
    print(json.dumps(info), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            job = prepared.get(request["job"]) or prepared.setdefault(
                request["job"], jobs[request["job"]]()
            )
            answer = measure(job, request["seconds"])
        except (
            Exception
        ) as error:  # of the peer's code: the comparison continues without this figure
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


def measure(job: Job, min_seconds: float) -> dict[str, float]:
    """Run a job at least once and for at least `min_seconds`. Returns the mean seconds per image and the peak memory in MB."""
    reset_peak_memory()
    start, images = time.perf_counter(), 0
    while not images or time.perf_counter() - start < min_seconds:
        images += job()
    seconds = (time.perf_counter() - start) / images
    return {"seconds": seconds, "memory": peak_memory()}


def reset_peak_memory() -> float:
    """Set the peak of this process's memory to its current size, and return it in MB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> float:
    """Return the largest size of this process's memory since `reset_peak_memory`, in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def describe(name: str, model: nn.Module, image_size: int) -> dict:
    """Return a peer's name, number of parameters, and GFLOP of a forward pass of one image (2 per multiply-add)."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"name": name, "parameters": parameters, "gflop": counter.get_total_flops() / 1e9}


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of batch norm from one batch, so that an untrained network gives varied predictions."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    model.train()(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def bias_shift(scores: Callable[[float], Tensor], threshold: float, images: int) -> float:
    """Find the shift of a bias for which CANDIDATES predictions per image score above the threshold.

    scores(shift): the scores of all predictions of `images` images; they rise with the shift.
    """
    low, high = -20.0, 20.0
    for _ in range(40):
        shift = (low + high) / 2
        above = (scores(shift) > threshold).sum().item() > CANDIDATES * images
        low, high = (low, shift) if above else (shift, high)
    return low


def files(folder: str, count: int) -> list[str]:
    """The first images of a folder."""
    return sorted(map(str, Path(folder).glob("*.jpg")))[:count]
