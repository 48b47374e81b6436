"""The three scripts on several processes, one for each GPU: the same run, faster.

    torchrun --standalone --nproc-per-node 2 train_ppo.py FLAGS     # docs/performance.md has more

Data parallelism by torch.distributed. Every process holds all models. Rows are shared out:

    share           each process samples, scores and differentiates its share of the rows.
    gather          the rollout is gathered, so advantages, whitening and metrics are those of the
                    whole batch, and the same on every process.
    sum_gradients   gradients are summed. Each process has divided its loss by the number of actions
                    of the whole minibatch, so the sum is the gradient that one process would have.
                    (The mean of the processes' own means is not: there a token weighs more on a
                    process whose rows are short.)

Every process then takes the same optimizer step, so the weights stay equal without being sent.
Random numbers belong to rows and not to processes. So a run differs from the same run on one
process by the order of float additions only.

Process 0 prints and writes, the others do not. With one process nothing here does anything.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.run.errors import InputError
from rlhf.run.flags import flag_name

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
WORLD = int(os.environ.get("WORLD_SIZE", 1))
TIMEOUT = timedelta(minutes=10)  # of a process that waits for the others


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return RANK == 0


# ---- with one process these return what they get ----


def share(rows: list | Tensor) -> list | Tensor:
    """This process's rows: the RANK-th of WORLD parts, whose sizes differ by at most one."""
    start = len(rows) * RANK // WORLD
    end = len(rows) * (RANK + 1) // WORLD
    return rows[start:end]


def gather(mine: Tensor) -> Tensor:
    """The rows of all processes, in their order before `share`.

    Args: mine: (n,) or (n, T), where a smaller T is padded.
    """
    if WORLD == 1:
        return mine
    parts = [None] * WORLD
    call_collective(dist.all_gather_object, parts, mine.cpu())
    if mine.dim() > 1:
        width = max(part.size(1) for part in parts)
        parts = [F.pad(part, (0, width - part.size(1))) for part in parts]
    return torch.cat(parts).to(mine.device)


def total(numbers: Tensor) -> Tensor:
    """A scalar, or numbers (n,), summed over the processes."""
    return gather(numbers[None]).sum(dim=0)


def sum_gradients(model: nn.Module) -> None:
    """Sum the gradients over the processes, in place.

    They are sent in one buffer, after the backward pass. (DistributedDataParallel sends parts of
    them during the pass.)
    """
    if WORLD == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    buffer = nn.utils.parameters_to_vector(gradients)
    call_collective(dist.all_reduce, buffer)
    nn.utils.vector_to_parameters(buffer, gradients)


# ---- a program on several processes ----


def silence_all_but_the_first() -> None:
    """Send the output of all processes but 0 to /dev/null: one error about the flags is enough."""
    if not is_first():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def run(main: Callable, cfg) -> None:
    """Call main(cfg). Under torchrun, join the other processes first, and end when they end."""
    if WORLD == 1:
        main(cfg)
        return
    sys.stderr = sys.__stderr__  # a bug's traceback shows on any process
    signal.signal(signal.SIGTERM, end_with_the_others)  # from torchrun, if another process ends
    join_group(cfg.device)
    try:
        check_batch_sizes(cfg)
        main(cfg)
    except InputError:
        # Mostly the same one on every process: process 0 prints, and torchrun ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3 * RANK)
        raise
    print(end="", flush=True)  # a full disk shows here
    call_collective(dist.barrier)  # now no process waits for another one
    # An ordinary end aborts now and then in gloo's threads: "terminate called without an active
    # exception".
    os._exit(0)


def join_group(device: str) -> None:
    """Join the group of torch.distributed: nccl with one GPU for each process, or gloo."""
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)


def check_batch_sizes(cfg) -> None:
    """Raise InputError if a batch has fewer rows than there are processes."""
    for name in ("batch_size", "minibatch_size"):
        rows = getattr(cfg, name, WORLD)
        if rows < WORLD:
            raise InputError(f"{flag_name(name)} {rows}: each of the {WORLD} processes needs a row")


def end_with_the_others(*reason) -> None:
    """End this process because another one of the run has ended; exit status 2."""
    if RANK < 2:  # at least one of these two is alive, and one line is enough
        print(
            "error: another process of this run has ended; see what it printed. --resume continues "
            f"from the last checkpoint ({reason[0]})",
            file=sys.stderr,
            flush=True,
        )
    os._exit(2)


def call_collective(collective: Callable, *args) -> None:
    """Make a call of torch.distributed that every process makes, or end if another has ended."""
    try:
        collective(*args)
    except RuntimeError as error:  # gloo has no exception class for this
        end_with_the_others(error)
