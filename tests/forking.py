"""Processes for tests: some start quickly, forked from a server that has imported everything and has started no threads."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import torch

MODULES = ["src.training.fit", "tests.test_interrupted"]


def begin(target, *args) -> tuple[multiprocessing.Process, Connection]:
    """Start a process that runs `target(*args, pipe)`. Returns it with the receiving end of the pipe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, sender))
    with mock.patch.dict(
        os.environ, PYTHONPATH=str(Path(__file__).parents[1])
    ):  # of the server, which the first call starts
        process.start()
    sender.close()
    return process, receiver


def end_second_process(how: str, folder: Path) -> None:
    """End the second of two training processes. The first one waits. Each writes its process id to `folder`."""
    rank = os.environ["LOCAL_RANK"]
    (folder / rank).write_text(str(os.getpid()))
    while rank == "0" or len(list(folder.iterdir())) < 2:
        time.sleep(0.1)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise (
        FileNotFoundError("some.jpg is missing")
        if how == "missing"
        else torch.OutOfMemoryError("CUDA out of memory.")
    )
