"""The gradient step of each script: cut into micro-batches, stopped early, with a pretraining mix, at a temperature."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from rlhf import ptx
from rlhf.common import make_scaler
from rlhf.data import Comparison, Demonstration, Prompt
from rlhf.masked import token_logprobs
from rlhf.optim import make_optimizer
from rlhf.rollout import collect

CPU = torch.device("cpu")
# Responses of 2, 5, 1, 3 and 4 tokens: a mean of the micro-batches' means would not be the mean over the tokens.
DEMONSTRATIONS = [Demonstration(list(range(1, 4 + n)), 3) for n in (2, 5, 1, 3, 4)]
COMPARISONS = [Comparison(Prompt("", [1, 2]), list(range(3, 3 + n)), list(range(3, 8 - n))) for n in (1, 2, 3, 4)]


def gradient(model, losses):
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_sft_in_micro_batches_is_the_whole_batch(gpt, size):
    whole = gradient(gpt, train_sft.batch_losses(gpt, DEMONSTRATIONS, 0, 0, CPU, None))
    assert_close(gradient(gpt, train_sft.batch_losses(gpt, DEMONSTRATIONS, size, 0, CPU, None)), whole)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_reward_in_micro_batches_is_the_whole_batch(reward_model, size):
    margins = [], []
    whole, parts = (gradient(reward_model, train_reward.batch_losses(reward_model, COMPARISONS, n, 0, CPU, None, seen))
                    for n, seen in zip((0, size), margins))
    assert_close(parts, whole)
    assert_close(torch.cat(margins[1]), torch.cat(margins[0]))


@pytest.fixture
def rollout(policy, gpt, reward_model):
    """Six responses of at most 6 tokens, with advantages and returns that are plain noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]).repeat(2, 1)
    made = collect(policy, gpt, reward_model, prompts, torch.tensor([3, 2, 1, 3, 2, 1]), 6, 7, generator=generator)
    assert made.mask.sum(dim=1).tolist() == [2, 2, 6, 2, 6, 6]  # ragged
    noise = torch.randn(2, *made.mask.shape, generator=generator, dtype=torch.float64)
    return made._replace(logprobs=made.logprobs + 0.1 * noise[0] * made.mask), noise[0], noise[1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ppo_in_micro_batches_is_the_whole_batch(policy, rollout, size):
    cfg, rows = train_ppo.PPOConfig(entropy_coef=0.1, value_clip_eps=0.2), torch.arange(6)
    stats = [], []
    whole, parts = (
        gradient(policy, train_ppo.batch_losses(policy, *rollout, rows, dataclasses.replace(cfg, micro_batch_size=n),
                                                None, figures))
        for n, figures in zip((0, size), stats))
    assert_close(parts, whole)
    for name in ("policy_loss", "value_loss", "entropy", "clip_fraction", "kl_old"):
        assert_close(sum(one[name] for one in stats[1]), stats[0][0][name], atol=1e-6, rtol=1e-6)


def test_the_loss_of_a_minibatch_by_hand(policy, rollout):
    """mean of max(-A r, -A clip(r)) + 0.3 * half the mean of the larger square - 0.2 * mean entropy, with the figures
    of the log: over the actions of rows 4, 2 and 5, one after another, in plain numbers."""
    made, advantages, returns = rollout[0]._replace(values=rollout[0].values + 0.15), -rollout[1], rollout[2]
    cfg = train_ppo.PPOConfig(clip_eps=0.05, value_clip_eps=0.1, value_coef=0.3, entropy_coef=0.2)
    chosen, stats = [4, 2, 5], []
    loss = sum(train_ppo.batch_losses(policy, made, advantages, returns, torch.tensor(chosen), cfg, None, stats)).item()
    logits, values = policy(made.tokens)
    terms = []
    for row in chosen:
        for t in made.mask[row].nonzero().flatten().tolist():
            p = logits[row, t].softmax(0).tolist()
            old, a = made.logprobs[row, t].item(), advantages[row, t].item()
            r = p[made.tokens[row, t + 1]] / math.exp(old)
            v, old_v, target = values[row, t].item(), made.values[row, t].item(), returns[row, t].item()
            clipped = old_v + min(max(v - old_v, -0.1), 0.1)
            terms.append({"policy_loss": max(-a * r, -a * min(max(r, 0.95), 1.05)),
                          "value_loss": 0.5 * max((v - target) ** 2, (clipped - target) ** 2),
                          "entropy": -sum(x * math.log(x) for x in p),
                          "clip_fraction": -a * min(max(r, 0.95), 1.05) > -a * r,
                          "value_clip_fraction": (clipped - target) ** 2 > (v - target) ** 2,
                          "kl_old": r - 1 - math.log(r)})
    expected = {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
    for name, value in expected.items():
        assert stats[0][name].item() == pytest.approx(value, rel=1e-6), name  # entropy comes in float32
    assert loss == pytest.approx(
        expected["policy_loss"] + 0.3 * expected["value_loss"] - 0.2 * expected["entropy"], rel=1e-6)
    assert 0 < expected["clip_fraction"] < 1 and 0 < expected["value_clip_fraction"] < 1


def test_every_pass_takes_each_row_once_in_an_order_of_its_own(policy, rollout, monkeypatch):
    """Two steps of three passes over six rows in minibatches of two; the pretraining mix is asked for batches 0 to 17.
    With a rate of 0 nothing moves, so micro-batches change none of the means that are logged."""
    made, advantages, returns = rollout
    taken, figures, asked, losses = [], [], [], train_ppo.batch_losses

    def spy(*args):
        taken.append(args[4].tolist())
        figures.append(args[-1])  # one list for all minibatches of a step
        return losses(*args)

    monkeypatch.setattr(train_ppo, "batch_losses", spy)

    def mix(gpt, step):
        asked.append(step)
        return []

    logged = []
    for micro_batch_size in (0, 1):
        cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=3, clip_eps=0.05,
                                  micro_batch_size=micro_batch_size)
        for step in (0, 1):
            optimizer = make_optimizer(policy, 0.0, 0.0)
            logged.append(train_ppo.update(policy, optimizer, make_scaler(CPU, None), made, -advantages, returns,
                                           cfg, None, step, mix))
    assert asked == [*range(18)] * 2
    orders = [sum(taken[at : at + 3], []) for at in range(0, 18, 3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders) and len(set(map(tuple, orders))) == 6
    for whole, parts in zip(logged[:2], logged[2:]):
        assert parts == pytest.approx(whole, rel=1e-5) and whole["clip_fraction"] > 0
    assert len(figures[0]) == 9 and logged[0]["gradient_steps"] == 9
    for name in ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "kl_old"):
        assert logged[0][name] == pytest.approx(sum(one[name].item() for one in figures[0]) / 9)
    assert logged[0]["first_log_ratio"] == figures[0][0]["max_log_ratio"].item()


@pytest.mark.parametrize(("limit", "gradient_steps"), [(1e9, 9), (1e-9, 3)])
def test_inner_epochs_stop_beyond_the_limit(policy, rollout, limit, gradient_steps):
    """Three passes of three minibatches; the first already moves the policy by more than 1e-9 nats."""
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=3, max_kl_old=limit)
    optimizer, scaler = make_optimizer(policy, 1e-3, 0.0), make_scaler(CPU, None)
    assert train_ppo.update(policy, optimizer, scaler, *rollout, cfg, None, 0)["gradient_steps"] == gradient_steps


@pytest.mark.parametrize(("factor", "gradient_steps"), [(0.99, 3), (1.01, 6)])
def test_the_last_minibatch_of_a_pass_says_how_far_it_went(policy, rollout, factor, gradient_steps):
    """The limit a little below and above the kl_old of the third of three minibatches, seen before its step. In two
    micro-batches each."""
    made, *targets = rollout
    with torch.no_grad():
        made = made._replace(logprobs=token_logprobs(policy(made.tokens)[0], made.tokens, made.mask))
    start, stats = {name: tensor.clone() for name, tensor in policy.state_dict().items()}, []
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=2, micro_batch_size=1, lr=1e-2)

    def run(**changed):
        policy.load_state_dict(start)
        optimizer = make_optimizer(policy, cfg.lr, 0.0)
        return train_ppo.update(policy, optimizer, make_scaler(CPU, None), made, *targets,
                                dataclasses.replace(cfg, **changed), None, 0)

    losses = train_ppo.batch_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "batch_losses", lambda *args: stats.append(args[-1]) or losses(*args))
        run()
    figures = stats[0]  # one list, to which every part is appended
    last = sum(one["kl_old"].item() for one in figures[4:6])
    assert last > 1.5 * sum(one["kl_old"].item() for one in figures[:6]) / 3  # a mean over the pass is smaller
    assert run(max_kl_old=factor * last)["gradient_steps"] == gradient_steps


def test_a_step_that_the_scaler_leaves_out_has_no_norm(policy, rollout, monkeypatch):
    """Norms inf, 2 and 4: the mean is 3."""
    norms = iter(torch.tensor([math.inf, 2.0, 4.0]))
    monkeypatch.setattr(train_ppo, "optimizer_step", lambda losses, *rest: (list(losses), next(norms)))
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=1)
    assert train_ppo.update(policy, None, None, *rollout, cfg, None, 0)["grad_norm"] == 3


def test_pretraining_mix_adds_its_gradient(policy, rollout, monkeypatch):
    """With a coefficient of 2, the update's first gradient grows by twice that of the demonstrations' loss."""
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=6, inner_epochs=1, max_grad_norm=1e9)
    monkeypatch.setattr(ptx, "load_demonstrations", lambda *where: DEMONSTRATIONS)
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen.append([p.grad.clone() for p in policy.gpt.parameters()])

    for coef, micro_batch_size in ((0.0, 0), (2.0, 0), (2.0, 2)):
        mix = ptx.PretrainingMix(coef, "", SimpleNamespace(pad_id=0), 16, len(DEMONSTRATIONS), micro_batch_size, 0,
                                 CPU, None)
        optimizer = Recorder(policy.parameters(), 1.0)
        train_ppo.update(policy, optimizer, make_scaler(CPU, None), *rollout, cfg, None, 0, mix)
    _, alone = gradient(policy, train_sft.batch_losses(policy.gpt, DEMONSTRATIONS, 0, 0, CPU, None))
    for (name, _), without, *with_mix in zip(policy.gpt.named_parameters(), *seen, strict=True):
        for one in with_mix:
            assert_close(one, without + 2 * alone["gpt." + name])


def test_temperature_divides_the_logits_of_sampling_and_scoring(policy, gpt, reward_model):
    """Logits 2, 1, 0 at temperature 1/2 are 4, 2, 0; and what collect scores is softmax of the divided logits."""
    tokens = torch.tensor([[1, 2, 3]])
    before = gpt(tokens)
    policy.gpt.temperature = 0.5
    assert_close(policy.gpt(tokens), 2 * before)
    made = collect(policy, policy.gpt, reward_model, tokens, torch.tensor([3]), 4, 10)
    logits = policy.gpt(made.tokens)[:, :-1]
    expected = torch.log_softmax(logits, dim=-1).gather(2, made.tokens[:, 1:, None]).squeeze(2)
    assert_close(made.logprobs, torch.where(made.mask, expected, 0.0))


def test_passes_that_disagree_stop_a_run(capsys):
    """kl_ref before any update and the first log ratio of each step are 0 but for rounding. In half precision there is
    more rounding: a warning."""
    check = train_ppo.check_beginning
    check(0, 0.0, 9e-5, None)
    check(3, 2.0, 9e-5, None)
    check(0, 0.09, 0.09, torch.bfloat16)
    assert capsys.readouterr().out == ""
    for step, kl_ref, log_ratio in ((0, 2e-4, 0.0), (0, -2e-4, 0.0), (0, math.nan, 0.0), (0, 0.0, 2e-4), (3, 2.0, 2e-4),
                                    (3, 2.0, math.nan)):
        with pytest.raises(RuntimeError):
            check(step, kl_ref, log_ratio, None)
    for arguments in ((0, 0.0, 0.2, torch.bfloat16), (3, -1.1, 0.0, None)):
        check(*arguments)
        assert capsys.readouterr().out.startswith("warning")
