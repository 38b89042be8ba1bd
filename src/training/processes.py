"""One training process per GPU for a notebook, which Lightning can't run again as it does a script."""

import os
import pickle
import sys
from collections.abc import Callable

import torch.multiprocessing as mp
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

PIPE_BYTES = 60_000  # slightly less than a pipe holds
GRACE_SECONDS = 5  # after an error, until the other processes are terminated, and then killed


def run_in_processes(count: int, function: Callable, *args) -> None:
    """Call `function(*args)` in `count` new processes, in which Lightning finds its rank. Only the first one prints.

    The processes are spawned: a fork of a process that has used the GPU can't use it. So the function and the classes of its
    arguments must be importable, not defined in the notebook. The first error of a process ends the others and is raised.
    Raises RuntimeError if a process ends without an error message.
    """
    errors = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(
        _run, (find_free_network_port(), errors, function, args), nprocs=count, join=False
    )
    try:
        while not context.join(grace_period=GRACE_SECONDS):
            pass
    except ProcessException as failure:
        if not errors.empty():
            raise errors.get() from failure
        if not isinstance(failure, ProcessExitedException):
            raise
        raise RuntimeError(
            f"Training stopped: {failure.msg}. Often there is too little memory: reduce Config.num_workers. Or `data` is of a "
            "class that the notebook defines: move the class to a file and import it."
        ) from None
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _run(rank: int, port: int, errors: mp.SimpleQueue, function: Callable, args: tuple) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        function(*args)
    except Exception as error:
        if can_be_sent(error):
            errors.put(error)
        raise


def can_be_sent(error: Exception) -> bool:
    """Return whether `error` survives pickling and fits into a pipe that is read only after this process has ended."""
    try:
        pickled = pickle.dumps(error)
        return len(pickled) < PIPE_BYTES and isinstance(pickle.loads(pickled), type(error))
    except Exception:  # pickling calls code of the error's class
        return False
