"""The closing evaluation: responses to held-out prompts, and the rows of evaluation.csv."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from rlhf.data import Prompt
from rlhf.evaluate import (
    Response,
    compare,
    decode_responses,
    respond,
    summarise,
)
from rlhf.model import GPT, GPTConfig
from rlhf.rollout import Frozen
from tests.helpers import Digits, noisy

LENGTH_JUDGE = SimpleNamespace(
    __file__="judge.py", score=lambda prompts, responses: [len(text) for text in responses]
)
PROMPTS = [Prompt(f"prompt {i}", [i % 9 + 1] * (i % 3 + 1)) for i in range(12)]


def one(score, kl_ref, gold=None, ended=True):
    return Response("p", "r", score, gold, kl_ref, length=4, ended=ended)


def test_decode_responses_leaves_out_prompt_pads_and_end_of_text():
    tokens = torch.tensor([[1, 2, 3, 4, 9], [5, 6, 9, 0, 0]])
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert decode_responses(Digits(eos_id=9), tokens, mask) == ["34", "6"]


def test_summarise_matches_hand_computation():
    """Scores 1 and 3, KL 1 and 2, kl_coef 1/2: J = 2 - 3/4. Gold 5 and 0 against 5 and 1: a tie and
    a loss, 1/4. Both responses are the same text, so one of two is distinct."""
    row = summarise(
        "x", [one(1, 1, 5.0), one(3, 2, 0.0, ended=False)], [one(9, 0, 5.0), one(9, 0, 1.0)], 0.5
    )
    assert row == {
        "policy": "x",
        "score": 2,
        "gold": 2.5,
        "kl_ref": 1.5,
        "objective": 1.25,
        "length": 4,
        "eos_rate": 0.5,
        "distinct": 0.5,
        "win_rate_vs_sft": 0.25,
        "prompts": 2,
    }


def test_distinct_counts_each_text_once():
    """Texts a, b, a, a: two different ones of four."""
    responses = [dataclasses.replace(one(0, 0), text=text) for text in "abaa"]
    assert summarise("x", responses, responses, 0.5)["distinct"] == 0.5


def test_summarise_without_judge_counts_wins_by_score():
    row = summarise("x", [one(9, 0)], [one(1, 0)], 0.5)
    assert row["win_rate_vs_sft"] == 1 and row["gold"] is None


@pytest.mark.parametrize("judge", [None, LENGTH_JUDGE])
def test_respond_gives_each_prompt_its_response_and_metrics(gpt, reward_model, judge):
    """12 prompts in batches of five. The digits of a response are its tokens. Score, KL and length
    are computed from them again."""
    reference = noisy(GPT(gpt.config).double(), seed=7)
    frozen = Frozen(
        reference, reward_model, Digits(), max_new_tokens=4, missing_eos_score=-7.0, rows=5
    )
    responses = respond(gpt, PROMPTS, frozen, judge, seed=3)
    assert [got.prompt for got in responses] == [prompt.text for prompt in PROMPTS]
    assert {got.ended for got in responses} == {True, False}
    for prompt, got in zip(PROMPTS, responses, strict=True):
        response = [int(digit) for digit in got.text] + [10] * got.ended
        assert got.length == len(response) and (got.ended or len(response) == 4)
        tokens = torch.tensor([prompt.tokens + response])
        with torch.no_grad():
            ratios = (gpt(tokens).log_softmax(dim=2) - reference(tokens).log_softmax(dim=2))[0]
            score = reward_model(tokens, torch.tensor([tokens.size(1)])).item()
        start = len(prompt.tokens)
        kl_ref = sum(ratios[t - 1, tokens[0, t]].item() for t in range(start, tokens.size(1)))
        expected = (score if got.ended else -7.0, kl_ref)
        assert (got.score, got.kl_ref) == pytest.approx(expected, abs=1e-9)
        assert got.gold == (None if judge is None else len(got.text))


def test_respond_follows_from_the_seed(gpt, reward_model):
    frozen = Frozen(gpt, reward_model, Digits(), max_new_tokens=4)
    first, again, other = (respond(gpt, PROMPTS, frozen, None, seed) for seed in (0, 0, 1))
    assert first == again and first != other


def test_compare_samples_the_reference_and_the_policy(gpt, reward_model):
    """The reference has KL 0 to itself and wins half of the comparisons with itself."""
    reference = noisy(GPT(GPTConfig(11, 16, 1, 2, 8)).double(), seed=7)
    frozen = Frozen(reference, reward_model, Digits(), max_new_tokens=4)
    (sft, ppo), before, after = compare(gpt, PROMPTS, frozen, LENGTH_JUDGE, kl_coef=0.5, seed=3)
    assert before == respond(reference, PROMPTS, frozen, LENGTH_JUDGE, 3)
    assert after == respond(gpt, PROMPTS, frozen, LENGTH_JUDGE, 3) and before != after
    assert sft == summarise("sft", before, before, 0.5) and ppo == summarise(
        "ppo", after, before, 0.5
    )
    assert sft["kl_ref"] == 0 and sft["win_rate_vs_sft"] == 0.5
    (_, dpo), *_ = compare(gpt, PROMPTS, frozen, LENGTH_JUDGE, 0.5, 3, name="dpo")
    assert dpo == {**ppo, "policy": "dpo"}
