"""An option of all three scripts, --lora-rank: LoRA (Hu et al. 2021). Train two thin matrices a layer, freeze the rest.

    y = W x + b + scale * B A x         W (out, in) frozen;  A (rank, in), B (out, rank) trained;  scale = ALPHA / rank

B starts at zero, so the first step begins at the frozen network itself. What this saves: gradients and AdamW's two
moments are needed for A and B only. And the reference policy costs nothing: it is the policy with its adapters off.
"""

import copy
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.extras.pretrained import PRETRAINED
from rlhf.model import GPT, GPTConfig

ALPHA = 16.0  # one learning rate then serves several ranks (section 4.1)


class LoRALinear(nn.Module):
    """A frozen nn.Linear and its adapter. A checkpoint's adapters are merged in rlhf/support/checkpoints.py."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator | None):
        super().__init__()
        self.linear, self.on = linear, True
        self.register_buffer("scale", torch.tensor(ALPHA / rank))
        self.A = nn.Parameter(torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)  # (..., in) -> (..., out)
        return y + self.scale * F.linear(F.linear(x, self.A), self.B) if self.on else y


def add_adapters(gpt: GPT, rank: int, generator: torch.Generator | None) -> GPT:
    """Freeze the GPT and give an adapter to each linear layer of its blocks, in place. rank 0: leave it as it is."""
    if rank:
        gpt.requires_grad_(False)
        for block in gpt.blocks:
            for module in (block.attn, block.mlp):
                for name, child in module.named_children():
                    setattr(module, name, LoRALinear(child, rank, generator))
    return gpt


@contextmanager
def adapters_off(gpt: GPT):
    adapters = [module for module in gpt.modules() if isinstance(module, LoRALinear)]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


class WithoutAdapters(nn.Module):
    """The frozen network under a GPT with adapters, used as a GPT is. It shares all weights and holds none."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt, self.config, self.make_cache, self.logits = gpt, gpt.config, gpt.make_cache, gpt.logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))  # (B, T, V)

    def hidden(self, *args) -> Tensor:
        with adapters_off(self.gpt):
            return self.gpt.hidden(*args)  # (B, T, C)


def trained_and_frozen(gpt: GPT, rank: int, generator: torch.Generator) -> tuple[GPT, nn.Module]:
    """A GPT to train and the same one as it was: a frozen copy or, with adapters, the network without them."""
    if rank:
        return add_adapters(gpt, rank, generator), WithoutAdapters(gpt)
    return gpt, copy.deepcopy(gpt).requires_grad_(False)


def memory_table(rank: int) -> list[dict]:
    """For GPT-2 of every size: numbers in the network, numbers trained, and what PPO with a separate value network
    holds of both, in GB of float32, without activations.

    All weights trained: policy, reference, value network and reward model, and for two of them a gradient and AdamW's
    two moments: 4 N + 2 * 3 N numbers. Adapters: two networks, and two sets of adapters with the same three beside
    them: 2 N + 2 * 4 A.
    """
    table = []
    for name, shape in PRETRAINED.items():
        with torch.device("meta"):  # shapes without memory
            gpt = add_adapters(GPT(GPTConfig(50257, 1024, *shape)), rank, None)
        A = sum(p.numel() for p in gpt.parameters() if p.requires_grad)
        N = sum(p.numel() for p in gpt.parameters()) - A
        table.append({"model": name, "parameters": N, f"rank {rank}": A, "trained": A / N,
                      "PPO, all weights": 10 * N * 4 / 1e9, "PPO, adapters": (2 * N + 8 * A) * 4 / 1e9})
    return table


if __name__ == "__main__":
    print("      model |    parameters | in rank 8 | of all | PPO, all weights | PPO, adapters")
    for row in memory_table(rank=8):
        print(f"{row['model']:>11} | {row['parameters']:>13,} | {row['rank 8']:>9,} | {row['trained']:6.2%} | "
              f"{row['PPO, all weights']:13.1f} GB | {row['PPO, adapters']:10.1f} GB")
