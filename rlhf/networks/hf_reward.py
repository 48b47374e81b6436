"""A reward model of another family: `train_reward.py --init`.

    python train_reward.py --init MODEL              # any model of transformers, also an encoder
    python train_ppo.py                              # as with any other reward.pt

The model has its own tokenizer, so it reads text: PPO decodes the responses for it, as for a reward
function, and the value network starts from the fine-tuned model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data import pad_rows
from rlhf.model import RewardModel
from rlhf.networks.hf import HF, HFConfig, load_base, local_files
from rlhf.networks.hf_tokenizer import HFTokenizer
from rlhf.run.errors import InputError
from rlhf.run.files import digests

ROWS = 32  # texts that are scored at once


class HFReward(RewardModel):
    """The score of a prompt and its response, by a model of transformers.

        score = (head(hidden at one token) - mean) / scale

    That is the last real token of a decoder and the first of an encoder, whose first token reads
    the whole text (Devlin et al. 2019).
    """

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens (B, T), lengths (B,) in tokens, prompt and response together -> scores (B,)."""
        if self.gpt.config.pooled == "last":
            return super().forward(tokens, lengths)
        columns = torch.arange(tokens.size(1), device=tokens.device)  # (T,)
        real = columns < lengths.unsqueeze(1)  # (B, T): an encoder would read the pads
        output = self.gpt.trunk(tokens, attention_mask=real.int())
        first = output.last_hidden_state[:, 0]  # (B, C)
        return (self.head(first) - self.mean) / self.scale  # (B,)


def init_from(cfg) -> tuple[HFReward, HFTokenizer, dict[str, str]]:
    """What `train_reward.py --init` starts from: the reward model, its tokenizer, and the digests
    of a local model's files."""
    tokenizer = HFTokenizer(cfg.init, cfg.template, cfg.system)
    config = HFConfig(
        init=cfg.init,
        rank=cfg.lora_rank,
        four_bit=cfg.load_in_4bit,
        kept=(),
        alpha=cfg.lora_alpha,
        template=tokenizer.template or "none",
        system=cfg.system,
        base_dtype=cfg.base_dtype,
        pooled=which_token(cfg),
    )
    return HFReward(HF(config)), tokenizer, digests(**local_files(cfg.init))


@torch.no_grad()
def which_token(cfg) -> str:
    """The token whose hidden state has read the whole text: the "first", if it changes with the
    last token, else the "last".

    Raises InputError if the model needs more than tokens.
    """
    trunk = load_base(cfg.init, (), cfg.load_in_4bit, cfg.base_dtype, trunk_only=True)
    tokens = torch.arange(5, 13).repeat(2, 1)  # (2, 8): any will do
    tokens[1, -1] = 5
    try:
        first = trunk(tokens).last_hidden_state[:, 0]  # (2, C)
    except Exception as error:  # a model of encoder and decoder, of images, ...
        raise InputError(
            f"--init {cfg.init}: cannot score text with this {type(trunk).__name__}: {error}; give "
            f"a decoder or an encoder of text"
        ) from error
    return "last" if torch.allclose(first[0], first[1]) else "first"


@torch.no_grad()
def score_texts(
    model: HFReward, tokenizer: HFTokenizer, prompts: Sequence, responses: list[str]
) -> list[float]:
    """A score for each response. prompts: text or messages; one that is too long loses its
    beginning."""
    device = next(model.parameters()).device
    rows = []
    for prompt, response in zip(prompts, responses):
        ids = tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response)
        begin = len(tokenizer.begin)
        too_many = max(0, len(ids) - model.gpt.config.block_size)
        rows.append(ids[:begin] + ids[begin + too_many :])
    scores = []
    for at in range(0, len(rows), ROWS):
        tokens, lengths = pad_rows(rows[at : at + ROWS], tokenizer.pad_id, device)  # (n, T), (n,)
        scores += model(tokens, lengths).tolist()
    return scores
