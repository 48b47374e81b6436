"""Sampling from models whose next token is known, and the agreement of sampler and scorer."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf.masked import token_logprobs
from rlhf.rollout import collect, generate, has_ended, sample

EOS = 9


def some_prompts(count, width):
    return torch.randint(11, (count, width), generator=torch.Generator().manual_seed(0))


class PlusOne(nn.Module):
    """The next token is the last one plus one: sampling from it has one possible outcome."""

    def forward(self, tokens):
        logits = torch.full((*tokens.shape, 12), -math.inf)
        return logits.scatter(-1, (tokens[..., None] + 1) % 12, 0.0)


def test_generation_counts_up_until_end_of_text():
    """Prompts 4 | 1 2 3 | 6 7 | 8, at most four new tokens. The first row says 5 6 7 8, the second 4 5 6 7, the third
    8 9 and stops at 9, the end-of-text; the fourth says 9 at once, and ends before the longest prompt does. The mask is
    True on what was said; behind a row's end stands 0."""
    prompts = torch.tensor([[4, 11, 11], [1, 2, 3], [6, 7, 11], [8, 11, 11]])
    tokens, mask = generate(PlusOne(), prompts, torch.tensor([1, 3, 2, 1]), max_new_tokens=4, eos_id=EOS)
    assert tokens.tolist() == [[4, 5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 0, 0, 0],
                               [8, 9, 0, 0, 0, 0, 0]]
    assert mask.int().tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert has_ended(tokens, mask, EOS).tolist() == [False, False, True, True]


def test_generation_stops_when_every_row_has():
    """7 -> 8 9 and 8 -> 9: two columns suffice, of the hundred allowed."""
    plus_one = PlusOne()
    for model in (plus_one, lambda tokens: (plus_one(tokens), "values")):  # of a tuple the first entry counts
        tokens, mask = generate(model, torch.tensor([[7], [8]]), torch.tensor([1, 1]), 100, EOS)
        assert tokens.tolist() == [[7, 8, 9], [8, 9, 0]]
        assert mask.tolist() == [[True, True], [True, False]]


def test_end_of_text_in_the_prompt_or_as_last_allowed_token():
    """9 in a prompt ends nothing and is not the policy's; 9 as the last of two allowed tokens is."""
    tokens, mask = generate(PlusOne(), torch.tensor([[9, 1], [0, 7]]), torch.tensor([2, 2]), 2, EOS)
    assert tokens.tolist() == [[9, 1, 2, 3], [0, 7, 8, 9]]
    assert has_ended(tokens, mask, EOS).tolist() == [False, True]


def test_sample_by_hand():
    """p = 1/2, 0, 1/4, 1/4: a uniform number below 1/2 means token 0, below 3/4 token 2, above that token 3; the
    impossible token 1 never comes, nor does an impossible last token."""
    logits = torch.log(torch.tensor([0.5, 0, 0.25, 0.25, 0])).expand(4000, 5)
    got = sample(logits, torch.Generator().manual_seed(5))
    u = torch.rand(4000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(got, torch.where(u < 0.5, 0, torch.where(u < 0.75, 2, 3)))


def test_frequencies_are_the_models_probabilities(gpt):
    """10,000 samples of one token: every frequency within 5 standard errors of the softmax, no token excluded."""
    prompts = torch.tensor([[3, 1, 4]]).expand(10_000, 3)
    tokens, _ = generate(gpt, prompts, torch.full((10_000,), 3), 1, EOS, torch.Generator().manual_seed(0))
    p = torch.softmax(gpt(prompts[:1])[0, -1], dim=0)
    frequencies = torch.bincount(tokens[:, 3], minlength=11) / 10_000
    assert ((frequencies - p).abs() < 5 * torch.sqrt(p * (1 - p) / 10_000)).all()


def test_cache_samples_what_the_full_pass_samples(gpt):
    """A bare function hides make_cache, so the second call runs the whole prefix at each column."""
    prompts, lens = some_prompts(6, 5), torch.tensor([5, 1, 3, 2, 4, 5])
    cached = generate(gpt, prompts, lens, 8, EOS, torch.Generator().manual_seed(1))
    full = generate(lambda tokens: gpt(tokens), prompts, lens, 8, EOS, torch.Generator().manual_seed(1))
    assert torch.equal(cached[0], full[0]) and torch.equal(cached[1], full[1])


def test_prompts_are_kept_and_the_seed_decides(gpt):
    prompts, lens = some_prompts(5, 4), torch.tensor([1, 2, 3, 4, 4])
    draws = [generate(gpt, prompts, lens, 8, EOS, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    for row, length in enumerate(lens):
        assert torch.equal(draws[0][row, :length], prompts[row, :length])
    assert torch.equal(draws[0], draws[1]) and not (
        draws[0].shape == draws[2].shape and torch.equal(draws[0], draws[2]))


def rollout(policy, reference, reward_model, **options):
    prompts, lens = some_prompts(8, 5), torch.tensor([1, 2, 3, 4, 5, 5, 4, 3])
    return collect(policy, reference, reward_model, prompts, lens, 6, EOS,
                   generator=torch.Generator().manual_seed(3), **options), lens


def test_collect_scores_what_was_sampled(policy, gpt, reward_model):
    """Log-probabilities, values and scores are those of each row alone, cut at its own end, whatever the chunks."""
    got, lens = rollout(policy, gpt, reward_model, chunk_size=3)
    whole, _ = rollout(policy, gpt, reward_model, chunk_size=100)
    for one, other in zip(got, whole):
        assert_close(one, other)
    ended = has_ended(got.tokens, got.mask, EOS)
    assert ended.any() and not ended.all()
    for row in range(8):
        length = int(lens[row] + got.mask[row].sum())
        alone = got.tokens[row : row + 1, :length]
        logits, values = policy(alone)
        kept = got.mask[row, : length - 1]
        assert kept[lens[row] - 1 :].all() and not kept[: lens[row] - 1].any()
        assert_close(got.logprobs[row, : length - 1][kept], token_logprobs(logits, alone)[0][kept])
        assert_close(got.values[row, : length - 1], values[0, :-1])
        expected = reward_model(alone, torch.tensor([length]))[0].item() if ended[row] else -3.0
        assert got.scores[row].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(got.logprobs, got.ref_logprobs)  # the reference is the policy here


def test_take_cuts_after_the_longest_row_taken(policy, gpt, reward_model):
    made = collect(policy, gpt, reward_model, torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]), 4, 10)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:6] = mask[1, 0:3] = True
    taken = made._replace(mask=mask).take(torch.tensor([1]))
    assert taken.tokens.tolist() == made.tokens[1:, :4].tolist() and taken.mask.tolist() == [[True, True, True]]
    assert torch.equal(taken.values, made.values[1:, :3]) and torch.equal(taken.scores, made.scores[1:])


def test_reference_logprobs_are_the_references(policy, gpt, reward_model):
    got, _ = rollout(policy, reward_model.gpt, reward_model)
    expected = token_logprobs(reward_model.gpt(got.tokens), got.tokens)
    assert_close(got.ref_logprobs[got.mask], expected[got.mask])
    assert not torch.equal(got.logprobs, got.ref_logprobs)


def test_unended_responses_get_the_fixed_score(policy, gpt, reward_model):
    got, _ = rollout(policy, gpt, reward_model, missing_eos_score=-7.5)
    assert torch.equal(got.scores == -7.5, ~has_ended(got.tokens, got.mask, EOS))


def test_nothing_sampled_carries_a_gradient(policy, gpt, reward_model):
    got, _ = rollout(policy, gpt, reward_model)
    assert not any(x.requires_grad for x in got)


def test_bad_prompts_are_refused(gpt):
    prompts = torch.zeros(2, 3, dtype=torch.long)
    for lens in ([0, 1], [4, 1], [1]):
        with pytest.raises(ValueError, match="prompt_lens"):
            generate(gpt, prompts, torch.tensor(lens), 4, EOS)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(gpt, prompts, torch.tensor([1, 1]), 0, EOS)
