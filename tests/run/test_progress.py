"""The lines printed while a program runs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from rlhf.evaluate import Response
from rlhf.run.progress import (
    Progress,
    format_seconds,
    print_responses,
    print_table,
    sample_rows,
    ticker,
    token_rows,
)

# ---- Progress ----


def log(progress, step, metrics, show):
    """A row, shown. step: how many are done."""
    row = progress.row(step, metrics)
    progress.show(row, show)
    return row


def test_row_has_the_metrics_and_the_clocks_columns(clock):
    """200 tokens in 10 seconds, after 100 seconds before a resume."""
    progress = Progress(start=0, steps=4, seconds_before=100.0)
    progress.tokens += 200
    clock.now += 10
    row = progress.row(1, {"loss": 0.5, "valid": None})
    clock_columns = {"tokens_per_s": 20, "seconds": 110.0}
    assert row == {"step": 1, "loss": 0.5, "valid": None, **clock_columns}
    assert list(row) == ["step", "loss", "valid", "tokens_per_s", "seconds"]


def test_show_prints_only_the_columns_that_it_is_given(clock, capsys):
    progress = Progress(start=0, steps=4)
    clock.now += 10
    metrics = {"loss": 0.125, "valid": None, "lr": 0.0005, "grad_norm": 2.0}
    log(progress, 1, metrics, ("loss", "lr", "valid"))
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["step", "loss", "lr", "valid", "tokens/s", "left"]
    assert line.split() == ["1/4", "0.125", "5.0e-04", "0", "30", "s"]  # valid was not measured


def test_lines_are_aligned_with_the_header(clock, capsys):
    progress = Progress(start=0, steps=999)
    for step in (1, 999):
        clock.now += 5
        metrics = {"loss": 0.5, "clip_fraction": 0.25}
        log(progress, step, metrics, ("loss", "clip_fraction"))
    header, *lines = capsys.readouterr().out.splitlines()
    for line in lines:
        assert len(line) == len(header)
        for name, cell in (("loss", "0.500"), ("clip_fraction", "0.250")):
            assert line[: header.index(name) + len(name)].endswith(cell)


def test_header_is_repeated_every_25_lines(clock, capsys):
    progress = Progress(start=0, steps=60)
    for step in range(1, 52):
        clock.now += 1
        log(progress, step, {"loss": 0.5}, ("loss",))
    lines = capsys.readouterr().out.splitlines()
    assert [at for at, line in enumerate(lines) if "step" in line] == [0, 26, 52]


def test_progress_says_tokens_per_second_and_the_time_left(clock, capsys):
    """200 tokens in 10 seconds are 20 a second, and 3 more steps take 30 seconds. After 150 seconds
    and 2 steps, 2 more take 150 seconds."""
    progress = Progress(start=0, steps=4)
    progress.tokens += 200
    clock.now += 10
    log(progress, 1, {}, ())
    clock.now += 140
    log(progress, 2, {}, ())
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["1/4", "20", "30", "s"],
        ["2/4", "1", "2.5", "min"],
    ]


def test_progress_after_resume_estimates_the_time_left_from_its_own_steps(clock, capsys):
    """Steps 11 and 12 took 20 seconds. 8 more take 80."""
    progress = Progress(start=10, steps=20)
    clock.now += 20
    log(progress, 12, {}, ())
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["1.3", "min"]


# ---- ticker, format_seconds, print_table ----


def test_ticker_prints_a_line_after_every_ten_seconds(clock, capsys):
    """Five items of 6 seconds each. At 12 seconds two are done, and three more take 18. At 24
    seconds four are done."""
    seen = []
    for item in ticker("abcde", "letters", seconds=10):
        seen.append(item)
        clock.now += 6
    assert seen == list("abcde")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["    letters: 2 of 5, 18 s left", "    letters: 4 of 5, 6 s left"]


def test_ticker_prints_nothing_if_the_loop_is_short(clock, capsys):
    for _ in ticker(range(5), "numbers", seconds=10):
        clock.now += 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1.0 min"), (90, "1.5 min")]
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_print_table_is_aligned_and_leaves_missing_numbers_empty(capsys):
    print_table(
        [
            {"policy": "sft", "score": 0.25, "prompts": 500},
            {"policy": "optimum", "score": None, "prompts": 3},
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        " policy  score  prompts",
        "    sft  0.250      500",
        "optimum               3",
    ]


# ---- responses ----


BEFORE = Response("\n\nHuman: Hi.\n\nAssistant:", "Go away.", -0.123456, -1.0, 0.0, 3, True)
AFTER = dataclasses.replace(BEFORE, text="Hello.", score=1.5, gold=2.0)


def test_sample_rows_put_both_responses_side_by_side():
    assert sample_rows([BEFORE], [AFTER]) == [
        {
            "Prompt": BEFORE.prompt,
            "last_turn": "Hi.",
            "Before": "Go away.",
            "After": "Hello.",
            "score_before": BEFORE.score,
            "score_after": 1.5,
            "gold_before": -1.0,
            "gold_after": 2.0,
        }
    ]


def test_print_responses_shows_control_characters_and_does_not_send_them(capsys):
    """ESC ]0;x BEL would set the title of the terminal."""
    prompt = "\n\nHuman: \x1b[2JHi.\n\nAssistant:"
    response = dataclasses.replace(BEFORE, prompt=prompt, text="a\x1b]0;x\x07\n\tb")
    print_responses(now=[response])
    assert capsys.readouterr().out == (
        "    Human: \\x1b[2JHi.\n        now -> a\\x1b]0;x\\x07\n\tb   (score -0.12, gold -1.0)\n"
    )


def test_print_responses_shows_each_prompt_with_what_the_policies_say(capsys):
    print_responses(before=[BEFORE, BEFORE], after=[AFTER, dataclasses.replace(AFTER, gold=None)])
    assert capsys.readouterr().out.splitlines() == [
        "    Human: Hi.",
        "        before -> Go away.   (score -0.12, gold -1.0)",
        "        after -> Hello.   (score +1.50, gold +2.0)",
        "    Human: Hi.",
        "        before -> Go away.   (score -0.12, gold -1.0)",
        "        after -> Hello.   (score +1.50)",
    ]


def test_print_responses_shows_the_last_turn_of_a_dialogue(capsys):
    prompt = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: What is\n\nit?\n\nAssistant:"
    print_responses(now=[dataclasses.replace(BEFORE, prompt=prompt)])
    assert capsys.readouterr().out.splitlines()[0] == "    Human: What is it?"


# ---- ppo_tokens.csv ----


def test_token_rows_have_the_numbers_of_each_slot():
    """The action of slot t is token t + 1. Two rows of a step; the first is asked for. Each number
    is 10 times its column plus its slot."""
    names = ["logprob", "ref_logprob", "reward", "value", "advantage", "return", "new_logprob"]
    slots = torch.arange(3.0)
    column = {name: torch.stack([10 * i + slots, slots - 99]) for i, name in enumerate(names)}
    column["new_value"] = torch.stack([70 + slots, slots - 99])
    experience = SimpleNamespace(
        old_logprobs=column["logprob"],
        old_values=column["value"],
        advantages=column["advantage"],
        returns=column["return"],
    )
    after = SimpleNamespace(
        tokens=torch.tensor([[4, 5, 6, 7]]),
        mask=torch.tensor([[False, True, True]]),
        logprobs=column["new_logprob"][:1],
        ref_logprobs=column["ref_logprob"][:1],
        values=column["new_value"][:1],
    )
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids}>")
    rows = token_rows([AFTER], column["reward"], experience, after, tokenizer)
    about = {"response": 0, "prompt": "Hi.", "score": AFTER.score, "gold": AFTER.gold}
    about |= {"length": AFTER.length, "ended": int(AFTER.ended)}
    for slot, token, row in zip((1, 2), ("<[6]>", "<[7]>"), rows, strict=True):
        numbers = {name: 10.0 * i + slot for i, name in enumerate([*names, "new_value"])}
        assert row == {**about, "token": token, **numbers}
        assert list(row)[6:] == ["token", *names, "new_value"]
