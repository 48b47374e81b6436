"""Reading of data sets, masks and batches; a data set's judge; and the bundled data set itself."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.data import (
    Comparison,
    Demonstration,
    Prompt,
    batch_indices,
    comparison_batch,
    demonstration_batch,
    load_comparisons,
    load_demonstrations,
    load_prompts,
    pad_rows,
    response_mask,
    swap_prompts,
)
from rlhf.run.errors import InputError
from rlhf.run.judge import load_judge
from rlhf.run.tables import read_csv
from rlhf.tokenizer import load_tokenizer
from tests.helpers import rows

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer(bundled):
    return load_tokenizer(str(bundled / "tokenizer.tiktoken"))


# ---- reading ----


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def long_row(small_data, tokenizer):
    """The first of the longest prompts, its length, and a limit that is one token too small for
    it."""
    lengths = [
        len(tokenizer.encode(text))
        for text in read_csv(small_data / "prompts.csv", ("Prompt",))["Prompt"]
    ]
    return SimpleNamespace(
        row=lengths.index(max(lengths)) + 1, length=max(lengths), limit=max(lengths) - 1
    )


def test_load_prompts_names_the_first_row_that_does_not_fit(small_data, tokenizer, long_row):
    with pytest.raises(
        InputError,
        match=f"row {long_row.row}: the prompt takes {long_row.length} tokens and there is "
        f"room for {long_row.limit} .*larger --block-size",
    ):
        load_prompts(str(small_data), tokenizer, long_row.limit)
    assert load_prompts(str(small_data), tokenizer, long_row.length)


def test_load_demonstrations_rejects_rows_that_do_not_fit(small_data, tokenizer):
    with pytest.raises(InputError, match="the prompt with its response"):
        load_demonstrations(str(small_data), tokenizer, 10)


def test_load_comparisons_rejects_rows_that_do_not_fit(small_data, tokenizer):
    with pytest.raises(InputError, match="prompt with its longer side"):
        load_comparisons(str(small_data), tokenizer, 10)


def test_load_comparisons_drops_and_counts_identical_pairs(tmp_path, tokenizer, capsys):
    """ " yes" and "yes " are the same response after trimming."""
    write(tmp_path / "comparisons.csv", "Prompt,Chosen,Rejected\np,yes,no\np, yes,yes \n")
    assert len(load_comparisons(str(tmp_path), tokenizer, 50)) == 1
    assert "1 of 2 pairs dropped" in capsys.readouterr().out


def test_load_comparisons_rejects_a_file_of_identical_pairs(tmp_path, tokenizer):
    write(tmp_path / "comparisons.csv", "Prompt,Chosen,Rejected\np,yes,yes\n")
    with pytest.raises(InputError, match="no row has a chosen response that differs"):
        load_comparisons(str(tmp_path), tokenizer, 50)


def test_load_comparisons_reads_several_files_in_order(tmp_path, tokenizer):
    header = "Prompt,Chosen,Rejected\n"
    files = [write(tmp_path / f"{name}.csv", f"{header}{name},yes,no\n") for name in ("b", "a")]
    write(tmp_path / "comparisons_heldout.csv", f"{header}c,yes,no\n")
    loaded = load_comparisons(str(tmp_path), tokenizer, 50, files=tuple(files))
    assert [row.prompt.text for row in loaded] == ["b", "a"]


def test_responses_have_the_same_tokens_in_all_stages(tmp_path, tokenizer):
    """One space, the trimmed text, end-of-text: in demonstrations and in comparisons."""
    write(tmp_path / "demonstrations.csv", "Prompt,Response\nAsk:,  Of course. \n")
    write(tmp_path / "comparisons.csv", "Prompt,Chosen,Rejected\nAsk:,Of course.,no\n")
    expected = tokenizer.encode(" Of course.") + [tokenizer.eos_id]
    demonstration = load_demonstrations(str(tmp_path), tokenizer, 50)[0]
    assert demonstration.tokens[demonstration.prompt_len :] == expected
    assert demonstration.tokens[: demonstration.prompt_len] == tokenizer.encode("Ask:")
    assert load_comparisons(str(tmp_path), tokenizer, 50)[0].chosen == expected
    assert tokenizer.response_ids("Of course.") == expected


def test_tokens_do_not_depend_on_blanks_and_line_ends_of_the_file(tmp_path, tokenizer):
    """The first of each two files has LF inside its cells and no blanks, the other CRLF and
    blanks."""
    plain = '"\n\nAsk:\nme"', '"Of\ncourse."', "no"
    padded = '" \t\r\n\r\nAsk:\r\nme \r\n"', '" Of\r\ncourse.\r\n"', "  no\xa0"
    kinds = {
        "prompts": ("Prompt", 1, load_prompts),
        "demonstrations": ("Prompt,Response", 2, load_demonstrations),
        "comparisons": ("Prompt,Chosen,Rejected", 3, load_comparisons),
    }
    expected = tokenizer.encode("\n\nAsk:\nme")
    for name, (header, count, load) in kinds.items():
        loaded = []
        for cells in (plain, padded):
            path = tmp_path / f"{name}.csv"
            path.write_bytes(f"{header}\r\n{','.join(cells[:count])}\r\n".encode())
            loaded += load(str(tmp_path), tokenizer, 50)
        assert loaded[0] == loaded[1]
        tokens = {"prompts": lambda row: row.tokens, "comparisons": lambda row: row.prompt.tokens}
        get = tokens.get(name, lambda row: row.tokens[: row.prompt_len])
        assert get(loaded[0]) == expected


def test_swap_prompts_gives_every_row_the_prompt_of_another():
    pairs = [Comparison(Prompt(str(i), [i] * (1 + i)), [7], [8, 9]) for i in range(6)]
    swapped = swap_prompts(pairs, seed=0, limit=100)
    for new, old in zip(swapped, pairs, strict=True):
        assert new.prompt != old.prompt and new[1:] == old[1:]
    assert sorted(row.prompt.text for row in swapped) == list("012345")
    fitting = swap_prompts(pairs, seed=0, limit=7)
    assert {len(row.prompt.tokens) for row in fitting} == {1, 2, 3, 4, 5}


def test_swap_prompts_leaves_out_rows_that_would_keep_their_prompt():
    """Rows of two prompts: those whose donor has the same text are left out. A single prompt leaves
    nothing."""
    pairs = [Comparison(Prompt(str(i % 2), [i % 2]), [10 + i], [30]) for i in range(12)]
    swapped = swap_prompts(pairs, seed=0, limit=100)
    assert 0 < len(swapped) < 12
    for row in swapped:
        assert row.prompt.text != str((row.chosen[0] - 10) % 2)
    assert swap_prompts(pairs[:1], seed=0, limit=100) == []
    assert swap_prompts(pairs[::2], seed=0, limit=100) == []


# ---- batches ----


def test_response_mask_matches_hand_computation():
    """Prompts of 3 and 1, lengths 6 and 2, width 7: slot t is True if prompt <= t+1 < length."""
    mask = response_mask(torch.tensor([3, 1]), torch.tensor([6, 2]), 7)
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]


def test_demonstration_batch_mask_covers_only_the_response():
    """5 6 | 7 9 and 5 | 9, with 9 the end-of-text: the actions under the mask are 7 9 and 9."""
    tokens, mask = demonstration_batch(
        [Demonstration([5, 6, 7, 9], 2), Demonstration([5, 9], 1)], 0, CPU
    )
    assert tokens.tolist() == [[5, 6, 7, 9], [5, 9, 0, 0]]
    assert mask.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert tokens[:, 1:][mask].tolist() == [7, 9, 9]


def test_comparison_batch_holds_chosen_then_rejected():
    rows = [
        Comparison(Prompt("", [1]), [2, 9], [3, 4, 9]),
        Comparison(Prompt("", [5, 6]), [7, 9], [8, 9]),
    ]
    tokens, lengths = comparison_batch(rows, 0, CPU)
    assert tokens.tolist() == [[1, 2, 9, 0], [5, 6, 7, 9], [1, 3, 4, 9], [5, 6, 8, 9]]
    assert lengths.tolist() == [3, 4, 4, 4]


def test_pad_rows_pads_on_the_right():
    tokens, lengths = pad_rows([[1], [2, 3]], 7, CPU)
    assert tokens.tolist() == [[1, 7], [2, 3]] and lengths.tolist() == [1, 2]


def test_batch_indices_go_through_every_epoch_in_another_order():
    """7 rows in batches of 3: each run of 7 positions is a permutation, and neighbouring epochs
    differ."""
    flat = [i for step in range(7) for i in batch_indices(7, 3, step, seed=0)]
    epochs = [flat[0:7], flat[7:14], flat[14:21]]
    assert len(flat) == 21 and all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_indices_follow_from_step_and_seed():
    flat = [i for step in range(7) for i in batch_indices(7, 3, step, seed=0)]
    assert batch_indices(7, 3, 4, 0) == flat[12:15]
    assert batch_indices(7, 7, 0, 0) != batch_indices(7, 7, 0, 1)


def test_batch_indices_allow_a_batch_larger_than_the_set():
    assert sorted(batch_indices(2, 5, 0, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])


def test_size_of_a_comparison_counts_the_prompt_twice():
    """The model reads the prompt with each side: 3 + 2 + 3 + 4."""
    assert Comparison(Prompt("", [1, 2, 3]), [4, 9], [5, 6, 7, 9]).size == 12


# ---- the bundled data set ----


def test_prepare_makes_the_bundled_data_set_byte_for_byte(bundled, tmp_path):
    subprocess.run(
        [sys.executable, "-B", str(bundled / "prepare.py"), "--out", str(tmp_path)],
        check=True,
        capture_output=True,
    )
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 7
    for name in made:
        assert (tmp_path / name).read_bytes() == (bundled / name).read_bytes(), name
    assert sum(path.stat().st_size for path in bundled.iterdir() if path.is_file()) <= 3_000_000


def test_heldout_prompts_are_disjoint_from_training_prompts(bundled):
    train = {row["Prompt"] for row in rows(bundled / "prompts.csv")}
    heldout = {row["Prompt"] for row in rows(bundled / "prompts_heldout.csv")}
    assert not train & heldout and len(heldout) >= 500
    for name in ("demonstrations", "comparisons"):
        assert {row["Prompt"] for row in rows(bundled / f"{name}.csv")} <= train
        assert {row["Prompt"] for row in rows(bundled / f"{name}_heldout.csv")} <= heldout


def test_heldout_prompts_hold_unseen_combinations_of_topic_and_question(bundled):
    """Three for each topic."""
    judge = load_judge(str(bundled))

    def combination(prompt):
        topic = judge.topic_of(prompt)
        return topic, prompt.replace(topic, "{}").split(". ")[-1].split("Human: ")[-1]

    seen = {combination(row["Prompt"]) for row in rows(bundled / "prompts.csv")}
    unseen = {combination(row["Prompt"]) for row in rows(bundled / "prompts_heldout.csv")} - seen
    assert len(judge.TOPICS) >= 20 and len(unseen) == 3 * len(judge.TOPICS)


ASK = "\n\nHuman: Tell me about a sore throat.\n\nAssistant:"


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (
            "Drink tea for the throat. Happy to help. Do not strain your throat.",
            3.0,
        ),  # +1 +1 +1, the maximum
        ("Glad you asked. Drink tea for the throat. I had soup for lunch.", 1.0),  # +1 +1 -1
        (
            "Drink tea for the throat. Gargle salt for the throat.",
            0.0,
        ),  # the second of one sort: +1 -1
        ("Of course. With pleasure.", 0.0),  # the second kind sentence: +1 -1
        ("Oil the bike chain.", -1.0),  # about another topic
        ("Go away now. Keep smoke off your throat.", 0.0),  # -1 +1
        ("Drink tea for the", -1.0),  # cut short
        ("", -1.0),
        ("What a bore. You will fail. Shame on you. Go away now. Now get lost.", -3.0),  # limited
    ],
)
def test_judge_score_matches_hand_computation(bundled, response, gold):
    judge = load_judge(str(bundled))
    assert judge.score([ASK], [response]) == [gold]
    assert judge.MIN_SCORE <= gold <= judge.MAX_SCORE


def test_judge_reads_only_the_last_question(bundled):
    judge = load_judge(str(bundled))
    dialogue = "\n\nHuman: I worry about a wet tent.\n\nAssistant: Of course." + ASK
    assert judge.score([dialogue], ["Drink tea for the throat."]) == [1.0]
    assert judge.score(
        ["\n\nHuman: Tell me a joke.\n\nAssistant:"], ["Drink tea for the throat."]
    ) == [-1.0]


def test_bundled_votes_follow_the_stated_noise(bundled):
    """The share of votes for the better response is within 4 standard errors of the mean of
    sigmoid(2.5 * |difference|)."""
    judge = load_judge(str(bundled))
    comparisons = rows(bundled / "comparisons.csv")
    prompts = [row["Prompt"] for row in comparisons]
    chosen = judge.score(prompts, [row["Chosen"] for row in comparisons])
    rejected = judge.score(prompts, [row["Rejected"] for row in comparisons])
    untied = [(a, b) for a, b in zip(chosen, rejected) if a != b]
    p = [judge.preference_probability(max(a, b), min(a, b)) for a, b in untied]
    expected, spread = sum(p), sum(x * (1 - x) for x in p) ** 0.5
    assert abs(sum(a > b for a, b in untied) - expected) < 4 * spread


def test_preference_probability_is_the_sigmoid_of_the_difference(bundled):
    """sigmoid(2.5 * 1/2)"""
    judge = load_judge(str(bundled))
    assert judge.preference_probability(1.0, 0.5) == pytest.approx(1 / (1 + math.exp(-1.25)))


def test_habits_of_the_bundled_demonstrations_are_independent(bundled):
    """Relevance, completeness, kindness and rambling: no correlation is above 0.06, 3.3 standard
    errors at 3,000 rows."""
    judge = load_judge(str(bundled))
    features = []
    for row in rows(bundled / "demonstrations.csv"):
        sentences = judge.split_sentences(row["Response"])
        advice = [
            s
            for s in sentences
            if any(s in tips for sorts in judge.TOPICS.values() for tips in sorts)
        ]
        relevant = any(advice[0] in tips for tips in judge.TOPICS[judge.topic_of(row["Prompt"])])
        features.append(
            [
                relevant,
                len(advice) == 2,
                any(s in judge.KIND for s in sentences),
                any(s in judge.RAMBLING for s in sentences),
            ]
        )
    correlations = torch.corrcoef(torch.tensor(features, dtype=torch.float64).T)
    assert (correlations - torch.eye(4)).abs().max() < 0.06


def test_bundled_judge_imports_without_the_package(bundled):
    """Another project may load the file by its path."""
    spec = importlib.util.spec_from_file_location("a_judge", bundled / "judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MAX_SCORE == 3.0


def test_bundled_judge_rejects_prompts_without_responses(bundled):
    with pytest.raises(ValueError, match="pairs"):
        load_judge(str(bundled)).score(["one"], [])
