"""The networks: a GPT, the same GPT with a value head, the same GPT with a score head.

The architecture is GPT-2's (Radford et al. 2019): pre-LayerNorm, learned positions, tanh GELU,
output matrix tied to the token embedding. There is no dropout: PPO compares the probabilities of
two forward passes, and dropout would make the ratio differ from 1 although the policy has not
changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest sequence, prompt and response together
    n_layer: int
    n_head: int
    n_embd: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")


class KVCache:
    """The keys and values of the tokens read so far, so that sampling computes each token once.

    keys, values: (n_layer, B, H, max_length, C/H); the first `length` columns are filled.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, like: Tensor):
        channels = config.n_embd // config.n_head  # of a head
        shape = (config.n_layer, batch_size, config.n_head, max_length, channels)
        dtype = like.dtype
        if torch.is_autocast_enabled(like.device.type):  # keys and values come in half precision
            dtype = torch.get_autocast_dtype(like.device.type)
        self.keys = like.new_zeros(shape, dtype=dtype)
        self.values = like.new_zeros(shape, dtype=dtype)
        self.length = 0

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new (B, H, T, C/H) and return all of that layer's so far."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention: token t reads tokens 0..t."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        # Queries, keys and values of all heads.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(
        self, x: Tensor, layer: int, cache: KVCache | None = None, readable: Tensor | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q = self.split_heads(q)  # (B, H, T, C/H)
        k = self.split_heads(k)
        v = self.split_heads(v)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, tokens so far, C/H)
        # A single new token may read everything before it. Only several at once need the mask.
        causal = T > 1
        y = F.scaled_dot_product_attention(q, k, v, readable, is_causal=causal)  # (B, H, T, C/H)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        return self.c_proj(y)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, H, T, C/H)"""
        B, T, C = x.shape
        return x.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, layer: int, cache: KVCache | None = None, readable: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), layer, cache, readable)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. `hidden` returns what the heads read, `forward` the logits of the next token.

    temperature divides the logits in one place, so that sampling, scoring and training use the same
    distribution.
    """

    temperature = 1.0

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                # Each block adds two of these to the residual stream; 1/sqrt(number of them) keeps
                # its variance.
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        readable: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> (B, T, C), after the last LayerNorm.

        With a cache, tokens continue what it holds: any number of them while it is empty, then one
        at a time. If its rows hold prompts of different lengths, that one needs a position (B, 1)
        in each row, and to be told which columns hold no pad: readable (B, 1, 1, columns).
        """
        T = tokens.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(
                f"{start + T} tokens do not fit the model's block_size of {self.config.block_size}"
            )
        if start > 0 and T != 1:
            raise ValueError(f"a filled cache takes one token at a time, not {T}")
        if positions is None:
            positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache, readable)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V): the output matrix is the token embedding itself."""
        return F.linear(hidden / self.temperature, self.wte.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, V); logits[:, t] are of token t+1."""
        return self.logits(self.hidden(tokens))

    def make_cache(self, batch_size: int, max_length: int) -> KVCache:
        return KVCache(self.config, batch_size, max_length, like=self.wte.weight)


class ScalarHead(nn.Linear):
    """One number from each hidden state: (..., C) -> (...).

    It starts at zero, so that the first scores and values are 0 and not random. It computes in the
    precision of its weights even under autocast: a score in bfloat16 would have only two digits.
    """

    def __init__(self, n_embd: int):
        super().__init__(n_embd, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype)).squeeze(-1)


class PolicyWithValue(nn.Module):
    """The policy, and V: an estimate of the rewards still to come after reading tokens 0..t.

    The value head reads the policy's last hidden state or, if it is given, that of a separate
    network `value_gpt`.
    """

    def __init__(self, gpt: GPT, value_gpt: GPT | None = None):
        super().__init__()
        self.gpt = gpt
        self.value_gpt = value_gpt
        self.value_head = ScalarHead((value_gpt or gpt).config.n_embd)

    def hidden_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> the policy's hidden states (B, T, C), values (B, T)."""
        hidden = self.gpt.hidden(tokens)  # (B, T, C)
        if self.value_gpt is None:
            return hidden, self.value_head(hidden)
        return hidden, self.value_head(self.value_gpt.hidden(tokens))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> logits (B, T, V), values (B, T)."""
        hidden, values = self.hidden_and_values(tokens)
        return self.gpt.logits(hidden), values


class PolicyWithoutValue(nn.Module):
    """A policy in the place of PolicyWithValue, without a value network: its values are 0."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt

    def hidden_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T) -> the policy's hidden states (B, T, C), values (B, T)."""
        return self.gpt.hidden(tokens), torch.zeros(tokens.shape, device=tokens.device)


class RewardModel(nn.Module):
    """The score of a prompt and its response, read at the last real token.

        score = (head(hidden at the last real token) - mean) / scale

    mean and scale are 0 and 1 while it learns; `train_reward.py` sets them once afterwards.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt
        self.head = ScalarHead(gpt.config.n_embd)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T), lengths (B,) in tokens, prompt and response together -> scores (B,)."""
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"there must be one length per row: lengths {tuple(lengths.shape)}, tokens "
                f"{tuple(tokens.shape)}"
            )
        fits = (lengths >= 1) & (lengths <= tokens.size(1))  # (B,)
        if fits.device.type == "cpu" and not fits.all():  # to ask a GPU would make the host wait
            raise ValueError(
                f"lengths must lie between 1 and {tokens.size(1)}, the width of tokens"
            )
        hidden = self.gpt.hidden(tokens)  # (B, T, C)
        rows = torch.arange(len(tokens), device=tokens.device)
        last = hidden[rows, lengths - 1]  # (B, C): the last real token, never a pad
        return (self.head(last) - self.mean) / self.scale  # (B,)
