"""rlhf.tools.sample: dialogues, rewards, and the program."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_sft
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy
from rlhf.run.messages import as_text
from rlhf.tools import sample
from rlhf.tools.sample import Response, SampleConfig, shorten
from tests.helpers import tiny


class Letters:
    """A tokenizer whose tokens are the characters."""

    template = ""

    @staticmethod
    def prompt_ids(prompt):
        return list(as_text(prompt))


def test_shorten_leaves_out_whole_leading_turns():
    """A tokenizer with a template gets messages, one without gets their text."""
    question = {"role": "user", "content": "c"}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, question]
    second = "\n\nHuman: c\n\nAssistant:"
    both = "\n\nHuman: a\n\nAssistant: b" + second
    assert shorten(turns, Letters, 100).given == both
    assert shorten(turns, Letters, len(both) - 1) == (second, list(second))
    for prompt in (turns, second):
        message = f"takes {len(second)} tokens and there is room for {len(second) - 1}"
        with pytest.raises(InputError, match=message):
            shorten(prompt, Letters, len(second) - 1)
    chat = type("Chat", (Letters,), {"template": "{{ messages }}"})
    assert shorten(turns, chat, len(both) - 1).given == [question]


HELLO = ["--prompt", "Hello?", "--max-new-tokens", 5]


def run(*flags):
    sample.main(parse_cli(SampleConfig, ["--device", "cpu", *map(str, flags)]))


def test_blanks_around_a_plain_prompt_are_removed_as_in_a_data_set():
    policy = sample.Policy(Path("p.pt"), gpt=None, tokenizer=None)
    assert policy.prompt_for(" \n\nAsk: \n", plain=True) == "\n\nAsk:"


def test_two_checkpoints_respond_with_score_and_gold(trained, capsys):
    """Each gives two responses. The same seed gives the same responses again."""
    data, out, _ = trained
    checkpoints = ["--checkpoint", out / "sft.pt", "--checkpoint", out / "ppo.pt"]
    settings = ["--prompt", "Hello?", "--samples", 2, "--max-new-tokens", 5, "--data", data]
    shown = []
    for _ in range(2):
        run(*checkpoints, *settings)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    lines = [line for line in shown[0].splitlines() if "score" in line]
    assert len(lines) == 4 and all("gold" in line for line in lines)
    assert shown[0].count(f"{out / 'sft.pt'}: ") == 2
    assert shown[0].count(f"{out / 'ppo.pt'}: ") == 2


def test_unusable_reward_model_gives_a_note_or_an_error(trained, tmp_path, capsys):
    """If it was found beside the checkpoint, there is a note and no score. If a flag names it, that
    is an error."""
    data, out, _ = trained
    (tmp_path / "sft.pt").write_bytes((out / "sft.pt").read_bytes())
    (tmp_path / "reward.pt").write_bytes(b"garbled")
    flags = ["--checkpoint", tmp_path / "sft.pt", *HELLO, "--data", data]
    with pytest.raises(InputError, match="is not a checkpoint of this project"):
        run(*flags, "--reward", tmp_path / "reward.pt")
    run(*flags)
    shown = capsys.readouterr().out
    assert "going on without a reward model" in shown and "score" not in shown and "gold" in shown


def test_functions_score_policies_of_any_tokenizer_and_a_reward_model_those_of_one(trained):
    """The second policy has other tokens than the first."""
    _, out, _ = trained
    (out / "brief.py").write_text("def score(prompts, responses): return [0.0, 0.0]\n")
    tokens = torch.load(out / "reward.pt", weights_only=True)["tokenizer"]
    for rewards, scored in (("brief.py", [True, True]), ("reward.pt", [True, False])):
        policies = []
        for fingerprint in (tokens, "another"):
            tokenizer = SimpleNamespace(fingerprint=fingerprint)
            policies.append(sample.Policy(out, torch.nn.Linear(1, 1), tokenizer))
        sample.give_rewards(policies, SampleConfig(reward=(str(out / rewards),)))
        assert [bool(policy.weights) for policy in policies] == scored


def test_policy_is_sampled_at_its_training_temperature(trained, tmp_path):
    """Its logits are divided by it, as in training."""
    data, out, _ = trained
    checkpoint = torch.load(out / "ppo.pt", weights_only=True)
    plain, _ = load_policy(out / "ppo.pt", "ppo")
    checkpoint["config"]["temperature"] = 0.5
    torch.save(checkpoint, tmp_path / "ppo.pt")
    sharper, _ = load_policy(tmp_path / "ppo.pt", "ppo")
    tokens = torch.tensor([[5, 6, 7]])
    assert_close(sharper(tokens), 2 * plain(tokens), atol=1e-5, rtol=0)


def test_tokenizer_is_the_one_that_the_checkpoint_names(trained, tmp_path, monkeypatch, capsys):
    """The checkpoint of train_sft.py --tokenizer FILE names the file, and the data set's own
    tokenizer is not used."""
    data, out, _ = trained
    ranks = (data / "tokenizer.tiktoken").read_text().splitlines(keepends=True)[:-1]
    (tmp_path / "mine.tiktoken").write_text("".join(ranks))
    files = ["--data", data, "--out", tmp_path, "--tokenizer", tmp_path / "mine.tiktoken"]
    flags = tiny("sft", "--steps", 1, *files)
    train_sft.main(parse_cli(train_sft.SFTConfig, flags))
    capsys.readouterr()
    run("--checkpoint", out / "sft.pt", tmp_path / "sft.pt", *HELLO)
    note, first, second = capsys.readouterr().out.splitlines()
    assert note.startswith("going on without gold: ")
    # The reward model knows only the first tokenizer.
    assert "score" in first and "score" not in second

    def no_internet(name):
        raise AssertionError(f"{name} is asked for")

    # The folder has no ranks, which does not mean GPT-2's.
    monkeypatch.setattr("tiktoken.get_encoding", no_internet)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "prompts.csv").write_text("Prompt\nHello.\n")
    run("--checkpoint", tmp_path / "sft.pt", *HELLO, "--data", tmp_path / "bare")


def test_dialogue_goes_on_until_an_empty_line(trained, monkeypatch, capsys):
    """The second prompt begins with the first one and its response. With --plain each prompt stands
    by itself."""
    data, out, _ = trained
    seen = []

    def respond(policy, prompt, *_):
        seen.append(prompt)
        return [Response("", "fine", 0.0, None, 0.0, 1, ended=True)]

    monkeypatch.setattr(sample, "respond", respond)
    for flags in ([], ["--plain"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
        run("--checkpoint", out / "sft.pt", "--data", data, *flags)
    one, two = ({"role": "user", "content": text} for text in ("one", "two"))
    fine = {"role": "assistant", "content": "fine"}
    assert seen == [[one], [one, fine, two], "one", "two"]


def test_too_long_question_does_not_end_the_dialogue(trained, monkeypatch, capsys):
    data, out, _ = trained
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one\n{'x ' * 99}\nlast\n"))
    run("--checkpoint", out / "sft.pt", "--data", data, "--max-new-tokens", 5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "sft.pt: " in line]
    assert len(lines) == 3 and "there is room for" in lines[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--checkpoint", "OUT/reward.pt"],
            "a checkpoint of `python train_sft.py` or `python train_ppo.py` is needed",
        ),
        (["--checkpoint", "OUT/none.pt"], "does not exist"),
        (["--checkpoint", "OUT/sft.pt", "--data", "nowhere"], "there is no such folder"),
        (["--checkpoint", "OUT/sft.pt", "--prompt", "x " * 99], "shorten it"),
        (
            ["--checkpoint", "OUT/sft.pt", "--reward", "OUT/ppo.pt"],
            "written by `python train_ppo.py`",
        ),
    ],
)
def test_sample_rejects_bad_input(trained, flags, message):
    data, out, _ = trained
    with pytest.raises(InputError, match=message):
        run("--data", data, "--prompt", "Hi", *[flag.replace("OUT", str(out)) for flag in flags])


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--temperature", "0"]])
def test_sample_config_rejects_impossible_values(flags):
    with pytest.raises(SystemExit) as stop:
        parse_cli(SampleConfig, flags)
    assert stop.value.code == 2
