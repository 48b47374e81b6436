"""Parts 1 and 2 of a PPO step: sample responses, and score them with all models. No gradients."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data import Prompt
from rlhf.masked import action_slots, token_logprobs
from rlhf.model import GPT, PolicyWithoutValue, PolicyWithValue, RewardModel
from rlhf.run import processes
from rlhf.run.device import autocast
from rlhf.run.reward_functions import RewardFunction
from rlhf.sampling import draw_uniforms, generate, has_ended
from rlhf.tokenizer import Tokenizer


class Frozen(NamedTuple):
    """What does not change while the policy trains: the two frozen models and how responses are
    sampled and scored."""

    reference: GPT
    reward_model: RewardModel | None  # None: only functions score
    tokenizer: Tokenizer
    max_new_tokens: int = 40
    missing_eos_score: float | None = -3.0  # None: what is cut off is scored as it is
    rows: int = 128  # how many are scored at once
    amp: torch.dtype | None = None
    sample_rows: int = 0  # how many are sampled at once, so that the cache fits in memory; 0: all
    # The longest response of each row is drawn from shortest_limit to max_new_tokens; 0: it is
    # max_new_tokens.
    shortest_limit: int = 0
    functions: tuple[RewardFunction, ...] = ()
    weights: tuple[float, ...] = (1.0,)  # of the reward model, then of the functions

    @property
    def draws_limits(self) -> bool:
        """Whether the longest response differs from row to row."""
        return 0 < self.shortest_limit < self.max_new_tokens

    @property
    def context(self) -> int:
        """The most tokens that all models read."""
        context = self.reference.config.block_size
        if self.reward_model is None:
            return context
        return min(context, self.reward_model.gpt.config.block_size)

    def response_limits(self, uniforms: Tensor) -> int | Tensor:
        """The longest response of each row, drawn with the last of its random numbers (B, N+1)."""
        if not self.draws_limits:
            return self.max_new_tokens
        limits = 1 + self.max_new_tokens - self.shortest_limit  # how many there are
        return self.shortest_limit + (uniforms[:, -1] * limits).long()  # (B,)


class Rollout(NamedTuple):
    """Prompts with their sampled responses; (B, T-1) are action slots, see rlhf/__init__.py."""

    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T-1) bool: the policy's own actions, end-of-text included
    logprobs: Tensor  # (B, T-1) of the policy that sampled them
    ref_logprobs: Tensor  # (B, T-1) of the reference
    values: Tensor  # (B, T-1)
    scores: Tensor  # (B,)
    parts: Tensor | None = None  # (B, K): of K rewards; `scores` is their weighted sum


@torch.no_grad()
def collect(
    policy: PolicyWithValue | PolicyWithoutValue,
    frozen: Frozen,
    prompts: Tensor,
    prompt_lens: Tensor,
    generator: torch.Generator | Tensor | None,
    prompt_list: Sequence[Prompt] = (),
) -> Rollout:
    """Sample a response to each prompt, and score it with all models.

    Under torchrun each process does its share of the rows, and all get the whole rollout.

    Args: prompts (B, P), prompt_lens (B,); generator: as for generate; prompt_list: the same
        prompts as they were read, for reward functions.
    Raises: InputError if a function does not return one finite number per response.
    """
    columns = frozen.max_new_tokens + frozen.draws_limits
    uniforms = draw_uniforms(generator, prompts, columns)  # (B, N), or (B, N+1)
    if len(prompts) < processes.WORLD:  # too few to share: every process does all of them
        return collect_rows(policy, frozen, prompts, prompt_lens, uniforms, prompt_list)
    mine = [processes.share(x) for x in (prompts, prompt_lens, uniforms, prompt_list)]
    return Rollout(*map(processes.gather, collect_rows(policy, frozen, *mine)))


def collect_rows(
    policy, frozen: Frozen, prompts, prompt_lens, uniforms: Tensor, prompt_list: Sequence[Prompt]
) -> Rollout:
    """collect, on one process.

    Args: prompts (B, P); prompt_lens (B,); uniforms (B, N): a random number for each token that may
        be sampled, see sampling.draw_uniforms, and one more, (B, N+1), if limits are drawn;
        prompt_list: as for collect.
    """
    stops = frozen.tokenizer.stop_ids
    with autocast(prompts.device, frozen.amp):
        # ---- 1 generate ----
        tokens, mask = generate(
            policy.gpt,
            prompts,
            prompt_lens,
            frozen.response_limits(uniforms),
            stops,
            uniforms,
            frozen.sample_rows,
        )  # (B, T), (B, T-1)
    # ---- 2 score ----
    chunks = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(frozen.rows):  # row numbers
        chunks.append(score_rows(policy, frozen, tokens[rows], mask[rows], prompt_lens[rows]))
    rollout = Rollout(*map(torch.cat, zip(*chunks)))  # the chunks' tokens joined, their masks, ...
    return with_all_rewards(rollout, frozen, prompt_list)


def score_rows(policy, frozen: Frozen, tokens, mask, prompt_lens: Tensor) -> Rollout:
    """What the networks make of finished responses: policy, reference and reward model.

    Old and reference log-probabilities come from a forward pass over the finished sequences, as in
    the update, and not from sampling: the two agree on paper but not bit for bit, and the ratio
    must be 1 in the first gradient step of an update (it is, within 4e-6).

    Args: tokens (B, T), mask (B, T-1), prompt_lens (B,).
    """
    parts = torch.zeros(len(tokens), 0, device=tokens.device)  # (B, 0)
    with autocast(tokens.device, frozen.amp):
        hidden, values = policy.hidden_and_values(tokens)  # (B, T, C), (B, T)
        ref_hidden = frozen.reference.hidden(tokens)  # (B, T, C)
        if frozen.reward_model is not None:
            lengths = prompt_lens + mask.sum(dim=1)  # (B,)
            parts = frozen.reward_model(tokens, lengths).unsqueeze(1)  # (B, 1)
        logits = policy.gpt.logits(action_slots(hidden, mask))  # (S, V)
        ref_logits = frozen.reference.logits(action_slots(ref_hidden, mask))  # (S, V)
        logprobs = token_logprobs(logits, tokens, mask)  # (B, T-1)
        ref_logprobs = token_logprobs(ref_logits, tokens, mask)  # (B, T-1)
    scores = parts.sum(dim=1)  # (B,): the reward model's, so far
    return Rollout(tokens, mask, logprobs, ref_logprobs, values[:, :-1], scores, parts)


def with_all_rewards(rollout: Rollout, frozen: Frozen, prompt_list: Sequence[Prompt]) -> Rollout:
    """The rollout with the scores of all rewards, (B,), and each reward's own in parts, (B, K).

    A function is called once for all responses. prompt_list: the B prompts.
    """
    tokens, mask = rollout.tokens, rollout.mask
    columns = [rollout.parts]  # (B, 1): the reward model's; (B, 0) without one
    if frozen.functions:
        prompts = [prompt.given for prompt in prompt_list]  # text or messages
        responses = decode_responses(frozen.tokenizer, tokens, mask)
    for function in frozen.functions:
        scores = torch.tensor(function(prompts, responses), device=tokens.device)  # (B,)
        columns.append(scores.unsqueeze(1))  # (B, 1)
    parts = torch.cat(columns, dim=1)  # (B, K)
    return rollout._replace(parts=parts, scores=total_scores(frozen, parts, tokens, mask))


def total_scores(frozen: Frozen, parts: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The weighted sum of the rewards' scores: parts (B, K), tokens (B, T), mask (B, T-1) -> (B,).

    The score of a response without end-of-text is *replaced* by the fixed missing_eos_score,
    whatever the reward model makes of the fragment (Ziegler et al. 2019): it has only seen finished
    responses, so its score of a fragment means little, and the policy could learn never to end. The
    cut counts as a true end: V after it is 0. The KL penalty stays. The default, -3, is three
    standard deviations below an average response of the comparisons. For a reward that reads
    fragments as well, missing_eos_score None leaves the score as it is.
    """
    scores = (parts * parts.new_tensor(frozen.weights)).sum(dim=1)  # (B,)
    if frozen.missing_eos_score is None:
        return scores
    ended = has_ended(tokens, mask, frozen.tokenizer.stop_ids)  # (B,)
    return torch.where(ended, scores, frozen.missing_eos_score)


def decode_responses(tokenizer: Tokenizer, tokens: Tensor, mask: Tensor) -> list[str]:
    """tokens (B, T), mask (B, T-1) -> the text of each response, without end-of-text."""
    actions = torch.where(mask, tokens[:, 1:], tokenizer.eos_id)  # (B, T-1)
    texts = []
    for ids in actions.tolist():
        text = tokenizer.decode([i for i in ids if i not in tokenizer.stop_ids])
        texts.append(text.strip())
    return texts
