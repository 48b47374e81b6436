"""The three scripts on several processes, one for each GPU: the same run, faster.

    torchrun --standalone --nproc-per-node 2 train_ppo.py FLAGS        # docs/scale.md has more

Data parallelism by torch.distributed. Every process holds all models. Rows are shared out:

    collect         each process samples and scores its rows. The rollout is gathered, so advantages, whitening and
                    metrics are those of the whole batch, and the same on every process.
    share           each process does the forward and backward passes of its rows of a minibatch.
    sum_gradients   then the gradients are summed. Each process has divided its loss by the number of actions of the
                    whole minibatch, so the sum is the gradient that one process would have. (The mean of the processes'
                    own means is not: there a token weighs more on a process whose rows are short.)

Every process then takes the same optimizer step, so the weights stay equal without being sent. Random numbers belong to
rows and not to processes. So a run differs from the same run on one process by the order of float additions only.

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

from rlhf import rollout
from rlhf.support import cli

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
PATIENCE = timedelta(minutes=10)  # how long a process waits for the others
cli.writes = RANK == 0


def run(main: Callable, cls: type) -> None:
    """cli.run, on every process."""
    if RANK > 0:  # process 0 prints, also what is wrong with the flags
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    cli.run(main if WORLD == 1 else lambda cfg: one_of_several(main, cfg), cls)


def one_of_several(main: Callable, cfg) -> None:
    """main, on one of several processes."""
    sys.stderr = sys.__stderr__
    signal.signal(signal.SIGTERM, ended)  # from torchrun, if another process ends
    gpu = cfg.device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)
    try:
        for name in ("batch_size", "minibatch_size"):
            if (rows := getattr(cfg, name, WORLD)) < WORLD:
                raise cli.InputError(f"--{name.replace('_', '-')} {rows}: each of the {WORLD} processes needs a row")
        main(cfg)
    except cli.InputError:  # mostly the same one on every process: process 0 prints, and torchrun ends the others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3 * RANK)
        raise
    print(end="", flush=True)  # a full disk shows here
    together(dist.barrier)  # now no process waits for another one
    os._exit(0)  # an ordinary end now and then aborts in the threads of gloo ("terminate called without an active ...")


def ended(*why) -> None:
    """Another process of the run has ended: so does this one."""
    if RANK < 2:  # one of the two is alive
        print(f"error: another process of this run has ended; see what it printed. --resume continues from the last "
              f"checkpoint ({why[0]})", file=sys.stderr, flush=True)
    os._exit(2)


def together(collective: Callable, *args) -> None:
    """A call of torch.distributed that every process makes."""
    try:
        collective(*args)
    except RuntimeError as error:  # gloo has no exception class for this
        ended(error)


# ---- with one process these return what they get ----


def share(rows: list | Tensor) -> list | Tensor:
    """The rows of this process: the RANK-th of WORLD parts, whose sizes differ by one row at most."""
    return rows[len(rows) * RANK // WORLD : len(rows) * (RANK + 1) // WORLD]


def gather(mine: Tensor) -> Tensor:
    """The rows of all processes, in their order before `share`. mine: (n,) or (n, T), where a smaller T is padded."""
    if WORLD == 1:
        return mine
    parts = [None] * WORLD
    together(dist.all_gather_object, parts, mine.cpu())
    if mine.dim() > 1:
        width = max(part.size(1) for part in parts)
        parts = [F.pad(part, (0, width - part.size(1))) for part in parts]
    return torch.cat(parts).to(mine.device)


def total(numbers: dict[str, float]) -> dict[str, float]:
    """Each number, summed over the processes."""
    values = torch.tensor([list(numbers.values())], dtype=torch.float64)  # (1, n)
    return dict(zip(numbers, gather(values).sum(dim=0).tolist()))


def sum_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Sum the gradients over the processes, in place, and the loss: returns the sum.

    They go in one buffer, after the backward pass. (DistributedDataParallel sends parts of it during the pass.)
    """
    if WORLD == 1:
        return loss
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    summed = torch.cat([*map(torch.flatten, gradients), loss.detach().reshape(1).to(gradients[0].dtype)])
    together(dist.all_reduce, summed)
    for gradient, part in zip(gradients, summed.split([*map(torch.numel, gradients), 1])):
        gradient.copy_(part.view_as(gradient))
    return summed[-1]


def collect(policy: nn.Module, frozen: rollout.Frozen, prompts: Tensor, prompt_lens: Tensor,
            generator: torch.Generator) -> rollout.Rollout:
    """rlhf.rollout.collect, with the rows shared out: the same rollout on every process."""
    if len(prompts) < WORLD or WORLD == 1:
        return rollout.collect(policy, frozen, prompts, prompt_lens, generator)
    uniforms = torch.rand(len(prompts), frozen.max_new_tokens, generator=generator, dtype=torch.float64,
                          device=prompts.device)  # (B, N): those of generate; a row keeps its own on any process
    mine = rollout.collect(policy, frozen, *map(share, (prompts, prompt_lens, uniforms)))
    return rollout.Rollout(*map(gather, mine))
