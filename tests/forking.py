"""Processes that start quickly: forked from a server that has imported everything and has started no threads."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

MODULES = ["src.training.fit", "tests.test_interrupted", "tests.test_processes"]


def begin(target, *args) -> tuple[multiprocessing.Process, Connection]:
    """Start a process that runs `target(*args, pipe)`. Returns it with the receiving end of the pipe."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, sender))
    process.start()
    sender.close()
    return process, receiver
