"""What the three scripts' main functions hand from one part to the next, held to sums done here by hand.

The parts have tests of their own. A loop that gives them the wrong thing (gamma for lambda, the policy for its
reference, held-out rows for training rows) passes all of those, trains, and ends a little worse.
"""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from rlhf.checkpoints import load_policy, load_reward_model
from rlhf.cli import parse_cli
from rlhf.common import make_generator
from rlhf.data import Comparison, Prompt, encode_response, find_tokenizer
from rlhf.evaluate import decode_responses
from rlhf.judge import load_judge
from rlhf.model import GPT
from rlhf.rollout import generate
from tests.conftest import TINY, rows

FLAGS = ["--gamma", "0.9", "--lam", "0.7", "--kl-coef", "0.3", "--kl-target", "0.01", "--kl-horizon", "16",
         "--missing-eos-score", "-7", "--temperature", "0.8", "--lr", "0.03", "--warmup", "2", "--seed", "3",
         "--max-new-tokens", "12"]


@pytest.fixture(scope="module")
def seen(trained, tmp_path_factory):
    """Four steps of train_ppo.main: the models before each, what it collected, and what it gave to update."""
    data, out, _ = trained
    ours = tmp_path_factory.mktemp("wiring")
    sft = torch.load(out / "sft.pt", weights_only=True)  # so little trained that it hardly ever says end-of-text
    said = sft["model"]["wte.weight"][find_tokenizer(str(data)).eos_id]
    sft["model"]["ln_f.bias"] = 5 * said / said.square().sum()  # adds 5 to that token's logit
    torch.save(sft, ours / "sft.pt")
    record = {"data": data, "reward": out / "reward.pt", "out": ours, "collected": [], "updated": []}
    collect, update = train_ppo.collect, train_ppo.update

    def spy_on_collect(policy, reference, reward_model, *rest):
        models = copy.deepcopy((policy, reference, reward_model))
        rollout = collect(policy, reference, reward_model, *rest)
        record["collected"].append((*models, rest, rollout))
        return rollout

    def spy_on_update(policy, optimizer, scaler, rollout, advantages, returns, cfg, amp, step, ptx):
        settings = {(group["lr"], group["weight_decay"], group["eps"], group["betas"])
                    for group in optimizer.param_groups}
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        everything = given == {id(p) for p in policy.parameters()}
        record["updated"].append((rollout, advantages, returns, settings, everything))
        return update(policy, optimizer, scaler, rollout, advantages, returns, cfg, amp, step, ptx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_ppo, "collect", spy_on_collect)
        patch.setattr(train_ppo, "update", spy_on_update)
        flags = ["--device", "cpu", *TINY["ppo"].split(), "--data", data, "--out", ours, "--reward", record["reward"],
                 *FLAGS]
        train_ppo.main(parse_cli(train_ppo.PPOConfig, list(map(str, flags))))
    record["log"] = [{k: float(v) for k, v in row.items()} for row in rows(ours / "ppo.csv")]
    assert len(record["log"]) == len(record["collected"]) == len(record["updated"]) == 4
    return record


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def kl_coefs(log):
    """By hand: 0.3, then times 1 + clip(kl / 0.01 - 1, -0.2, 0.2) * 8 / 16 after each step."""
    coefs = [0.3]
    for row in log:
        coefs.append(coefs[-1] * (1 + min(max(row["kl_ref"] / 0.01 - 1, -0.2), 0.2) * 8 / 16))
    return coefs[:-1]


def test_policy_reference_and_reward_model_are_three(seen):
    """The policy starts as the reference and leaves it; the reference and the reward model stay what was loaded. The
    value network starts as the reward model's and leaves it."""
    sft, reward_model = load_policy(seen["out"] / "sft.pt", "sft")[0], load_reward_model(seen["reward"])[0]
    for step, (policy, reference, scorer, _, _) in enumerate(seen["collected"]):
        assert same_weights(reference, sft) and same_weights(scorer, reward_model)
        assert same_weights(policy.gpt, sft) == same_weights(policy.value_gpt, reward_model.gpt) == (step == 0)
        assert policy.gpt.temperature == reference.temperature == 0.8


def test_the_policy_answers(seen):
    """Each rollout is what the policy of that step says, under the generator of that step, to eight prompts of
    prompts.csv; a generator of its own for every step."""
    texts = {row["Prompt"] for row in rows(seen["data"] / "prompts.csv")}
    tokenizer = find_tokenizer(str(seen["data"]))
    for step, (policy, reference, _, (prompts, lens, longest, eos_id, *_), rollout) in enumerate(seen["collected"]):
        assert (len(prompts), longest, eos_id) == (8, 12, tokenizer.eos_id)
        assert {tokenizer.decode(row[:n].tolist()) for row, n in zip(prompts, lens)} <= texts
        said, by_reference = (generate(gpt, prompts, lens, 12, eos_id, make_generator("cpu", 3, "rollout", step))[0]
                              for gpt in (policy.gpt, reference))
        assert torch.equal(rollout.tokens, said)
    assert not torch.equal(said[:, : by_reference.size(1)], by_reference[:, : said.size(1)])


def test_scores_and_logprobs_are_those_of_the_models(seen):
    """Row by row, each alone; -7 where end-of-text is missing."""
    ended = 0
    for policy, reference, reward_model, (_, lens, _, eos_id, *_), rollout in seen["collected"]:
        for row in range(8):
            start, length = int(lens[row]), int(lens[row] + rollout.mask[row].sum())
            alone = rollout.tokens[row : row + 1, :length]
            for gpt, got in ((policy.gpt, rollout.logprobs), (reference, rollout.ref_logprobs)):
                with torch.no_grad():
                    logprobs = gpt(alone)[0].log_softmax(dim=1)
                expected = [logprobs[t - 1, alone[0, t]].item() for t in range(start, length)]
                assert_close(got[row][rollout.mask[row]], torch.tensor(expected), atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                score = reward_model(alone, torch.tensor([length])).item() if alone[0, -1] == eos_id else -7.0
            assert rollout.scores[row].item() == pytest.approx(score, abs=1e-5)
            ended += int(alone[0, -1] == eos_id)
    assert 0 < ended < 32 and (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.01


def test_update_gets_the_advantages_of_the_rollout(seen):
    """Reward -kl_coef * log(pi / ref), the score on the last action; GAE with gamma 0.9 and lambda 0.7, from the end of
    each row; returns = advantages + values; then whitened over all actions."""
    for (*_, rollout), (given, advantages, returns, *_), kl_coef in zip(
            seen["collected"], seen["updated"], kl_coefs(seen["log"])):
        assert given is rollout
        raw = torch.zeros_like(rollout.values, dtype=torch.float64)
        for row in range(8):
            slots = rollout.mask[row].nonzero().flatten().tolist()
            value = {t: rollout.values[row, t].item() for t in slots}
            next_value = next_advantage = 0.0
            for t in reversed(slots):
                reward = -kl_coef * (rollout.logprobs[row, t] - rollout.ref_logprobs[row, t]).item()
                reward += rollout.scores[row].item() if t == slots[-1] else 0.0
                next_advantage = reward + 0.9 * next_value - value[t] + 0.9 * 0.7 * next_advantage
                next_value = value[t]
                raw[row, t] = next_advantage
                assert returns[row, t].item() == pytest.approx(next_advantage + value[t], abs=1e-4)
        mask = rollout.mask
        white = (raw[mask] - raw[mask].mean()) / raw[mask].std(correction=0)
        assert_close(advantages[mask].double(), white, atol=1e-4, rtol=1e-4)


def test_the_optimizer_has_every_weight_and_the_scheduled_rate(seen):
    """0.03 * (1/2, 1, 1, 1/2): two steps up, then down in a line that reaches 0 at the fifth. No decay; eps and betas
    as documented."""
    factors = (0.5, 1.0, 1.0, 0.5)
    for (*_, settings, everything), factor, row in zip(seen["updated"], factors, seen["log"], strict=True):
        (lr, decay, eps, betas), = settings
        assert everything and (decay, eps, betas) == (0, 1e-5, (0.9, 0.95))
        assert lr == row["lr"] == pytest.approx(0.03 * factor)


def test_the_log_says_what_happened(seen):
    tokenizer, judge = find_tokenizer(str(seen["data"])), load_judge(str(seen["data"]))
    coefs = kl_coefs(seen["log"])
    assert len(set(coefs)) == 4
    for (_, _, _, (prompts, lens, _, eos_id, *_), made), (_, _, returns, *_), row, coef in zip(
            seen["collected"], seen["updated"], seen["log"], coefs):
        kl_ref = sum((made.logprobs - made.ref_logprobs)[made.mask].tolist()) / 8
        texts = [tokenizer.decode(prompt[:n].tolist()) for prompt, n in zip(prompts, lens)]
        gold = judge.score(texts, decode_responses(tokenizer, made.tokens, made.mask))
        ends = [made.tokens[i, 1:][made.mask[i]][-1].item() == eos_id for i in range(8)]
        error = (returns - made.values)[made.mask]
        expected = {"score": made.scores.mean().item(), "gold": sum(gold) / 8, "kl_ref": kl_ref, "kl_coef": coef,
                    "objective": made.scores.mean().item() - coef * kl_ref, "length": made.mask.sum().item() / 8,
                    "eos_rate": sum(ends) / 8,
                    "explained_variance": 1 - (error.var() / returns[made.mask].var()).item()}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_a_rollout_that_another_policy_scored_stops_the_run(seen, monkeypatch, tmp_path):
    collect = train_ppo.collect
    monkeypatch.setattr(train_ppo, "collect", lambda *args: (made := collect(*args))._replace(
        logprobs=torch.where(made.mask, made.logprobs - 0.01, 0.0)))
    flags = ["--device", "cpu", *TINY["ppo"].split(), "--data", seen["data"], "--out", tmp_path, "--sft",
             seen["out"] / "sft.pt", "--reward", seen["reward"]]
    with pytest.raises(RuntimeError, match="log ratio"):
        train_ppo.main(parse_cli(train_ppo.PPOConfig, list(map(str, flags))))


def test_half_precision_is_in_every_pass(seen, monkeypatch, tmp_path):
    """Old, reference and new log-probabilities come from passes of one kind, or their ratios would mean nothing; and
    they are float32 again where they are compared."""
    passes, forward, logprobs = set(), GPT.hidden, train_ppo.token_logprobs
    monkeypatch.setattr(GPT, "hidden", lambda *args: passes.add(torch.is_autocast_enabled("cpu")) or forward(*args))
    monkeypatch.setattr(train_ppo, "token_logprobs", lambda *args: passes.add((out := logprobs(*args)).dtype) or out)
    flags = ["--device", "cpu", *TINY["ppo"].split(), "--steps", "1", "--data", seen["data"], "--out", tmp_path,
             "--sft", seen["out"] / "sft.pt", "--reward", seen["reward"], "--amp", "bf16", "--ptx-coef", "1"]
    train_ppo.main(parse_cli(train_ppo.PPOConfig, list(map(str, flags))))
    assert passes == {True, torch.float32}


def test_the_closing_table_is_of_the_policy_and_its_reference(seen):
    """Of the answers in ppo_samples.csv, one reward-model pass each: Before is the reference's, After the policy's, and
    the rows sft and ppo of evaluation.csv are their means."""
    tokenizer, judge = find_tokenizer(str(seen["data"])), load_judge(str(seen["data"]))
    reward_model = load_reward_model(seen["reward"])[0]
    sides = {"Before": load_policy(seen["out"] / "sft.pt", "sft")[0],
             "After": load_policy(seen["out"] / "ppo.pt", "ppo")[0]}
    reference = sides["Before"]
    reference.temperature = 0.8  # a ppo.pt is loaded with its temperature inside
    samples, table = rows(seen["out"] / "ppo_samples.csv"), rows(seen["out"] / "evaluation.csv")
    prompts = [row["Prompt"] for row in rows(seen["data"] / "prompts_heldout.csv")][:10]
    assert [row["Prompt"] for row in samples] == prompts
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    lens = torch.tensor(list(map(len, encoded)))
    tokens = torch.tensor([ids + [0] * (max(lens) - len(ids)) for ids in encoded])
    for (side, gpt), line in zip(sides.items(), table):
        said, mask = generate(gpt, tokens, lens, 12, tokenizer.eos_id, make_generator("cpu", 3, "evaluate", 0))
        texts = decode_responses(tokenizer, said, mask)
        assert [row[side] for row in samples] == texts
        ended = [tokenizer.eos_id in row[row_mask].tolist() for row, row_mask in zip(said[:, 1:], mask)]
        with torch.no_grad():
            scores = reward_model(said, lens + mask.sum(dim=1)).tolist()
            ratios = gpt(said).log_softmax(dim=2) - reference(said).log_softmax(dim=2)  # (10, T, V)
        chosen = ratios[:, :-1].gather(2, said[:, 1:, None]).squeeze(2)[mask]
        assert float(line["kl_ref"]) == pytest.approx(chosen.sum().item() / 10, rel=1e-3, abs=1e-4)
        assert float(line["length"]) == pytest.approx(len(chosen) / 10)
        score = sum(s if end else -7.0 for s, end in zip(scores, ended)) / 10
        assert float(line["score"]) == pytest.approx(score, abs=1e-4)
        assert float(line["gold"]) == pytest.approx(sum(judge.score(prompts, texts)) / 10, abs=1e-4)
        assert float(line["eos_rate"]) == pytest.approx(sum(ended) / 10)
    assert abs(float(table[1]["kl_ref"])) > 0.1


# ---- the stages before ----


def test_reward_model_is_evaluated_on_held_out_comparisons(trained):
    """Accuracy, each side scored alone; and what a judge in its place would reach, with sigmoid(2.5 (a - b)) for its
    votes."""
    data, out, _ = trained
    model, tokenizer, judge = load_reward_model(out / "reward.pt")[0], find_tokenizer(str(data)), load_judge(str(data))
    expected = {}
    for suffix in ("_heldout", ""):
        right, votes = [], []
        for row in rows(data / f"comparisons{suffix}.csv"):
            scores = []
            for side in ("Chosen", "Rejected"):
                ids = torch.tensor([tokenizer.encode(row["Prompt"]) + encode_response(tokenizer, row[side])])
                with torch.no_grad():
                    scores.append(model(ids, torch.tensor([ids.size(1)])).item())
            right.append(scores[0] > scores[1])
            gold = judge.score([row["Prompt"]] * 2, [row["Chosen"], row["Rejected"]])
            votes.append(1 / (1 + math.exp(-2.5 * abs(gold[0] - gold[1]))))
        expected[suffix] = sum(right) / 40, sum(votes) / 40
    result = rows(out / "reward_evaluation.csv")[0]
    got = float(result["accuracy"]), float(result["bayes_accuracy"])
    assert got == pytest.approx(expected["_heldout"], abs=1e-5) and got != pytest.approx(expected[""], abs=1e-3)


def test_reward_model_starts_from_the_fine_tuned_one(trained, tmp_path, monkeypatch):
    """And learns from comparisons.csv, at the scheduled rate."""
    data, out, _ = trained
    sft, tokenizer, taken = load_policy(out / "sft.pt", "sft")[0], find_tokenizer(str(data)), []

    def spy(losses, model, optimizer, scaler, max_grad_norm):
        taken.append((copy.deepcopy(model.gpt), optimizer.param_groups[0]["lr"]))
        return optimizer_step(losses, model, optimizer, scaler, max_grad_norm)

    def spy_on_batches(model, batch, *rest):
        taken.append([tuple(row.prompt.tokens + side for side in (row.chosen, row.rejected)) for row in batch])
        return batch_losses(model, batch, *rest)

    optimizer_step, batch_losses = train_reward.optimizer_step, train_reward.batch_losses
    monkeypatch.setattr(train_reward, "optimizer_step", spy)
    monkeypatch.setattr(train_reward, "batch_losses", spy_on_batches)
    flags = ["--device", "cpu", *TINY["reward"].split(), "--data", data, "--out", tmp_path, "--sft", out / "sft.pt",
             "--warmup", "2", "--lr", "0.01"]
    train_reward.main(parse_cli(train_reward.RewardConfig, list(map(str, flags))))
    known = {tuple(tuple(tokenizer.encode(row["Prompt"]) + encode_response(tokenizer, row[side]))
                   for side in ("Chosen", "Rejected")) for row in rows(data / "comparisons.csv")}
    batches, steps = taken[::2], taken[1::2]
    assert all(len(batch) == 8 and {tuple(map(tuple, pair)) for pair in batch} <= known for batch in batches)
    assert same_weights(steps[0][0], sft) and not same_weights(steps[1][0], sft)
    # Two steps up; then 0.1 + 0.45 (1 + cos(pi k / 4)), k = 0 to 3.
    factors = [0.5, 1, 1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5)]
    assert [lr for _, lr in steps] == pytest.approx([0.01 * factor for factor in factors])


def test_accuracy_by_hand():
    """Scores 5 > 1, 2 > 0, 1 < 4 and 3 = 3: two right, one wrong and one half right are 2.5 of 4."""
    table = {7: 5.0, 8: 1.0, 9: 2.0, 10: 0.0, 11: 1.0, 12: 4.0, 13: 3.0, 14: 3.0}
    pairs = [Comparison(Prompt("", [1, 2]), [better], [worse, 3])
             for better, worse in ((7, 8), (9, 10), (11, 12), (13, 14))]

    def model(tokens, lengths):
        return torch.tensor([table[row[2]] for row in tokens.tolist()])

    assert train_reward.accuracy(model, pairs, 0, torch.device("cpu"), None) == 0.625


def test_swapped_prompts_belong_to_other_rows():
    pairs = [Comparison(Prompt(str(i), [i] * (1 + i)), [7], [8, 9]) for i in range(6)]
    swapped = train_reward.swap_prompts(pairs, seed=0, limit=100)
    assert all(new.prompt != old.prompt and new[1:] == old[1:] for new, old in zip(swapped, pairs, strict=True))
    assert sorted(row.prompt.text for row in swapped) == list("012345")
    assert {len(row.prompt.tokens) for row in train_reward.swap_prompts(pairs, seed=0, limit=7)} == {1, 2, 3, 4, 5}


def test_held_out_loss_of_fine_tuning(trained):
    """The last row of sft.csv: the mean over all response tokens of demonstrations_heldout.csv, row by row."""
    data, out, _ = trained
    gpt, tokenizer = load_policy(out / "sft.pt", "sft")[0], find_tokenizer(str(data))
    losses = []
    for row in rows(data / "demonstrations_heldout.csv"):
        prompt = tokenizer.encode(row["Prompt"])
        ids = torch.tensor([prompt + encode_response(tokenizer, row["Response"])])
        with torch.no_grad():
            logprobs = gpt(ids)[0].log_softmax(dim=1)
        losses += [-logprobs[t - 1, ids[0, t]].item() for t in range(len(prompt), ids.size(1))]
    assert float(rows(out / "sft.csv")[-1]["valid"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_fine_tuning_learns_from_the_demonstrations_at_the_scheduled_rate(trained, tmp_path, monkeypatch):
    data, out, _ = trained
    tokenizer, batches = find_tokenizer(str(data)), []
    batch_losses = train_sft.batch_losses
    monkeypatch.setattr(train_sft, "batch_losses", lambda gpt, batch, *rest: batches.append(
        {(tuple(row.tokens), row.prompt_len) for row in batch}) or batch_losses(gpt, batch, *rest))
    flags = ["--device", "cpu", *TINY["sft"].split(), "--steps", "4", "--eval-every", "5", "--warmup", "2", "--lr",
             "0.01", "--data", data, "--out", tmp_path]
    train_sft.main(parse_cli(train_sft.SFTConfig, list(map(str, flags))))
    train, heldout = set(), set()
    for known, name in ((train, "demonstrations.csv"), (heldout, "demonstrations_heldout.csv")):
        for row in rows(data / name):
            prompt = tokenizer.encode(row["Prompt"])
            known.add((tuple(prompt + encode_response(tokenizer, row["Response"])), len(prompt)))
    # Of the six calls the second and the last are validations, after the first step and the last.
    assert [len(batch) for batch in batches] == [8, 40, 8, 8, 8, 40]
    assert all(batch <= (train if len(batch) == 8 else heldout) for batch in batches)
    factors = [0.5, 1, 1, 0.1 + 0.45]  # two steps up, then half a cosine
    assert [float(row["lr"]) for row in rows(tmp_path / "sft.csv")] == pytest.approx([0.01 * f for f in factors])
