"""Temperature, top-k and top-p for rlhf.tools.sample. PPO must train the distribution that it
samples from."""

import math

import torch
from torch import Tensor

from rlhf.model import GPT


def filter_top_k_top_p(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """-inf for all but the likeliest tokens: (B, V) -> (B, V). The single likeliest always stays.

    top_k: the k likeliest. top_p: of those, likeliest first, as many as it takes to reach the
    probability top_p (nucleus sampling, Holtzman et al. 2020).
    """
    if not top_k and top_p == 1:
        return logits
    ordered, order = logits.sort(dim=1, descending=True, stable=True)  # (B, V), (B, V)
    drop = torch.zeros_like(ordered, dtype=torch.bool)
    if top_p < 1:
        cumulative = ordered.double().softmax(dim=1).cumsum(dim=1)  # (B, V)
        drop[:, 1:] = cumulative[:, :-1] >= top_p  # the likelier ones already reach top_p
    if top_k:
        drop[:, top_k:] = True
    drop = torch.zeros_like(drop).scatter(1, order, drop)  # back in the order of the vocabulary
    return logits.masked_fill(drop, -math.inf)


class Sampler:
    """A GPT with temperature, top-k and top-p; `generate` uses it like a GPT."""

    def __init__(self, gpt: GPT, temperature: float, top_k: int, top_p: float):
        self.gpt = gpt
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.make_cache = gpt.make_cache
        self.hidden = gpt.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self.gpt.logits(hidden) / self.temperature  # (B, V)
        return filter_top_k_top_p(logits, self.top_k, self.top_p)
