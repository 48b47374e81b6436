"""A reward model of another family: `train_reward.py --init`.

    python train_reward.py --init MODEL              # any model of transformers, also an encoder
    python train_ppo.py                              # as with any other reward.pt

The model has its own tokenizer, so it reads text: PPO decodes the responses for it, as for a reward
function, and the value network starts from the fine-tuned model.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.data import pad_rows
from rlhf.model import RewardModel
from rlhf.networks.hf import HF, config_of
from rlhf.networks.hf_tokenizer import HFTokenizer
from rlhf.networks.pretrained import local_files
from rlhf.run.files import digests

ROWS = 32  # texts that are scored at once
ANY_LENGTH = 10**9  # tokens


class HFReward(RewardModel):
    """The score of a prompt and its response, by a model of transformers.

        score = (head(hidden at one token) - mean) / scale

    That is the last real token of a decoder and the first of an encoder, whose first token reads
    the whole text (Devlin et al. 2019). A text that is too long loses tokens after its first one.
    """

    def __init__(self, gpt: HF):
        super().__init__(gpt)
        self.longest = gpt.config.block_size
        gpt.config = replace(gpt.config, block_size=ANY_LENGTH)

    def shorten(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T), lengths (B,) -> the same, of rows of at most `longest` tokens."""
        excess = (lengths - self.longest).clamp(min=0)  # (B,)
        columns = torch.arange(min(self.longest, tokens.size(1)), device=tokens.device)  # (t,)
        skipped = excess.unsqueeze(1) * (columns > 0)  # (B, t)
        return tokens.gather(1, columns + skipped), lengths - excess

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T), lengths (B,) in tokens, prompt and response together -> scores (B,)."""
        tokens, lengths = self.shorten(tokens, lengths)  # (B, t), (B,)
        if self.gpt.config.pooled == "last":
            return super().forward(tokens, lengths)
        columns = torch.arange(tokens.size(1), device=tokens.device)  # (t,)
        real = columns < lengths.unsqueeze(1)  # (B, t): an encoder would read the pads
        output = self.gpt.trunk(tokens, attention_mask=real.int())
        first = output.last_hidden_state[:, 0]  # (B, C)
        return (self.head(first) - self.mean) / self.scale  # (B,)


def init_from(cfg) -> tuple[HFReward, HFTokenizer, dict[str, str]]:
    """What `train_reward.py --init` starts from: the reward model, its tokenizer, and the digests
    of a local model's files."""
    tokenizer = HFTokenizer(cfg.init, cfg.template, cfg.system)
    gpt = HF(replace(config_of(cfg, tokenizer), pooled="last"))
    # The first token of an encoder has read the whole text: its hidden state changes with the last.
    tokens = torch.tensor([[5, 6, 7], [5, 6, 8]])  # (2, 3): any will do
    first = gpt.trunk(tokens).last_hidden_state[:, 0]  # (2, C)
    if not torch.allclose(first[0], first[1]):
        gpt.config = replace(gpt.config, pooled="first")
    return HFReward(gpt), tokenizer, digests(**local_files(cfg.init))


@torch.no_grad()
def score_texts(
    model: HFReward, tokenizer: HFTokenizer, prompts: Sequence, responses: list[str]
) -> list[float]:
    """A score for each response. prompts: text or messages."""
    device = next(model.parameters()).device
    rows = []
    for prompt, response in zip(prompts, responses):
        rows.append(tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response))
    scores = []
    for at in range(0, len(rows), ROWS):
        tokens, lengths = pad_rows(rows[at : at + ROWS], tokenizer.pad_id, device)  # (n, T), (n,)
        scores += model(tokens, lengths).tolist()
    return scores
