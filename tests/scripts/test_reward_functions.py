"""train_ppo.py --reward: functions of the user beside the reward model and without it."""

import json

import pytest
import torch

import train_ppo
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.tools import optimality, sample
from tests.helpers import CPU, rows, script, tiny

FUNCTIONS = """
def letters(prompts, responses):
    return [float(len(response)) for response in responses]


def kinds(prompts, responses):
    return [float(isinstance(prompt, list)) for prompt in prompts]


def broken(prompts, responses):
    return [1 / len(response[:1]) for response in responses] + [1.0]


def raises(prompts, responses):
    raise OSError("no server")


def leaves(prompts, responses):
    raise SystemExit(0)
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.py"
    path.write_text(FUNCTIONS)
    return path


def flags_for(data, sft, out, *rewards):
    return ["--data", data, "--sft", sft / "sft.pt", "--out", out, "--reward", *rewards]


def run(trained, out, *flags, ok=True):
    data, sft, _ = trained
    return script("ppo", *flags_for(data, sft, out, *flags), "--steps", 2, ok=ok)


def table(out):
    return [{name: cell for name, cell in row.items()} for row in rows(out / "ppo.csv")]


def test_a_function_needs_no_reward_model(trained, tmp_path, rules):
    """Scores are the letters of the responses. The value network starts from the fine-tuned
    model, which is written with it."""
    out = tmp_path / "out"
    printed = run(trained, out, f"{rules}:letters", "--missing-eos-score", "none").stdout
    first, *_ = table(out)
    assert float(first["score"]) > 2 and "score_letters" not in first
    weights = torch.load(out / "ppo.pt", weights_only=True)["model"]
    start = torch.load(trained[1] / "sft.pt", weights_only=True)["model"]["wte.weight"]
    for network in ("gpt", "value_gpt"):
        assert not torch.equal(weights[f"{network}.wte.weight"], start)
    assert not torch.equal(weights["value_gpt.wte.weight"], weights["gpt.wte.weight"])
    assert "before and after" in printed
    samples = rows(out / "ppo_samples.csv")
    assert all(float(row["score_after"]) == len(row["After"]) for row in samples)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["rloo", "grpo", "reinforce"])
def test_a_function_needs_no_value_network(trained, tmp_path, rules, advantage):
    run(trained, tmp_path, f"{rules}:letters", "--advantage", advantage, "--group-size", 2)
    weights = torch.load(tmp_path / "ppo.pt", weights_only=True)["model"]
    assert not any(name.startswith("value") for name in weights)


@pytest.mark.slow
def test_each_of_several_rewards_is_a_metric(trained, tmp_path, rules):
    rewards = (trained[1] / "reward.pt", f"{rules}:letters")
    weights = ["--reward-weights", 0.5, 0.1]
    run(trained, tmp_path, *rewards, *weights, "--missing-eos-score", "none")
    for row in table(tmp_path):
        total = 0.5 * float(row["score_model"]) + 0.1 * float(row["score_letters"])
        assert float(row["score"]) == pytest.approx(total, abs=1e-4)


def test_a_function_gets_messages_if_the_prompts_are_messages(trained, tmp_path, rules):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tokenizer.tiktoken",):
        (data / name).write_bytes((trained[0] / name).read_bytes())
    cells = [json.dumps([{"role": "user", "content": f"Say {i}."}]) for i in range(8)]
    lines = ["Prompt", *('"' + cell.replace('"', '""') + '"' for cell in cells)]
    (data / "prompts.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    flags = flags_for(data, trained[1], out, f"{rules}:kinds")
    printed = script("ppo", *flags, "--steps", 1, "--missing-eos-score", "none").stdout
    assert float(table(out)[0]["score"]) == 1.0
    assert "no prompts_heldout.csv" in printed and "Human: Say" in printed


@pytest.mark.parametrize(
    ("function", "message"),
    [("broken", "broken() in "), ("missing", "has no function missing")],
)
def test_a_faulty_function_is_one_line(trained, tmp_path, rules, function, message):
    done = run(trained, tmp_path, f"{rules}:{function}", ok=False)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "ppo.pt").exists()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [("raises", RuntimeError, "no server"), ("leaves", RuntimeError, "SystemExit")],
)
def test_an_error_inside_a_function_keeps_its_traceback(
    trained, tmp_path, rules, function, error, message
):
    """An OSError is not taken for one of a file."""
    with pytest.raises(error, match=message):
        run(trained, tmp_path, f"{rules}:{function}")
    assert not (tmp_path / "ppo.pt").exists()


@pytest.mark.slow
def test_resume_needs_the_same_functions(trained, tmp_path, rules):
    run(trained, tmp_path, f"{rules}:letters", "--eval-every", 1)
    rules.write_text(FUNCTIONS + "\n# changed\n")
    done = run(trained, tmp_path, f"{rules}:letters", "--eval-every", 1, "--resume", ok=False)
    assert done.returncode == 2 and "another reward letters file" in done.stderr
    done = run(trained, tmp_path, f"{rules}:kinds", "--eval-every", 1, "--resume", ok=False)
    assert done.returncode == 2 and "begun with another reward (" in done.stderr


@pytest.mark.slow
def test_an_odd_scale_is_said_once(trained, tmp_path, rules):
    """Lengths in letters deviate by more than five."""
    printed = run(trained, tmp_path, f"{rules}:letters", "--missing-eos-score", "none").stdout
    std = float(table(tmp_path)[0]["score_std"])
    assert std > 5
    assert printed.count("multiply --reward-weights by") == 2  # and again at the end


@pytest.mark.slow
def test_resume_needs_the_rewards_in_the_order_of_their_weights(trained, tmp_path, rules):
    two = [f"{rules}:letters", f"{rules}:kinds"]
    weights = ["--reward-weights", 1, 2, "--eval-every", 1]
    run(trained, tmp_path, *two, *weights)
    done = run(trained, tmp_path, *reversed(two), *weights, "--resume", ok=False)
    assert done.returncode == 2 and "begun with another reward (" in done.stderr


# ---- the tools ----


def tool(module, config, *flags):
    module.main(parse_cli(config, list(map(str, flags))))


@pytest.mark.slow
def test_optimality_and_sample_use_the_functions_that_the_user_names(
    trained, tmp_path, rules, capsys
):
    reward = f"{rules}:letters"
    run(trained, tmp_path, reward, "--missing-eos-score", "none", "--kl-coef", 5)
    checkpoint = ["--checkpoint", tmp_path / "ppo.pt", "--device", "cpu", "--data", trained[0]]
    small = ["--prompts", 2, "--samples", 4, "--sft", trained[1] / "sft.pt"]
    with pytest.raises(InputError, match="trained with --reward .*letters; give the same rewards"):
        tool(optimality, optimality.OptimalityConfig, *checkpoint, *small)
    tool(optimality, optimality.OptimalityConfig, *checkpoint, *small, "--reward", reward)
    assert [row["policy"] for row in rows(tmp_path / "evaluation.csv")][-1] == "optimum"
    capsys.readouterr()
    hello = ["--prompt", "Hello?", "--max-new-tokens", 4]
    tool(sample, sample.SampleConfig, *checkpoint, *hello, "--reward", reward)
    shown = capsys.readouterr().out
    text = shown.split("ppo.pt: ")[1].split("   (")[0]
    assert f"score {float(len(text)):+.2f}" in shown
    rules.write_text(FUNCTIONS + "\n# changed\n")
    with pytest.raises(InputError, match="another reward letters file"):
        tool(optimality, optimality.OptimalityConfig, *checkpoint, *small, "--reward", reward)


@pytest.mark.slow
def test_optimality_samples_and_scores_as_the_run_did(trained, tmp_path, rules):
    """Rewards with weights, limits that are drawn, fragments scored as they are, and half of the
    prompts held out: the rows of the reference and of PPO stay as they were."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("tokenizer.tiktoken", "prompts.csv"):
        (data / name).write_bytes((trained[0] / name).read_bytes())
    out = tmp_path / "out"
    rewards = [trained[1] / "reward.pt", f"{rules}:letters", f"{rules}:kinds"]
    settings = "--reward-weights 0.5 0.1 1 --max-new-tokens 3 9 --heldout 0.5 --missing-eos-score"
    flags = [*flags_for(data, trained[1], out, *rewards), *settings.split(), "none", "--steps", 2]
    _, frozen, _ = train_ppo.load_models(parse_cli(train_ppo.PPOConfig, tiny("ppo", *flags)), CPU)
    assert (frozen.weights, frozen.shortest_limit, frozen.max_new_tokens) == ((0.5, 0.1, 1), 3, 9)
    script("ppo", *flags)
    before = rows(out / "evaluation.csv")
    assert before[0]["prompts"] == "10"  # --eval-prompts; of 40 prompts a tenth is four
    run_flags = ["--checkpoint", out / "ppo.pt", "--sft", trained[1] / "sft.pt", "--device", "cpu"]
    run_flags += ["--prompts", 2, "--samples", 4]
    tool(optimality, optimality.OptimalityConfig, *run_flags, "--reward", *rewards)
    for old, new in zip(before, rows(out / "evaluation.csv")):
        for name in ("score", "kl_ref", "length", "prompts"):
            assert float(new[name]) == pytest.approx(float(old[name]), rel=1e-4, abs=1e-5)
    other_order = [rewards[0], *rewards[:0:-1]]
    with pytest.raises(InputError, match="give the same rewards, in this order"):
        tool(optimality, optimality.OptimalityConfig, *run_flags, "--reward", *other_order)
