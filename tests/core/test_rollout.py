"""The scores, log-probabilities and values of what was sampled."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from rlhf.data import Prompt
from rlhf.masked import token_logprobs
from rlhf.model import GPT
from rlhf.rollout import Frozen, collect
from rlhf.run import processes
from rlhf.run.reward_functions import RewardFunction
from rlhf.sampling import generate, has_ended
from tests.helpers import Digits, some_prompts

EOS = 9
LENS = torch.tensor([1, 2, 3, 4, 5, 5, 4, 3])


def rollout(policy, reference, reward_model, **options):
    """Eight responses of at most six tokens to prompts of the lengths above."""
    frozen = Frozen(reference, reward_model, Digits(EOS), max_new_tokens=6, **options)
    return collect(policy, frozen, some_prompts(8, 5), LENS, torch.Generator().manual_seed(3))


def test_rollout_is_the_same_whatever_the_rows_at_once(policy, gpt, reward_model):
    few, all_rows = (rollout(policy, gpt, reward_model, rows=count) for count in (3, 100))
    for one, other in zip(few, all_rows, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(("sample_rows", "most"), [(0, 8), (3, 3)])
def test_collect_samples_so_many_rows_at_once(
    policy, gpt, reward_model, monkeypatch, sample_rows, most
):
    """Scoring takes two rows at once here, so the larger passes are those of sampling. The
    responses are the same."""
    sizes, hidden = [], GPT.hidden
    expected = rollout(policy, gpt, reward_model).tokens
    monkeypatch.setattr(
        GPT,
        "hidden",
        lambda self, tokens, *args: sizes.append(len(tokens)) or hidden(self, tokens, *args),
    )
    got = rollout(policy, gpt, reward_model, rows=2, sample_rows=sample_rows)
    assert max(sizes) == most and torch.equal(got.tokens, expected)


def test_collect_scores_each_response_as_if_it_were_the_only_one(policy, gpt, reward_model):
    """Log-probabilities, values and scores equal those of a forward pass over one row, cut at its
    end."""
    got = rollout(policy, gpt, reward_model, rows=3)
    ended = has_ended(got.tokens, got.mask, EOS)
    assert ended.any() and not ended.all()
    for row in range(8):
        length = int(LENS[row] + got.mask[row].sum())
        single = got.tokens[row : row + 1, :length]
        logits, values = policy(single)
        kept = got.mask[row, : length - 1]
        assert kept[LENS[row] - 1 :].all() and not kept[: LENS[row] - 1].any()
        assert_close(got.logprobs[row, : length - 1][kept], token_logprobs(logits, single)[0][kept])
        assert_close(got.values[row, : length - 1], values[0, :-1])
        expected = reward_model(single, torch.tensor([length]))[0].item() if ended[row] else -3.0
        assert got.scores[row].item() == pytest.approx(expected, abs=1e-12)


def test_collect_samples_from_the_policy(policy, reward_model):
    """The tokens are those that generate gives for the policy. The reference is another network."""
    got = rollout(policy, reward_model.gpt, reward_model)
    tokens, mask = generate(
        policy.gpt, some_prompts(8, 5), LENS, 6, EOS, torch.Generator().manual_seed(3)
    )
    assert torch.equal(got.tokens, tokens) and torch.equal(got.mask, mask)


def test_collect_gives_equal_logprobs_if_the_reference_is_the_policy(policy, gpt, reward_model):
    got = rollout(policy, gpt, reward_model)
    assert torch.equal(got.logprobs, got.ref_logprobs)


def test_collect_takes_ref_logprobs_from_the_reference(policy, reward_model):
    got = rollout(policy, reward_model.gpt, reward_model)
    expected = token_logprobs(reward_model.gpt(got.tokens), got.tokens)
    assert_close(got.ref_logprobs[got.mask], expected[got.mask])
    assert not torch.equal(got.logprobs, got.ref_logprobs)


def test_response_without_end_of_text_gets_the_fixed_score(policy, gpt, reward_model):
    got = rollout(policy, gpt, reward_model, missing_eos_score=-7.5)
    assert torch.equal(got.scores == -7.5, ~has_ended(got.tokens, got.mask, EOS))


def test_rollout_carries_no_gradient(policy, gpt, reward_model):
    assert not any(x.requires_grad for x in rollout(policy, gpt, reward_model))


def test_temperature_divides_the_logits_of_sampling_and_scoring(policy, reward_model):
    """At temperature 1/2 the logits double; and what collect scores is softmax of the divided
    logits."""
    tokens = torch.tensor([[1, 2, 3]])
    before = policy.gpt(tokens)
    policy.gpt.temperature = 0.5
    assert_close(policy.gpt(tokens), 2 * before)
    frozen = Frozen(policy.gpt, reward_model, Digits(), max_new_tokens=4)
    made = collect(policy, frozen, tokens, torch.tensor([3]), torch.Generator().manual_seed(0))
    logits = policy.gpt(made.tokens)[:, :-1]
    expected = torch.log_softmax(logits, dim=-1).gather(2, made.tokens[:, 1:, None]).squeeze(2)
    assert_close(made.logprobs, torch.where(made.mask, expected, 0.0))


# ---- rewards ----


def length_reward(name="length"):
    """Two for each token of the response, and one for each character of the prompt."""

    def score(prompts, responses):
        return [
            len(prompt) + 2 * len(text) for prompt, text in zip(prompts, responses, strict=True)
        ]

    return RewardFunction(name, "here.py", score)


GIVEN = ["", "a", "ab", "abc", [], ["message"], "", "abcdefgh"]


def scored(policy, gpt, reward_model, **options):
    frozen = Frozen(gpt, reward_model, Digits(EOS), max_new_tokens=6, rows=3, **options)
    generator = torch.Generator().manual_seed(3)
    return collect(
        policy, frozen, some_prompts(8, 5), LENS, generator, [Prompt(given, []) for given in GIVEN]
    )


def test_functions_score_texts_beside_the_reward_model(policy, gpt, reward_model):
    """Digits decodes a token to a digit; end-of-text, 9, is left out."""
    plain = rollout(policy, gpt, reward_model, missing_eos_score=None)
    functions = (length_reward(), length_reward("other"))
    got = scored(
        policy,
        gpt,
        reward_model,
        functions=functions,
        weights=(3.0, 0.5, -2.0),
        missing_eos_score=None,
    )
    assert torch.equal(got.tokens, plain.tokens)
    ended = has_ended(got.tokens, got.mask, EOS)
    expected = []
    for row in range(8):
        digits = [str(i) for i in got.tokens[row, 1:][got.mask[row]].tolist() if i != EOS]
        expected.append(len(GIVEN[row]) + 2 * len("".join(digits)))
    assert got.parts[:, 1].tolist() == got.parts[:, 2].tolist() == expected
    assert_close(got.parts[:, 0], plain.scores)
    total = 3 * plain.scores + 0.5 * got.parts[:, 1] - 2 * got.parts[:, 2]
    assert_close(got.scores, total)
    fixed = scored(policy, gpt, reward_model, functions=functions, weights=(3.0, 0.5, -2.0))
    assert_close(fixed.scores, torch.where(ended, total, -3.0))
    assert_close(fixed.parts, got.parts)


def test_a_function_is_called_once_for_all_responses(policy, gpt, reward_model):
    """Networks read three rows at once here; a judge may compare the responses with each other."""
    counts = []

    def score(prompts, responses):
        counts.append((len(prompts), len(responses)))
        return [0.0] * len(responses)

    scored(
        policy,
        gpt,
        reward_model,
        functions=(RewardFunction("x", "x.py", score),),
        weights=(1.0, 1.0),
    )
    assert counts == [(8, 8)]


def test_functions_get_the_rows_of_their_process(policy, gpt, monkeypatch):
    """The second of two processes has the last four of eight rows, with their prompts."""
    whole = scored(policy, gpt, None, functions=(length_reward(),))
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "RANK", 1)
    monkeypatch.setattr(processes, "gather", lambda rows: rows)
    half = scored(policy, gpt, None, functions=(length_reward(),))
    assert half.parts.tolist() == whole.parts[4:].tolist()


def test_functions_may_be_the_only_reward(policy, gpt):
    got = scored(policy, gpt, None, functions=(length_reward(),), missing_eos_score=None)
    assert got.parts.shape == (8, 1) and got.scores.tolist() == got.parts[:, 0].tolist()


def test_context_is_what_all_models_read(gpt, reward_model):
    longer = GPT(dataclasses.replace(gpt.config, block_size=2 * gpt.config.block_size))
    assert Frozen(longer, None, Digits()).context == longer.config.block_size
    assert Frozen(longer, reward_model, Digits()).context == gpt.config.block_size


# ---- fragments ----


def test_without_a_fixed_score_a_fragment_is_scored_as_it_is(policy, gpt, reward_model):
    got = rollout(policy, gpt, reward_model, missing_eos_score=None)
    assert not has_ended(got.tokens, got.mask, EOS).all()
    lengths = LENS + got.mask.sum(dim=1)
    assert_close(got.scores, reward_model(got.tokens, lengths))


def test_longest_response_is_drawn_for_each_row():
    """floor(u * 3) of 0, 1/3, 0.99, added to 4: the limits 4, 5, 6 are as likely as each other."""
    frozen = Frozen(None, None, None, max_new_tokens=6, shortest_limit=4)
    uniforms = torch.tensor([[0.5, 0.0], [0.5, 0.34], [0.5, 0.9999]], dtype=torch.float64)
    assert frozen.response_limits(uniforms).tolist() == [4, 5, 6]
    assert Frozen(None, None, None, max_new_tokens=6).response_limits(uniforms) == 6


def test_rows_keep_their_limit_whichever_rows_they_are_sampled_with(policy, gpt, reward_model):
    """A policy that never ends: responses have lengths from 2 to 6, not all the same. A row has a
    random number for each of six tokens, then one for its limit."""
    options = {"max_new_tokens": 6, "shortest_limit": 2}
    frozen = Frozen(gpt, reward_model, Digits(eos_id=-1), **options)
    uniforms = torch.rand(8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)  # gives the same numbers
    got = collect(policy, frozen, some_prompts(8, 5), LENS, generator)
    lengths = got.mask.sum(dim=1).tolist()
    expected = [2 + int(5 * u) for u in uniforms[:, 6].tolist()]
    assert lengths == expected and len(set(lengths)) > 2
    for row in range(8):
        alone = collect(
            policy,
            frozen,
            some_prompts(8, 5)[row : row + 1],
            LENS[row : row + 1],
            uniforms[row : row + 1],
        )
        assert torch.equal(
            alone.tokens[0, : LENS[row] + lengths[row]],
            got.tokens[row, : LENS[row] + lengths[row]],
        )
