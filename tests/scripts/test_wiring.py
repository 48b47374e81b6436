"""What the three scripts' main functions pass from one part to the next, compared with sums
computed here by hand.

Each part has its own tests. A loop that gives a part the wrong thing (gamma for lambda, the policy
for its reference, held-out rows for training rows) passes all of those, trains, and ends a little
worse.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from rlhf import ppo
from rlhf.data import Comparison, Prompt
from rlhf.evaluate import decode_responses
from rlhf.model import GPT, GPTConfig
from rlhf.rollout import Frozen
from rlhf.run.device import make_generator
from rlhf.run.flags import parse_cli
from rlhf.run.judge import load_judge
from rlhf.run.loading import find_tokenizer, load_policy, load_reward_model
from rlhf.sampling import generate
from rlhf.tokenizer import load_tokenizer
from tests.helpers import CPU, end_earlier, rows, tiny

FLAGS = (
    "--gamma 0.9 --lam 0.7 --kl-coef 0.3 --kl-target 0.01 --kl-horizon 16 --missing-eos-score -7 "
    "--temperature 0.8 --lr 0.03 --warmup 2 --seed 3 --max-new-tokens 12"
).split()


def train(module, config, name, *flags):
    """main of a script, with tiny flags on the CPU."""
    module.main(parse_cli(config, tiny(name, *flags)))


def train_policy(seen, out, *flags):
    """train_ppo.main from the models of `seen`."""
    models = ["--sft", seen.out / "sft.pt", "--reward", seen.reward]
    flags = ["--data", seen.data, "--out", out, *models, *flags]
    train(train_ppo, train_ppo.PPOConfig, "ppo", *flags)


@pytest.fixture(scope="module")
def seen(trained, tmp_path_factory):
    """Four steps of train_ppo.main: the models before each, the rollout, what update was given,
    what was logged."""
    data, trained_out, _ = trained
    out = tmp_path_factory.mktemp("wiring")
    end_earlier(trained_out, out, data)
    record = SimpleNamespace(data=data, reward=out / "reward.pt", out=out, steps=[])
    collect, update = train_ppo.collect, train_ppo.update

    def spy_on_collect(policy, frozen, prompts, lens, generator, given):
        step = SimpleNamespace(
            policy=copy.deepcopy(policy),
            reference=copy.deepcopy(frozen.reference),
            reward_model=copy.deepcopy(frozen.reward_model),
            frozen=frozen,
            prompts=prompts,
            lens=lens,
            given=given,
        )
        step.rollout = collect(policy, frozen, prompts, lens, generator, given)
        record.steps.append(step)
        return step.rollout

    def spy_on_update(policy, optimizer, compute, experience, *rest):
        now = record.steps[-1]
        now.updated = experience
        now.settings = {
            (group["lr"], group["weight_decay"], group["eps"], group["betas"])
            for group in optimizer.param_groups
        }
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        now.trains_everything = given == {id(p) for p in policy.parameters()}
        return update(policy, optimizer, compute, experience, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "collect", spy_on_collect)
        patch.setattr(train_ppo, "update", spy_on_update)
        train_policy(record, out, *FLAGS)
    for step, row in zip(record.steps, rows(out / "ppo.csv"), strict=True):
        step.log = {name: float(value) for name, value in row.items()}
    assert len(record.steps) == 4
    return record


def same_weights(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def kl_coefs(steps):
    """By hand: 0.3, then times 1 + clip(kl / 0.01 - 1, -0.2, 0.2) * 8 / 16 after each step."""
    coefs = [0.3]
    for step in steps:
        coefs.append(coefs[-1] * (1 + min(max(step.log["kl_ref"] / 0.01 - 1, -0.2), 0.2) * 8 / 16))
    return coefs[:-1]


def test_policy_reference_and_reward_model_are_separate_networks(seen):
    """The policy starts as the reference and leaves it; the reference and the reward model stay
    what was loaded. The value network starts as the reward model's and leaves it."""
    sft, _ = load_policy(seen.out / "sft.pt", "sft")
    reward_model, _ = load_reward_model(seen.reward)
    for number, step in enumerate(seen.steps):
        assert same_weights(step.reference, sft) and same_weights(step.reward_model, reward_model)
        started = number == 0
        assert same_weights(step.policy.gpt, sft) == started
        assert same_weights(step.policy.value_gpt, reward_model.gpt) == started
        assert step.policy.gpt.temperature == step.reference.temperature == 0.8


def test_rollout_is_sampled_from_the_policy_with_one_generator_per_step(seen):
    """The responses are to eight prompts of prompts.csv, and the reference would respond
    differently."""
    texts = {row["Prompt"] for row in rows(seen.data / "prompts.csv")}
    tokenizer = find_tokenizer(str(seen.data))
    for number, step in enumerate(seen.steps):
        assert len(step.prompts) == 8 and step.frozen.max_new_tokens == 12
        prompts = zip(step.prompts, step.lens)
        assert {tokenizer.decode(row[:n].tolist()) for row, n in prompts} <= texts
        sampled = []
        for gpt in (step.policy.gpt, step.reference):
            generator = make_generator("cpu", 3, "rollout", number)
            inputs = (step.prompts, step.lens, 12, tokenizer.eos_id, generator)
            sampled.append(generate(gpt, *inputs)[0])
        assert torch.equal(step.rollout.tokens, sampled[0])
    width = min(tokens.size(1) for tokens in sampled)
    assert not torch.equal(sampled[0][:, :width], sampled[1][:, :width])


def test_rollout_scores_and_logprobs_are_those_of_the_models(seen):
    """Row by row, each by itself; the score is -7 if end-of-text is missing."""
    ended, eos_id = 0, find_tokenizer(str(seen.data)).eos_id
    for step in seen.steps:
        made = step.rollout
        for row in range(8):
            start, length = int(step.lens[row]), int(step.lens[row] + made.mask[row].sum())
            one = made.tokens[row : row + 1, :length]
            for gpt, got in ((step.policy.gpt, made.logprobs), (step.reference, made.ref_logprobs)):
                with torch.no_grad():
                    logprobs = gpt(one)[0].log_softmax(dim=1)
                expected = [logprobs[t - 1, one[0, t]].item() for t in range(start, length)]
                assert_close(got[row][made.mask[row]], torch.tensor(expected), atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                score = step.reward_model(one, torch.tensor([length])).item()
            expected = score if one[0, -1] == eos_id else -7.0
            assert made.scores[row].item() == pytest.approx(expected, abs=1e-5)
            ended += int(one[0, -1] == eos_id)
    assert 0 < ended < 32 and (made.logprobs - made.ref_logprobs).abs().max() > 0.01


def test_update_gets_the_whitened_advantages_of_the_rollout(seen):
    """Reward -kl_coef * log(pi / ref), the score on the last action; GAE with gamma 0.9 and lambda
    0.7, from the end of each row; returns = advantages + values; then whitened over all actions."""
    for step, kl_coef in zip(seen.steps, kl_coefs(seen.steps)):
        made = step.rollout
        assert step.updated.tokens is made.tokens and step.updated.mask is made.mask
        assert step.updated.old_logprobs is made.logprobs
        assert step.updated.old_values is made.values
        raw = torch.zeros_like(made.values, dtype=torch.float64)
        for row in range(8):
            slots = made.mask[row].nonzero().flatten().tolist()
            value = {t: made.values[row, t].item() for t in slots}
            next_value = next_advantage = 0.0
            for t in reversed(slots):
                reward = -kl_coef * (made.logprobs[row, t] - made.ref_logprobs[row, t]).item()
                reward += made.scores[row].item() if t == slots[-1] else 0.0
                next_advantage = reward + 0.9 * next_value - value[t] + 0.9 * 0.7 * next_advantage
                next_value = value[t]
                raw[row, t] = next_advantage
                expected = next_advantage + value[t]
                assert step.updated.returns[row, t].item() == pytest.approx(expected, abs=1e-4)
        white = (raw[made.mask] - raw[made.mask].mean()) / raw[made.mask].std(correction=0)
        assert_close(step.updated.advantages[made.mask].double(), white, atol=1e-4, rtol=1e-4)


def test_optimizer_has_every_weight_and_the_scheduled_rate(seen):
    """0.03 * (1/2, 1, 1, 1/2): two steps up, then down in a line that reaches 0 at the fifth. No
    decay; eps and betas as documented."""
    for step, factor in zip(seen.steps, (0.5, 1.0, 1.0, 0.5), strict=True):
        ((lr, decay, eps, betas),) = step.settings
        assert step.trains_everything and (decay, eps, betas) == (0, 1e-5, (0.9, 0.95))
        assert lr == step.log["lr"] == pytest.approx(0.03 * factor)


def test_log_has_the_metrics_of_the_rollout(seen):
    tokenizer, judge = find_tokenizer(str(seen.data)), load_judge(str(seen.data))
    coefs = kl_coefs(seen.steps)
    assert len(set(coefs)) == 4
    for step, coef in zip(seen.steps, coefs):
        made = step.rollout
        kl_ref = sum((made.logprobs - made.ref_logprobs)[made.mask].tolist()) / 8
        texts = [
            tokenizer.decode(prompt[:n].tolist()) for prompt, n in zip(step.prompts, step.lens)
        ]
        gold = judge.score(texts, decode_responses(tokenizer, made.tokens, made.mask))
        ends = [made.tokens[i, 1:][made.mask[i]][-1].item() == tokenizer.eos_id for i in range(8)]
        returns = step.updated.returns
        error = (returns - made.values)[made.mask]
        expected = {
            "score": made.scores.mean().item(),
            "gold": sum(gold) / 8,
            "kl_ref": kl_ref,
            "kl_coef": coef,
            "objective": made.scores.mean().item() - coef * kl_ref,
            "length": made.mask.sum().item() / 8,
            "eos_rate": sum(ends) / 8,
            "explained_variance": 1 - (error.var() / returns[made.mask].var()).item(),
        }
        for name, value in expected.items():
            assert step.log[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_run_stops_if_another_policy_scored_the_rollout(seen, monkeypatch, tmp_path):
    collect = train_ppo.collect

    def collect_from_another_policy(*args):
        made = collect(*args)
        return made._replace(logprobs=torch.where(made.mask, made.logprobs - 0.01, 0.0))

    monkeypatch.setattr(train_ppo, "collect", collect_from_another_policy)
    with pytest.raises(RuntimeError, match="log ratio"):
        train_policy(seen, tmp_path)


def test_half_precision_is_used_in_every_forward_pass(seen, monkeypatch, tmp_path):
    """Old, reference and new log-probabilities come from passes in the same precision, or their
    ratios would mean nothing. They are float32 again when they are compared."""
    under_autocast, dtypes = set(), set()
    hidden, chosen_logprobs = GPT.hidden, ppo.chosen_logprobs

    def spy_on_hidden(*args):
        under_autocast.add(torch.is_autocast_enabled("cpu"))
        return hidden(*args)

    def spy_on_logprobs(*args):
        logprobs = chosen_logprobs(*args)
        dtypes.add(logprobs.dtype)
        return logprobs

    monkeypatch.setattr(GPT, "hidden", spy_on_hidden)
    monkeypatch.setattr(ppo, "chosen_logprobs", spy_on_logprobs)
    train_policy(seen, tmp_path, "--steps", "1", "--amp", "bf16")
    assert under_autocast == {True} and dtypes == {torch.float32}


def test_closing_table_compares_the_policy_with_its_reference(seen):
    """In ppo_samples.csv, Before is the reference's response and After the policy's. The rows sft
    and ppo of evaluation.csv are means over them."""
    tokenizer, judge = find_tokenizer(str(seen.data)), load_judge(str(seen.data))
    reward_model = load_reward_model(seen.reward)[0]
    sides = {
        "Before": load_policy(seen.out / "sft.pt", "sft")[0],
        "After": load_policy(seen.out / "ppo.pt", "ppo")[0],
    }
    reference = sides["Before"]
    reference.temperature = 0.8  # a ppo.pt is loaded with its temperature inside
    samples, table = rows(seen.out / "ppo_samples.csv"), rows(seen.out / "evaluation.csv")
    prompts = [row["Prompt"] for row in rows(seen.data / "prompts_heldout.csv")][:10]
    assert [row["Prompt"] for row in samples] == prompts
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    lens = torch.tensor(list(map(len, encoded)))
    tokens = torch.tensor([ids + [0] * (max(lens) - len(ids)) for ids in encoded])
    for (side, gpt), line in zip(sides.items(), table):
        generator = make_generator("cpu", 3, "evaluate", 0)
        whole, mask = generate(gpt, tokens, lens, 12, tokenizer.eos_id, generator)
        texts = decode_responses(tokenizer, whole, mask)
        assert [row[side] for row in samples] == texts
        actions = [row[row_mask].tolist() for row, row_mask in zip(whole[:, 1:], mask)]
        ended = [tokenizer.eos_id in row for row in actions]
        with torch.no_grad():
            scores = reward_model(whole, lens + mask.sum(dim=1)).tolist()
            ratios = gpt(whole).log_softmax(dim=2) - reference(whole).log_softmax(dim=2)
        chosen = ratios[:, :-1].gather(2, whole[:, 1:, None]).squeeze(2)[mask]  # of (10, T, V)
        assert float(line["kl_ref"]) == pytest.approx(chosen.sum().item() / 10, rel=1e-3, abs=1e-4)
        assert float(line["length"]) == pytest.approx(len(chosen) / 10)
        score = sum(s if end else -7.0 for s, end in zip(scores, ended)) / 10
        assert float(line["score"]) == pytest.approx(score, abs=1e-4)
        assert float(line["gold"]) == pytest.approx(sum(judge.score(prompts, texts)) / 10, abs=1e-4)
        assert float(line["eos_rate"]) == pytest.approx(sum(ended) / 10)
    assert abs(float(table[1]["kl_ref"])) > 0.1


# ---- the stages before ----


def test_reward_model_is_evaluated_on_held_out_comparisons(trained):
    """Accuracy, each side on its own; and what a judge in its place would reach, with sigmoid(2.5
    (a - b)) for its votes. The margins are in the unit of the loss, in which a score is divided by
    the scale."""
    data, out, _ = trained
    model, _ = load_reward_model(out / "reward.pt")
    tokenizer, judge = find_tokenizer(str(data)), load_judge(str(data))
    expected, margins = {}, {"_heldout": [], "": []}
    for suffix in ("_heldout", ""):
        right, votes = [], []
        for row in rows(data / f"comparisons{suffix}.csv"):
            scores = []
            for side in ("Chosen", "Rejected"):
                ids = tokenizer.encode(row["Prompt"]) + tokenizer.response_ids(row[side])
                ids = torch.tensor([ids])
                with torch.no_grad():
                    scores.append(model(ids, torch.tensor([ids.size(1)])).item())
            right.append(scores[0] > scores[1])
            margins[suffix].append((scores[0] - scores[1]) * model.scale.item())
            gold = judge.score([row["Prompt"]] * 2, [row["Chosen"], row["Rejected"]])
            votes.append(1 / (1 + math.exp(-2.5 * abs(gold[0] - gold[1]))))
        expected[suffix] = sum(right) / 40, sum(votes) / 40
    result = rows(out / "reward_evaluation.csv")[0]
    got = float(result["accuracy"]), float(result["bayes_accuracy"])
    assert got == pytest.approx(expected["_heldout"], abs=1e-5)
    assert got != pytest.approx(expected[""], abs=1e-3)
    written = sorted(float(row["margin"]) for row in rows(out / "reward_margins.csv"))
    assert written == pytest.approx(sorted(margins["_heldout"]), abs=1e-4)


def test_reward_model_starts_from_sft_and_learns_from_comparisons(trained, tmp_path, monkeypatch):
    """At the scheduled rate."""
    data, out, _ = trained
    sft, _ = load_policy(out / "sft.pt", "sft")
    tokenizer, batches, steps = find_tokenizer(str(data)), [], []
    optimizer_step, comparison_batch = train_reward.optimizer_step, train_reward.comparison_batch

    def spy_on_step(model, optimizer, *rest):
        lr = optimizer.param_groups[0]["lr"]
        steps.append(SimpleNamespace(gpt=copy.deepcopy(model.gpt), lr=lr))
        return optimizer_step(model, optimizer, *rest)

    def spy_on_batch(batch, *rest):
        chosen = [tuple(row.prompt.tokens + row.chosen) for row in batch]
        rejected = [tuple(row.prompt.tokens + row.rejected) for row in batch]
        batches.append(list(zip(chosen, rejected)))
        return comparison_batch(batch, *rest)

    monkeypatch.setattr(train_reward, "optimizer_step", spy_on_step)
    monkeypatch.setattr(train_reward, "comparison_batch", spy_on_batch)
    flags = ["--data", data, "--out", tmp_path, "--sft", out / "sft.pt"]
    flags += ["--warmup", "2", "--lr", "0.01"]
    train(train_reward, train_reward.RewardConfig, "reward", *flags)
    known = set()
    for row in rows(data / "comparisons.csv"):
        prompt = tokenizer.encode(row["Prompt"])
        chosen = tuple(prompt + tokenizer.response_ids(row["Chosen"]))
        known.add((chosen, tuple(prompt + tokenizer.response_ids(row["Rejected"]))))
    # After three steps 40 held-out rows; at the end the 40 training rows, for the scale, then twice
    # the held-out ones.
    assert [len(batch) for batch in batches] == [8, 8, 8, 40, 8, 8, 8, 40, 40, 40]
    assert all(set(batch) <= known for batch in batches if len(batch) == 8)
    assert set(batches[7]) == known
    assert same_weights(steps[0].gpt, sft) and not same_weights(steps[1].gpt, sft)
    # Two steps up; then 0.1 + 0.45 (1 + cos(pi k / 4)), k = 0 to 3.
    factors = [0.5, 1, 1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)]
    assert [step.lr for step in steps] == pytest.approx([0.01 * factor for factor in factors])


def test_accuracy_by_hand():
    """Scores 5 > 1, 2 > 0, 1 < 4 and 3 = 3: two right, one wrong and one half right are 2.5 of
    4."""
    table = {7: 5.0, 8: 1.0, 9: 2.0, 10: 0.0, 11: 1.0, 12: 4.0, 13: 3.0, 14: 3.0}
    pairs = [
        Comparison(Prompt("", [1, 2]), [better], [worse, 3])
        for better, worse in ((7, 8), (9, 10), (11, 12), (13, 14))
    ]

    def model(tokens, lengths):
        return torch.tensor([table[row[2]] for row in tokens.tolist()])

    assert train_reward.accuracy(model, pairs, train_reward.Scoring(0, CPU, 64)) == 0.625


def test_heldout_is_the_share_of_every_stage(bundled, tmp_path):
    """Without held-out files, "a", "b" and "c" have hashes of 0.79, 0.24 and 0.18: the default of
    0.1 holds out "c" only, and 0.3 "b" too."""
    (tmp_path / "prompts.csv").write_text("Prompt\na\nb\nc\n")
    (tmp_path / "demonstrations.csv").write_text("Prompt,Response\na,x\nb,x\nc,x\n")
    (tmp_path / "comparisons.csv").write_text("Prompt,Chosen,Rejected\na,x,y\nb,x,y\nc,x,y\n")
    tokenizer = load_tokenizer(str(bundled / "tokenizer.tiktoken"))
    flags = {"data": str(tmp_path), "heldout": 0.3}

    sft = train_sft.SFTConfig(**flags)
    for heldout, expected in ((False, ["a"]), (True, ["b", "c"])):
        loaded = train_sft.load_rows(sft, tokenizer, 9, heldout)
        assert [tokenizer.decode(row.tokens[: row.prompt_len]) for row in loaded] == expected

    sides = train_reward.load_rows(train_reward.RewardConfig(**flags), tokenizer, 9)
    assert [[row.prompt.text for row in side] for side in sides] == [["a"], ["b", "c"]]

    gpt = GPT(
        GPTConfig(vocab_size=tokenizer.vocab_size, block_size=9, n_layer=1, n_head=1, n_embd=8)
    )
    frozen = Frozen(gpt, None, tokenizer, max_new_tokens=1)
    sides = train_ppo.load_both_prompts(train_ppo.PPOConfig(**flags), frozen)
    assert [[prompt.text for prompt in side] for side in sides] == [["a"], ["b", "c"]]


def test_sft_validation_loss_is_the_mean_over_held_out_tokens(trained):
    """The last row of sft.csv: the mean over all response tokens of demonstrations_heldout.csv, row
    by row."""
    data, out, _ = trained
    gpt, tokenizer = load_policy(out / "sft.pt", "sft")[0], find_tokenizer(str(data))
    losses = []
    for row in rows(data / "demonstrations_heldout.csv"):
        prompt = tokenizer.encode(row["Prompt"])
        ids = torch.tensor([prompt + tokenizer.response_ids(row["Response"])])
        with torch.no_grad():
            logprobs = gpt(ids)[0].log_softmax(dim=1)
        losses += [-logprobs[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.size(1))]
    assert float(rows(out / "sft.csv")[-1]["valid"]) == pytest.approx(
        sum(losses) / len(losses), rel=1e-4
    )


def test_sft_learns_from_demonstrations_at_the_scheduled_rate(trained, tmp_path, monkeypatch):
    data, out, _ = trained
    tokenizer, batches = find_tokenizer(str(data)), []
    demonstration_batch = train_sft.demonstration_batch

    def spy(batch, *rest):
        batches.append({(tuple(row.tokens), row.prompt_len) for row in batch})
        return demonstration_batch(batch, *rest)

    monkeypatch.setattr(train_sft, "demonstration_batch", spy)
    flags = "--steps 4 --eval-every 5 --warmup 2 --lr 0.01 --micro-batch-size 8".split()
    flags += ["--data", data, "--out", tmp_path]
    train(train_sft, train_sft.SFTConfig, "sft", *flags)
    training, heldout = set(), set()
    for known, name in ((training, "demonstrations.csv"), (heldout, "demonstrations_heldout.csv")):
        for row in rows(data / name):
            prompt = tokenizer.encode(row["Prompt"])
            known.add((tuple(prompt + tokenizer.response_ids(row["Response"])), len(prompt)))
    # Validation takes eight rows at a time: after the last step, all 40 held-out rows.
    assert [len(batch) for batch in batches] == [8] * (4 + 5)
    assert all(batch <= training for batch in batches[:4])
    assert set().union(*batches[4:]) == heldout
    factors = [0.5, 1, 1, 0.1 + 0.45]  # two steps up, then half a cosine
    rates = [float(row["lr"]) for row in rows(tmp_path / "sft.csv")]
    assert rates == pytest.approx([0.01 * factor for factor in factors])
