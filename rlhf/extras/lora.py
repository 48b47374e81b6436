"""An option of all three scripts, --lora-rank: LoRA (Hu et al. 2021). Train two thin matrices a layer, freeze the rest.

    y = W x + b + scale * B A x         W (out, in) frozen;  A (rank, in), B (out, rank) trained;  scale = ALPHA / rank

B starts at zero, so the first step begins at the frozen network itself. What this saves: gradients and AdamW's two
moments are needed for A and B only. And the reference policy costs almost nothing: it has its own adapters, which
stay as they were, on the same frozen weights.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf.model import GPT
from rlhf.support.cli import InputError

ALPHA = 16.0  # one learning rate then serves several ranks (section 4.1)


class LoRALinear(nn.Module):
    """A frozen nn.Linear and its adapter. A checkpoint's adapters are merged in rlhf/support/checkpoints.py."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator | None):
        super().__init__()
        self.linear = linear
        self.register_buffer("scale", torch.tensor(ALPHA / rank))
        self.A = nn.Parameter(torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(self.scale * F.linear(x, self.A), self.B)  # (..., in) -> (..., out)


def add_adapters(gpt: GPT, rank: int, generator: torch.Generator | None) -> GPT:
    """Freeze the GPT and give an adapter to each linear layer of its blocks, in place. rank 0: leave it as it is.

    A network of rlhf/extras/hf.py that has adapters already keeps them. Raises InputError if their rank is another one,
    or if there is no such layer.
    """
    modules = list(gpt.modules())
    if any(isinstance(module, LoRALinear) for module in modules):
        if gpt.config.rank != rank:
            raise InputError(f"--lora-rank {rank}, and sft.pt has adapters of rank {gpt.config.rank}; give that rank")
    elif rank:
        gpt.requires_grad_(False)
        for module in modules:
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name != "lm_head":  # not the output matrix
                    setattr(module, name, LoRALinear(child, rank, generator))
        if not any(parameter.requires_grad for parameter in gpt.parameters()):
            raise InputError(f"--lora-rank {rank}: the network has no linear layers of torch; use --lora-rank 0")
    return gpt


def trained_and_frozen(gpt: GPT, rank: int, generator: torch.Generator) -> tuple[GPT, GPT]:
    """A GPT to train, and a frozen copy of it as it is now. With adapters, the copy shares the weights under them."""
    gpt = add_adapters(gpt, rank, generator)
    frozen = copy.deepcopy(gpt, {id(p): p for p in gpt.parameters() if not p.requires_grad})
    return gpt, frozen.requires_grad_(False)
