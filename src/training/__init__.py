"""Loss, metrics, the Lightning module, training and evaluation."""

import warnings

for _message in (  # beginnings of libraries' warnings that need no action
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning calls it
    r"Checkpoint directory .* exists and is not empty",  # a resumed run
    r"`broadcast_buffers` is deprecated",  # its replacement is not in older versions
    r"The '\w+' does not have many workers",  # set by Config.num_workers
):
    warnings.filterwarnings("ignore", _message)
