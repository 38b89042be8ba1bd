"""Processes that are there at once: forked from one that has imported everything and has started no thread."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

MODULES = ["src.training.fit", "tests.test_interrupted", "tests.test_processes"]


def begin(target, *args) -> tuple[multiprocessing.Process, Connection]:
    """A process that runs target(*args, pipe), and this side's end of the pipe."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    pipe, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    theirs.close()
    return process, pipe
