"""The gradient step of each script: micro-batches, epochs and minibatches, early stop, pretraining mix, temperature."""

import dataclasses
import math
import traceback

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import train_ppo
import train_reward
import train_sft
from rlhf.extras import report
from rlhf.masked import token_logprobs
from rlhf.rollout import Frozen, Rollout, collect
from rlhf.support import runtime
from rlhf.support.cli import parse_cli
from tests.helpers import TINY, Digits

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Stop(Exception):
    pass


def first_gradient(module, config, name, *flags):
    """The gradient that a script's main has computed when it is about to make its first step."""
    seen = {}

    def spy(model, *rest):
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        raise Stop

    flags = ["--device", "cpu", *TINY[name].split(), *map(str, flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "optimizer_step", spy)
        with pytest.raises(Stop):
            module.main(parse_cli(config, flags))
    return seen


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_sft_micro_batches_sum_to_the_batch(trained, tmp_path, double, size):
    """Eight responses of different lengths: a mean of the micro-batches' means would be another gradient."""
    flags = ["--data", trained[0], "--out", tmp_path]
    whole = first_gradient(train_sft, train_sft.SFTConfig, "sft", *flags)
    parts = first_gradient(train_sft, train_sft.SFTConfig, "sft", *flags, "--micro-batch-size", size)
    assert len(whole) > 10
    assert_close(parts, whole, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_reward_micro_batches_sum_to_the_batch(trained, tmp_path, double, size):
    data, out, _ = trained
    flags = ["--data", data, "--out", tmp_path, "--sft", out / "sft.pt"]
    whole = first_gradient(train_reward, train_reward.RewardConfig, "reward", *flags)
    parts = first_gradient(train_reward, train_reward.RewardConfig, "reward", *flags, "--micro-batch-size", size)
    assert whole["head.weight"].abs().max() > 0
    assert_close(parts, whole, atol=1e-12, rtol=1e-9)


# ---- PPO ----


@pytest.fixture
def rollout(policy, gpt, reward_model):
    """Six responses of at most 6 tokens, with advantages and returns that are plain noise."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]).repeat(2, 1)
    frozen = Frozen(gpt, reward_model, Digits(eos_id=7), max_new_tokens=6)
    made = collect(policy, frozen, prompts, torch.tensor([3, 2, 1, 3, 2, 1]), generator)
    assert made.mask.sum(dim=1).tolist() == [2, 6, 2, 1, 4, 2]  # ragged
    noise = torch.randn(2, *made.mask.shape, generator=generator, dtype=torch.float64)
    return made._replace(logprobs=made.logprobs + 0.1 * noise[0] * made.mask), noise[0], noise[1]


class Recorder:
    """Stands in for the optimizer and the scaler: keeps each loss and each gradient, and changes no weight."""

    def __init__(self, policy):
        self.policy, self.losses, self.gradients = policy, [], []

    def zero_grad(self):
        self.policy.zero_grad()

    def scale(self, loss):
        self.losses.append(loss.item())
        return loss

    def unscale_(self, optimizer):
        self.gradients.append({name: p.grad.clone() for name, p in self.policy.named_parameters()})

    def step(self, optimizer=None):
        pass

    def update(self):
        pass

    def get_scale(self):
        return 1.0


def record(policy, rollout, cfg, step=0, ptx=None):
    """train_ppo.update with a Recorder. Returns it and the metrics."""
    recorder = Recorder(policy)
    return recorder, train_ppo.update(policy, recorder, recorder, *rollout, cfg, None, step, ptx)


def run(policy, rollout, cfg, lr):
    optimizer = runtime.make_optimizer(policy, lr, 0.0)
    return train_ppo.update(policy, optimizer, NO_SCALER, *rollout, cfg, None, 0)


SIX = train_ppo.PPOConfig(batch_size=6, minibatch_size=6, inner_epochs=1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ppo_micro_batches_sum_to_the_minibatch(policy, rollout, size):
    cfg = dataclasses.replace(SIX, entropy_coef=0.1, value_clip_eps=0.2)
    whole, metrics = record(policy, rollout, cfg)
    parts, metrics_of_parts = record(policy, rollout, dataclasses.replace(cfg, micro_batch_size=size))
    assert len(whole.losses) == 1 and len(parts.losses) == math.ceil(6 / size)
    assert_close(parts.gradients, whole.gradients)
    assert sum(parts.losses) == pytest.approx(whole.losses[0], rel=1e-7, abs=1e-7)
    assert metrics_of_parts == pytest.approx(metrics, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_of_an_epoch_have_the_gradient_of_the_rollout_as_their_mean(policy, rollout, size):
    """At fixed weights, to 12 digits, although the responses have 1 to 6 tokens: all gradient steps divide by the same
    number. With a number of its own for each minibatch, the two differ. The metrics are the rollout's too."""
    cfg = dataclasses.replace(SIX, entropy_coef=0.1, value_clip_eps=0.2)
    whole, metrics = record(policy, rollout, cfg)
    steps, metrics_of_steps = record(policy, rollout, dataclasses.replace(cfg, minibatch_size=size))
    assert len(steps.gradients) == 6 / size
    for name, gradient in whole.gradients[0].items():
        mean = sum(step[name] for step in steps.gradients) / len(steps.gradients)
        assert_close(mean, gradient, atol=1e-12, rtol=1e-12)
    for name in ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "kl_old"):
        assert metrics_of_steps[name] == pytest.approx(metrics[name], rel=1e-6, abs=1e-9), name


def test_loss_and_metrics_of_a_minibatch_by_hand(policy, rollout):
    """mean of max(-A r, -A clip(r)) + 0.3 * half the mean of the larger square - 0.2 * mean entropy, and the metrics
    of the log: over all actions, one after another, in plain numbers."""
    made, advantages, returns = rollout[0]._replace(values=rollout[0].values + 0.15), -rollout[1], rollout[2]
    cfg = dataclasses.replace(SIX, clip_eps=0.05, value_clip_eps=0.1, value_coef=0.3, entropy_coef=0.2)
    recorder, metrics = record(policy, (made, advantages, returns), cfg)
    logits, values = policy(made.tokens)
    terms = []
    for row in range(6):
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
        assert metrics[name] == pytest.approx(value, rel=1e-6), name
    assert recorder.losses == pytest.approx(
        [expected["policy_loss"] + 0.3 * expected["value_loss"] - 0.2 * expected["entropy"]], rel=1e-6)
    assert 0 < expected["clip_fraction"] < 1 and 0 < expected["value_clip_fraction"] < 1
    assert metrics["first_log_ratio"] == pytest.approx(
        (token_logprobs(logits, made.tokens, made.mask) - made.logprobs).abs().max().item())


def test_every_epoch_takes_each_row_once_in_its_own_order(policy, rollout, monkeypatch):
    """Two steps of three epochs over six rows in minibatches of two: all metrics are means over nine gradient steps.
    No weight changes, so micro-batches change none of them."""
    taken, take = [], Rollout.take
    monkeypatch.setattr(Rollout, "take", lambda self, rows: taken.append(rows.tolist()) or take(self, rows))
    made, advantages, returns = rollout
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=3, clip_eps=0.05)
    logged = [record(policy, (made, -advantages, returns), cfg, step)[1] for step in (0, 1)]
    orders = [sum(taken[at : at + 3], []) for at in range(0, 18, 3)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders) and len(set(map(tuple, orders))) == 6
    assert logged[0]["gradient_steps"] == 9 and logged[0]["clip_fraction"] > 0

    singles = [record(policy, (made, -advantages, returns), dataclasses.replace(cfg, micro_batch_size=1), step)[1]
               for step in (0, 1)]
    for one, other in zip(logged, singles):
        assert one == pytest.approx(other, rel=1e-5)
    # Each minibatch as a rollout of its own: its metrics, weighted by its number of actions, have the same mean.
    weights = [made.mask[pair].sum().item() for pair in taken[:9]]
    minibatches = [record(policy, (made.take(rows := torch.tensor(pair)), *(
        x[rows, : made.take(rows).mask.size(1)] for x in (-advantages, returns))),
        dataclasses.replace(cfg, inner_epochs=1, batch_size=2))[1] for pair in taken[:9]]
    for name in ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "kl_old"):
        expected = sum(weight * one[name] for weight, one in zip(weights, minibatches)) / sum(weights)
        assert logged[0][name] == pytest.approx(expected, rel=1e-6), name
    assert logged[0]["first_log_ratio"] == minibatches[0]["first_log_ratio"]


def test_first_log_ratio_is_nan_if_one_micro_batch_has_a_nan(policy, rollout):
    made, *targets = rollout
    logprobs = made.logprobs.clone()
    logprobs[0, 2] = math.nan  # an action of the first row
    cfg = dataclasses.replace(SIX, micro_batch_size=1)
    assert math.isnan(record(policy, (made._replace(logprobs=logprobs), *targets), cfg)[1]["first_log_ratio"])


@pytest.mark.parametrize(("limit", "gradient_steps"), [(1e9, 9), (1e-9, 3)])
def test_inner_epochs_stop_beyond_max_kl_old(policy, rollout, limit, gradient_steps):
    """Three epochs of three minibatches; the first already moves the policy by more than 1e-9 nats."""
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=3, max_kl_old=limit)
    assert run(policy, rollout, cfg, lr=1e-3)["gradient_steps"] == gradient_steps


@pytest.mark.parametrize(("factor", "gradient_steps"), [(0.99, 3), (1.01, 6)])
def test_max_kl_old_looks_at_the_last_minibatch_of_an_epoch(policy, rollout, monkeypatch, factor, gradient_steps):
    """The limit a little below and above the kl_old of the third of three minibatches, before its step. In two
    micro-batches each."""
    made, *targets = rollout
    with torch.no_grad():
        made = made._replace(logprobs=token_logprobs(policy(made.tokens)[0], made.tokens, made.mask))
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=2, micro_batch_size=1)
    shares, means_add = [], train_ppo.tables.Means.add

    def spy(self, share, **values):
        shares.append(share * values["kl_old"])
        means_add(self, share, **values)

    with monkeypatch.context() as patch:
        patch.setattr(train_ppo.tables.Means, "add", spy)
        run(policy, (made, *targets), cfg, lr=1e-2)
    last = sum(shares[4:6]).item()
    assert last > 1.5 * sum(shares[:6]).item() / 3  # a mean over the epoch is smaller
    policy.load_state_dict(start)
    cfg = dataclasses.replace(cfg, max_kl_old=factor * last)
    assert run(policy, (made, *targets), cfg, lr=1e-2)["gradient_steps"] == gradient_steps


class Waits(TorchDispatchMode):
    """Counts the operations for which the host has to wait for the device: a number is read (item, bool, int), or the
    shape of the result depends on the data (nonzero, indexing with a mask). masked_mean is left out, which asks
    whether its mask is empty only on the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if (name in ("_local_scalar_dense", "nonzero", "masked_select") or by_mask) and not any(
                frame.name == "masked_mean" for frame in traceback.extract_stack()):
            self.count += 1
        return function(*args, **(kwargs or {}))


def test_update_waits_twice_for_each_gradient_step(policy, rollout):
    """How many actions the minibatch has, and where: 6 more gradient steps, 12 more waits."""
    counts = []
    for epochs in (1, 3):
        with Waits() as waits:
            run(policy, rollout, train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=epochs), lr=1e-3)
        counts.append(waits.count)
    assert counts[1] - counts[0] == 12


@pytest.mark.parametrize(("module", "config", "name"), [(train_sft, train_sft.SFTConfig, "sft"),
                                                         (train_reward, train_reward.RewardConfig, "reward")])
def test_a_gradient_step_waits_twice(trained, tmp_path, module, config, name):
    """In a run of 4 more steps, without lines of metrics: 8 more waits."""
    data, out, _ = trained
    flags = ["--device", "cpu", *TINY[name].split(), "--data", data, "--out", tmp_path, "--log-every", 100,
             "--eval-every", 100, *(["--sft", out / "sft.pt"] if name == "reward" else [])]
    counts = []
    for steps in (2, 6):
        with Waits() as waits:
            module.main(parse_cli(config, [*map(str, flags), "--steps", str(steps), "--overwrite"]))
        counts.append(waits.count)
    assert counts[1] - counts[0] == 8


def test_grad_norm_leaves_out_a_step_that_the_scaler_skips(policy, rollout, monkeypatch):
    """Norms inf, 2 and 4: the mean is 3."""
    norms = iter(torch.tensor([math.inf, 2.0, 4.0]))
    monkeypatch.setattr(runtime, "optimizer_step", lambda *args: next(norms))
    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=2, inner_epochs=1)
    assert record(policy, rollout, cfg)[1]["grad_norm"] == 3


def test_update_adds_the_gradient_of_the_pretraining_mix(policy, rollout):
    """It is asked once for each gradient step, with its number, before the step is made."""
    asked = []

    class Mix:
        def backward(self, gpt, scaler, step, gradient_step):
            asked.append((step, gradient_step))
            scaler.scale(3 * gpt.ln_f.bias.sum()).backward()

    cfg = train_ppo.PPOConfig(batch_size=6, minibatch_size=3, inner_epochs=2)
    plain, mixed = (record(policy, rollout, cfg, step=5, ptx=ptx)[0] for ptx in (None, Mix()))
    assert asked == [(5, 0), (5, 1), (5, 2), (5, 3)]
    for without, with_mix in zip(plain.gradients, mixed.gradients, strict=True):
        for name, gradient in without.items():
            assert_close(with_mix[name], gradient + (3 if name == "gpt.ln_f.bias" else 0))


def test_temperature_divides_the_logits_of_sampling_and_scoring(policy, reward_model):
    """At temperature 1/2 the logits double; and what collect scores is softmax of the divided logits."""
    tokens = torch.tensor([[1, 2, 3]])
    before = policy.gpt(tokens)
    policy.gpt.temperature = 0.5
    assert_close(policy.gpt(tokens), 2 * before)
    frozen = Frozen(policy.gpt, reward_model, Digits(), max_new_tokens=4)
    made = collect(policy, frozen, tokens, torch.tensor([3]), torch.Generator().manual_seed(0))
    logits = policy.gpt(made.tokens)[:, :-1]
    expected = torch.log_softmax(logits, dim=-1).gather(2, made.tokens[:, 1:, None]).squeeze(2)
    assert_close(made.logprobs, torch.where(made.mask, expected, 0.0))


def test_check_first_step_stops_a_run_whose_forward_passes_disagree(capsys):
    """kl_ref before any update and the first log ratio of each step are 0 up to rounding. In half precision there is
    more rounding: a warning."""
    check = report.check_first_step
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
