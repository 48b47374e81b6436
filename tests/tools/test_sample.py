"""rlhf.tools.sample: dialogues, rewards, and the program."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import train_sft
from data import responses
from rlhf import evaluate
from rlhf.rollout import Frozen
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy
from rlhf.run.messages import as_text
from rlhf.tools import sample
from rlhf.tools.sample import Policy, SampleConfig, Streamed, fit
from tests.helpers import tiny


class Letters:
    """A tokenizer whose tokens are the characters."""

    template = ""

    @staticmethod
    def prompt_ids(prompt):
        return list(as_text(prompt))


def policy_of(tokenizer, limit=100):
    """A policy without networks, whose prompts may have `limit` tokens."""
    frozen = SimpleNamespace(tokenizer=tokenizer, context=limit + 5, max_new_tokens=5)
    return Policy(Path("p.pt"), frozen, judge=None)


CHAT = type("Chat", (Letters,), {"template": "{{ messages }}"})
QUESTION = {"role": "user", "content": "c"}
SYSTEM = {"role": "system", "content": "s"}


def test_fit_leaves_out_whole_leading_turns():
    """A tokenizer with a template gets messages, one without gets their text."""
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        QUESTION,
    ]
    second = "\n\nHuman: c\n\nAssistant:"
    both = "\n\nHuman: a\n\nAssistant: b" + second
    cfg = SampleConfig()
    assert fit(turns, policy_of(Letters), cfg).given == both
    assert fit(turns, policy_of(Letters, len(both) - 1), cfg) == (second, list(second))
    message = f"takes {len(second)} tokens and there is room for {len(second) - 1}"
    for prompt, flags in ((turns, {}), (second, {"plain": True})):
        with pytest.raises(InputError, match=message):
            fit(prompt, policy_of(Letters, len(second) - 1), SampleConfig(**flags))
    assert fit(turns, policy_of(CHAT, len(both) - 1), cfg).given == [QUESTION]


def test_system_message_stays_before_a_dialogue_that_is_cut():
    cfg = SampleConfig(system="s")
    turns = [QUESTION, {"role": "assistant", "content": "b" * 90}, QUESTION]
    assert fit(turns, policy_of(CHAT), cfg).given == [SYSTEM, QUESTION]
    assert fit(turns, policy_of(Letters), cfg).given == "s\n\nHuman: c\n\nAssistant:"


def test_prompt_that_has_a_system_message_keeps_it():
    cfg = SampleConfig(system="another")
    assert policy_of(CHAT).encode([SYSTEM, QUESTION], cfg).given == [SYSTEM, QUESTION]


ASK = "What about a slow laptop?"  # the judge knows it
HELLO = ["--prompt", ASK, "--max-new-tokens", 5]


def run(*flags):
    sample.main(parse_cli(SampleConfig, ["--device", "cpu", *map(str, flags)]))


def test_two_checkpoints_respond_with_score_and_gold(trained, capsys):
    """Each gives two responses. The same seed gives the same responses again."""
    data, out, _ = trained
    checkpoints = ["--checkpoint", out / "sft.pt", "--checkpoint", out / "ppo.pt"]
    settings = [*HELLO, "--n", 2, "--data", data]
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


def test_error_of_what_the_user_has_not_named_is_a_note_without_control_characters(capsys):
    with sample.going_on("going on without gold", unless=()):
        raise InputError("a\x1b[2Jb/judge.py is code")
    assert capsys.readouterr().out == "going on without gold: a\\x1b[2Jb/judge.py is code\n"
    with pytest.raises(InputError, match="garbled"):
        with sample.going_on("", unless=("reward.pt",)):
            raise InputError("garbled")


def test_functions_score_policies_of_any_tokenizer_and_a_reward_model_those_of_one(trained):
    """The second policy has other tokens than the first."""
    _, out, _ = trained
    (out / "brief.py").write_text("def score(prompts, responses): return [0.0, 0.0]\n")
    tokens = torch.load(out / "reward.pt", weights_only=True)["tokenizer"]
    for rewards, scored in (("brief.py", [True, True]), ("reward.pt", [True, False])):
        policies = []
        for fingerprint in (tokens, "another"):
            tokenizer = SimpleNamespace(fingerprint=fingerprint)
            frozen = Frozen(None, None, tokenizer, weights=())
            policies.append(Policy(out, frozen, judge=None))
        sample.give_rewards(policies, SampleConfig(reward=(str(out / rewards),), device="cpu"))
        assert [bool(policy.frozen.weights) for policy in policies] == scored


def test_temperature_multiplies_that_of_training(trained):
    data, out, _ = trained
    flags = ["--checkpoint", str(out / "sft.pt"), "--data", str(data), "--temperature", "0.5"]
    [policy] = sample.load_policies(parse_cli(SampleConfig, flags))
    plain, _ = load_policy(out / "sft.pt", "sft")
    tokens = torch.tensor([[5, 6, 7]])
    assert_close(policy.frozen.reference.cpu()(tokens), 2 * plain(tokens), atol=1e-5, rtol=0)


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
    shutil.copy(data / "prompts.csv", tmp_path / "bare")
    run("--checkpoint", tmp_path / "sft.pt", *HELLO, "--data", tmp_path / "bare")


def test_dialogue_goes_on_until_an_empty_line(trained, monkeypatch, capsys):
    """The second prompt begins with the first one and its first response. With --plain each prompt
    stands by itself. Each response has another seed."""
    data, out, _ = trained
    seen = []

    def print_response(policy, prompt, seed):
        seen.append((prompt.given, seed))
        return "fine" if seed % 2 == 0 else "other"

    monkeypatch.setattr(sample, "print_response", print_response)
    for flags in ([], ["--plain"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
        run("--checkpoint", out / "sft.pt", "--data", data, "--n", 2, *flags)
    one = "\n\nHuman: one\n\nAssistant:"
    both = f"{one} fine\n\nHuman: two\n\nAssistant:"
    expected = [(one, 0), (one, 1), (both, 2), (both, 3)]
    assert seen == [*expected, ("one", 0), ("one", 1), ("two", 2), ("two", 3)]


def test_blanks_around_a_plain_prompt_are_removed_as_in_a_data_set(monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "print_response", lambda policy, prompt, seed: seen.append(prompt))
    sample.take_turn(policy_of(Letters), " \n\nAsk: \n", SampleConfig(plain=True), 0)
    assert seen[0].given == "\n\nAsk:"


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--n", "0"],
        ["--temperature", "0"],
        ["--sample-rows", "0"],
        ["--prompts", "a.txt"],
        ["--out", "a.jsonl"],
        ["--system", "Be kind.", "--plain"],
    ],
)
def test_sample_config_rejects_impossible_values(flags):
    with pytest.raises(SystemExit) as stop:
        parse_cli(SampleConfig, flags)
    assert stop.value.code == 2


# ---- what is printed ----


def test_gold_is_left_out_if_the_judge_does_not_know_the_question(trained, capsys):
    """The bundled judge takes any advice on other topics for a mistake."""
    data, out, _ = trained
    flags = ["--checkpoint", out / "sft.pt", "--data", data, "--max-new-tokens", 5]
    for question, shown in ((ASK, True), ("What is the capital of Chad?", False)):
        run(*flags, "--prompt", question)
        printed = capsys.readouterr().out
        assert "score" in printed and ("gold" in printed) == shown


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    @staticmethod
    def decode(ids):
        return bytes(ids).decode(errors="replace")


def test_characters_are_shown_when_all_of_their_bytes_are_sampled(capsys):
    """Blanks wait until something follows them: a response has none at its ends. ESC is spelled."""
    network = SimpleNamespace(hidden=lambda tokens, *state: tokens + 1)
    gpt = Streamed(Frozen(network, None, Bytes), [])
    text = " é 漢\x1b"
    shown = []
    for byte in text.encode():
        token = torch.tensor([[byte]])
        assert gpt.hidden(token, "cache", "position", None) == byte + 1
        shown.append(capsys.readouterr().out)
    assert shown == ["", "", "é", "", "", "", " 漢", "\\x1b"]
    gpt.hidden(torch.tensor([[1, 2]]), "cache")  # the prompt
    gpt.hidden(torch.tensor([[1]]))  # scoring
    gpt.show("é 漢\x1b!")
    assert capsys.readouterr().out == "!"


def test_streamed_response_is_what_is_sampled_without(trained, capsys, monkeypatch):
    """It comes in pieces, which together are the text of evaluate.respond."""
    data, out, _ = trained
    pieces = []
    show = Streamed.show
    monkeypatch.setattr(Streamed, "show", lambda gpt, text: pieces.append(text) or show(gpt, text))
    cfg = parse_cli(SampleConfig, ["--checkpoint", str(out / "sft.pt"), "--data", str(data)])
    [policy] = sample.load_policies(cfg)
    prompt = policy.encode(ASK, cfg)
    frozen = policy.frozen
    [expected] = evaluate.respond(frozen.reference, [prompt], frozen, policy.judge, 3)
    assert sample.print_response(policy, prompt, 3) == expected.text == pieces[-1]
    assert f"{out / 'sft.pt'}: {expected.text}   (" in capsys.readouterr().out
    assert expected.length > 10 and len(set(pieces)) > 5


# ---- a file of prompts ----

PROMPTS = ["A friend asked me about my speech.", "Any ideas for a wet tent?", "Hi?", ASK, "And?"]


@pytest.fixture
def job(trained, tmp_path):
    """(the file of responses, the flags that write it) of two checkpoints and five prompts."""
    data, out, _ = trained
    data = shutil.copytree(data, tmp_path / "data")
    for name in ("sft", "reward", "ppo"):
        shutil.copy(out / f"{name}.pt", tmp_path)
    (tmp_path / "questions.txt").write_text("\n".join(PROMPTS))
    path = tmp_path / "new" / "out.jsonl"
    flags = ["--checkpoint", tmp_path / "sft.pt", tmp_path / "ppo.pt", "--data", data]
    flags += ["--prompts", tmp_path / "questions.txt", "--max-new-tokens", 6]
    return path, [*flags, "--n", 2, "--sample-rows", 3, "--out", path]


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_file_has_a_line_for_each_prompt_response_and_checkpoint(job, tmp_path):
    path, flags = job
    run(*flags)
    lines = records(path)
    assert len({line.pop("run") for line in lines}) == 1
    assert [line["prompt"] for line in lines] == [text for text in PROMPTS for _ in range(4)]
    names = [str(tmp_path / "sft.pt"), str(tmp_path / "ppo.pt")]
    assert [line["checkpoint"] for line in lines] == names * 10
    known = [text != "Hi?" and text != "And?" for text in PROMPTS for _ in range(4)]
    assert ["gold" in line for line in lines] == known  # the judge knows three of the topics
    assert all(isinstance(line["score"], float) for line in lines)
    assert len({line["response"] for line in lines}) > 10


@pytest.mark.slow
def test_responses_do_not_depend_on_the_batch(job):
    """Nor on the prompts that come later."""
    path, flags = job
    run(*flags)
    first = records(path)
    for rows, count in ((1, 5), (100, 5), (2, 3)):
        Path(flags[flags.index("--prompts") + 1]).write_text("\n".join(PROMPTS[:count]))
        run(*flags, "--sample-rows", rows, "--overwrite")
        texts = [line["response"] for line in records(path)]
        assert texts == [line["response"] for line in first][: 4 * count]


def test_line_has_what_is_known_in_this_order():
    policy = policy_of(Letters)
    policy.frozen.weights = ()
    response = evaluate.Response("c", "\u6f22\n", 0.123456, None, 0.0, 1, ended=False)
    begin = '{"run": "0f", "prompt": [{"role": "user", "content": "c"}], "response": "\u6f22\\n", '
    about = '"checkpoint": "p.pt", "ended": false'
    line = responses.make_line("0f", [QUESTION], policy, response)
    assert line == begin + about + "}\n"
    policy.frozen.weights = (1.0,)
    response = replace(response, gold=2.0)
    line = responses.make_line("0f", [QUESTION], policy, response)
    assert line == begin + about + ', "score": 0.1235, "gold": 2.0}\n'


def test_each_line_has_the_score_of_its_own_response(job, tmp_path):
    """A reward function gets what the policy reads."""
    path, flags = job
    rule = "def score(prompts, responses):\n    return [1000 * len(p) + len(r) for p, r in "
    (tmp_path / "rule.py").write_text(f"{rule}zip(prompts, responses)]\n")
    run(*flags, "--reward", tmp_path / "rule.py")
    for line in records(path):
        read = f"\n\nHuman: {line['prompt']}\n\nAssistant:"
        assert line["score"] == 1000 * len(read) + len(line["response"])


def stopping(after):
    """responses.respond, which is interrupted at this call."""
    calls = []

    def respond(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args)

    real = responses.respond
    return respond


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 1, 3])
@pytest.mark.parametrize("torn", [0, 1, 40, 10_000])
def test_killed_run_goes_on_to_the_same_bytes(job, batches, torn, monkeypatch, capsys):
    """It is killed while it samples or, then `torn` bytes of its last lines are missing, while it
    writes. What is there is not sampled again."""
    path, flags = job
    run(*flags)
    whole = path.read_bytes()
    path.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(responses, "respond", stopping(2 * batches))
        run(*flags)
    written = path.read_bytes()
    assert written.count(b"\n") == 6 * batches and whole.startswith(written)
    path.write_bytes(written[: max(0, len(written) - torn)])
    left = path.read_bytes().count(b"\n")
    starts = []
    real = responses.respond
    monkeypatch.setattr(responses, "respond", lambda *args: starts.append(args[2]) or real(*args))
    capsys.readouterr()
    run(*flags)
    assert path.read_bytes() == whole
    first = left // 6 * 3
    assert starts == [start for start in range(first, 10, 3) for _ in range(2)]
    printed = capsys.readouterr().out
    assert f"{path}: {left} of 20 responses are there" in printed
    assert "    20 of 20, 0 s left" in printed
    starts.clear()
    run(*flags)  # all are there
    assert starts == [] and path.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", ["checkpoint", "seed", "prompts", "rewards", "judge", "n", "order"]
)
def test_file_of_another_run_is_refused_and_stays(job, tmp_path, changed, capsys):
    path, flags = job
    run(*flags)
    before = path.read_bytes()
    more = {"seed": ["--seed", 1], "n": ["--n", 3]}.get(changed, [])
    if changed == "checkpoint":
        shutil.copy(tmp_path / "sft.pt", tmp_path / "ppo.pt")
    if changed == "rewards":
        (tmp_path / "reward.pt").unlink()
    if changed == "judge":
        judge = tmp_path / "data" / "judge.py"
        judge.write_text(judge.read_text().replace("MAX_SCORE = 3.0", "MAX_SCORE = -2.0"))
    if changed == "prompts":
        (tmp_path / "questions.txt").write_text("\n".join(PROMPTS).replace("Hi?", "Ho?"))
    if changed == "order":
        flags[1:3] = flags[2:0:-1]
    with pytest.raises(InputError, match="holds something else than responses of this run"):
        run(*flags, *more)
    assert path.read_bytes() == before
    run(*flags, *more, "--overwrite")
    assert path.read_bytes() != before and len(records(path)) in (20, 30)


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"run": "x"}\nmine\n', b"\n"])
def test_file_of_somebody_else_stays_even_with_overwrite(job, content):
    path, flags = job
    path.parent.mkdir()
    path.write_bytes(content)
    for more in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="holds something else"):
            run(*flags, *more)
    assert path.read_bytes() == content


def test_empty_file_is_begun(job):
    path, flags = job
    path.parent.mkdir()
    path.write_bytes(b"")
    run(*flags)
    assert len(records(path)) == 20


MESSAGES = [{"role": "user", "content": "Why?"}]
BE_KIND = [{"role": "system", "content": "Be kind."}, *MESSAGES]
FORMATS = {
    "a.txt": ("Why?\n\nWho?\n", ["Why?", "Who?"]),
    "prompts.csv": ('Prompt\n"\n\nHuman: Why?\n\nAssistant:"\nWho?\n', [MESSAGES, "Who?"]),
    "b.jsonl": (
        json.dumps({"messages": [*BE_KIND, {"role": "assistant", "content": "So."}]})
        + "\n"
        + json.dumps({"messages": [*MESSAGES, {"role": "assistant", "content": "So."}]}),
        [BE_KIND, MESSAGES],
    ),
    "pairs.json": (
        json.dumps([{"prompt": "Why?", "chosen": "a", "rejected": text} for text in "bc"]),
        ["Why?"],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_may_have_the_formats_of_prepare(job, tmp_path, name, capsys):
    """Each prompt once. What the file was taken for is printed."""
    path, flags = job
    content, expected = FORMATS[name]
    (tmp_path / name).write_text(content)
    run(*flags, "--prompts", tmp_path / name, "--n", 1)
    assert [line["prompt"] for line in records(path)[::2]] == expected
    assert f"{tmp_path / name}: " in capsys.readouterr().out


@pytest.mark.slow
def test_prompts_of_a_file_are_read_as_at_the_terminal(job, tmp_path, monkeypatch):
    """A text is a message of the user, unless --plain; --system goes before it."""
    path, flags = job
    seen = []
    real = responses.respond

    def respond(policy, prompts, *args):
        seen.append([prompt.text for prompt in prompts])
        return real(policy, prompts, *args)

    monkeypatch.setattr(responses, "respond", respond)
    for more in ([], ["--plain"], ["--system", "Be kind."]):
        run(*flags, "--n", 1, "--overwrite", *more)
    asked = [f"\n\nHuman: {text}\n\nAssistant:" for text in PROMPTS[:3]]
    assert seen[0] == asked
    assert seen[4] == PROMPTS[:3]
    assert seen[8] == [f"Be kind.{text}" for text in asked]


def test_too_long_prompt_is_named_by_its_row_and_nothing_is_written(job, tmp_path):
    path, flags = job
    (tmp_path / "questions.txt").write_text("Hi?\n" + "x " * 99 + "\nHo?\n")
    message = r"questions.txt, row 2: the prompt takes \d+ tokens and there is room for 74"
    with pytest.raises(InputError, match=message):
        run(*flags)
    assert not path.exists()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_empty_file_of_prompts_is_refused(job, tmp_path, name):
    path, flags = job
    (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=f"{name}"):
        run(*flags, "--prompts", tmp_path / name)
    assert not path.exists()


def test_one_program_at_a_time_writes_a_file(job, tmp_path):
    path, flags = job
    with responses.lock(Path(f"{path}.lock")):
        with pytest.raises(InputError, match="another program writes here"):
            run(*flags)


def test_prompt_and_prompts_do_not_go_together(job):
    path, flags = job
    with pytest.raises(InputError, match="not both"):
        run(*flags, "--prompt", "Hi")


def test_time_left_is_that_of_this_call(monkeypatch, capsys):
    """20 of 100 were there; 10 more have taken 30 seconds, so the other 70 take 210."""
    times = iter([1000.0, 1030.0, 1031.0, 1036.0])
    monkeypatch.setattr(responses.time, "perf_counter", lambda: next(times))
    progress = responses.Progress(20, 100)
    for _ in range(3):
        progress.show(10)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "    30 of 100, 3.5 min left"
    assert second == "    50 of 100, 1.0 min left"  # 30 more in 36 seconds
