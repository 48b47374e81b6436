"""LoRA (Hu et al. 2021), --lora-rank of all three scripts: train two thin matrices per linear
layer, freeze the rest.

    y = W x + b + scale * B A x

    W (out, in) and b (out,)               frozen
    A (rank, in) and B (out, rank)         trained
    scale = alpha / rank           alpha: --lora-alpha

B starts at zero, so training starts at the frozen network itself. This saves memory: only A and B
need gradients and AdamW's two moments. The reference policy costs almost nothing: it has its own
adapters, which stay as they were, on the same frozen weights.

Left out: dropout in adapters. PPO compares the probabilities of two forward passes, and dropout
would make the ratio differ from 1 although the policy has not changed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.model import GPT
from rlhf.run.errors import InputError

ALPHA = 16.0  # the default: one learning rate then serves several ranks (Hu et al., section 4.1)


class LoRALinear(nn.Module):
    """A frozen nn.Linear and its adapter. rlhf/run/checkpoints.py merges the adapters of a
    checkpoint."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        generator: torch.Generator | None,
        alpha: float = ALPHA,
    ):
        super().__init__()
        self.linear = linear
        self.register_buffer("scale", torch.tensor(alpha / rank))
        noise = torch.randn(rank, linear.in_features, generator=generator)
        self.A = nn.Parameter(noise * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        frozen = self.linear(x)  # (..., out)
        # The adapter computes in float32, also on a base in bfloat16.
        narrow = self.scale * F.linear(x.to(self.A.dtype), self.A)  # (..., rank)
        return (frozen + F.linear(narrow, self.B)).to(frozen.dtype)


def add_adapters(
    gpt: GPT, rank: int, generator: torch.Generator | None, alpha: float = ALPHA
) -> GPT:
    """Freeze the GPT and give an adapter to each linear layer of its blocks, in place. rank 0:
    leave it as it is.

    A network of rlhf/networks/hf.py that has adapters already keeps them.
    Raises InputError if the rank, or an alpha that is not the default, is another one than theirs.
    """
    if any(isinstance(module, LoRALinear) for module in gpt.modules()):
        config = gpt.config
        if rank != config.rank or alpha not in (ALPHA, config.alpha):
            raise InputError(
                f"--lora-rank {rank} --lora-alpha {alpha:g}, and sft.pt has adapters of rank "
                f"{config.rank} and alpha {config.alpha:g}; leave the flags out"
            )
        return gpt
    if rank == 0:
        return gpt
    gpt.requires_grad_(False)
    for name, layer in list(gpt.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":  # not the output matrix
            gpt.set_submodule(name, LoRALinear(layer, rank, generator, alpha))
    return gpt
