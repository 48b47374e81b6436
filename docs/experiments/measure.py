"""How long something takes and how much of the machine it uses: seconds, ratios, FLOPs, memory."""

import sys
import time
from collections.abc import Iterator
from statistics import median

import torch

from rlhf.model import GPTConfig


def clock() -> float:
    """Seconds, read when the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(runs: Iterator[dict], repeats: int) -> dict[str, float]:
    """Median of each number over the next runs. The first one is a warm-up and does not count.

    >>> medians(iter([{"s": 9}, {"s": 1}, {"s": 3}, {"s": 2}]), repeats=3)
    {'s': 2}
    """
    next(runs)
    counted = [next(runs) for _ in range(repeats)]
    middle = {}
    for name in counted[0]:
        middle[name] = median([run[name] for run in counted])
    return middle


def ratios(one: Iterator[dict], other: Iterator[dict], repeats: int) -> dict[str, float]:
    """Median of one / other, of each name that both have. The two take turns; the first turn is a
    warm-up.

    >>> one = iter([{"s": 9}, {"s": 2}, {"s": 6}, {"s": 8}])
    >>> other = iter([{"s": 1}, {"s": 1}, {"s": 2}, {"s": 2}])
    >>> ratios(one, other, repeats=3)
    {'s': 3.0}
    """
    turns = []
    for _ in range(repeats + 1):
        numerators = next(one)
        denominators = next(other)
        names = [name for name in numerators if name in denominators]
        turns.append({name: numerators[name] / denominators[name] for name in names})
    return medians(iter(turns), repeats)


def training_flops(config: GPTConfig, lengths: list[int], outputs: int) -> int:
    """FLOPs of the matrix products in a forward and a backward pass over rows of the given lengths
    in tokens.

        a multiply and an add: 2 FLOPs;  the backward pass: twice the forward pass.
        Multiply-adds of a row of n tokens, in each layer:

        linear layers    12 C^2 n             3 C^2 queries, keys, values; C^2 projection; 8 C^2 MLP
        attention        2 C n (n + 1) / 2    products with the keys and with the values of the
                                              tokens up to itself

        output matrix    V C outputs          over all rows

    Embeddings, LayerNorm, GELU and softmax are left out.

    Args: outputs: the number of tokens whose logits are computed.
    """
    C = config.n_embd
    layer = sum(12 * C**2 * n + C * n * (n + 1) for n in lengths)
    output_matrix = config.vocab_size * C * outputs
    return 3 * 2 * (config.n_layer * layer + output_matrix)


def matmul_rate(device: torch.device, dtype: torch.dtype | None) -> float:
    """FLOPs per second of a large square matrix product, with the same threads: the peak that a
    share is taken of."""
    n = 8192 if device.type == "cuda" else 1024
    x = torch.full((n, n), 1 / n, device=device, dtype=dtype)
    x @ x  # the first one also loads libraries
    start = clock()
    x @ x
    return 2 * n**3 / (clock() - start)


def peak_memory() -> float:
    """The most memory so far, in GB: of tensors if a GPU is in use, otherwise of the whole
    process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return peak * unit / 1e9
