"""Processes that start quickly: forked from a server that has imported everything."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

MODULES = ["src.training.fit", "tests.test_interrupted"]


def begin(target, *args) -> tuple[multiprocessing.Process, Connection]:
    """Start a process that runs `target(*args, pipe)`; return it with the pipe's receiving end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, sender))
    root = str(Path(__file__).parents[1])
    with mock.patch.dict(os.environ, PYTHONPATH=root):  # of the server: the first call starts it
        process.start()
    sender.close()
    return process, receiver
