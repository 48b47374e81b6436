"""Tokenizer, CSV reading, masks and batches; and the bundled data set itself."""

import base64
import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf.common import InputError, read_csv
from rlhf.data import (
    Comparison, Demonstration, Prompt, batch_indices, chunks, comparison_batch, demonstration_batch,
    encode_response, find_tokenizer, load_comparisons, load_demonstrations, load_prompts, pad_rows, response_mask,
)
from rlhf.judge import load_judge, vote_probabilities
from rlhf.tokenizer import Tokenizer, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def tokenizer(bundled):
    return load_tokenizer(str(bundled / "tokenizer.tiktoken"))


# ---- tokenizer ----


def test_pad_is_not_end_of_text(tokenizer):
    with pytest.raises(ValueError, match="never learns to stop"):
        Tokenizer("x", tokenizer.encoding, eos_id=3, pad_id=3)


def test_round_trip_of_any_text(tokenizer):
    for text in ("\n\nHuman: Tell me about a wet tent.\n\nAssistant:", "naïve 漢字 \x00 <|endoftext|>", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids) and all(i < tokenizer.vocab_size for i in ids)


def test_special_ids(tokenizer):
    """Two ids behind the ranks, different from each other."""
    assert tokenizer.vocab_size <= 1024
    assert (tokenizer.eos_id, tokenizer.pad_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.pad_id]) == "<|endoftext|><|pad|>"


def test_merges_by_hand(tmp_path):
    """Ranks "ab" 256, "abc" 257, "bc" 258. In "abcbc" the lowest rank joins first: ab c bc -> abc bc."""
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b"bc"]
    path = tmp_path / "x.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    assert load_tokenizer(str(path)).encode("abcbc") == [257, 258]


def test_a_changed_ranks_file_is_read_again(tmp_path, bundled):
    """tiktoken's own reader would return its cached copy of the first file; the fingerprint tells the two apart."""
    path = tmp_path / "x.tiktoken"
    path.write_bytes((bundled / "tokenizer.tiktoken").read_bytes())
    first = load_tokenizer(str(path))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:300]))
    second = load_tokenizer(str(path))
    assert second.vocab_size == 302 and first.fingerprint != second.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [("IQ== zero\n", "line 1"), ("no base64! 0\n", "line 1"), ("IQ== 0\n", "256 single"), ("", "256 single")],
)
def test_garbled_ranks(tmp_path, content, message):
    path = tmp_path / "x.tiktoken"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(path))


def test_missing_ranks(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer file"):
        load_tokenizer(str(tmp_path / "x.tiktoken"))


def test_gpt2_tokenizer(root):
    """50,257 tokens, end-of-text 50256; "Hello world" is 15496 995, as in GPT-2's own vocabulary."""
    cache = root.parent / "shared" / "data" / "gpt2_bpe"
    if not cache.is_dir() and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("GPT-2's ranks are not here; set TIKTOKEN_CACHE_DIR to a folder that holds them")
    code = ("from rlhf.tokenizer import load_tokenizer; t = load_tokenizer('gpt2');"
            "print(t.vocab_size, t.eos_id, t.pad_id != t.eos_id, t.encode('Hello world'),"
            "t.eos_id in t.encode('<|endoftext|>'))")
    env = {"TIKTOKEN_CACHE_DIR": str(cache), **os.environ}
    got = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert got.stdout.split(maxsplit=3)[:3] == ["50257", "50256", "True"], got.stderr
    assert got.stdout.split("True ")[1] == "[15496, 995] False\n"


# ---- reading ----


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Question\nhello\n", "has no column 'Prompt'; it needs Prompt and has Question"),
        ("Prompt\n", "has a header but no rows"),
        ("", "is not a CSV file"),
        (b"Prompt\n\xff\xfe\x00bad\n", "is not a CSV file in UTF-8"),
        ('Prompt\n"never closed\n', "is not a CSV file"),
        ("Prompt\na\nb,c\n", "is not a CSV file"),
        ("Prompt\na,b\nc,d\n", "more cells than the 1 columns"),
        ('Prompt\nfine\n"  "\n""\n', r"row 2: Prompt is empty \(2 such rows\)"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_csv(write(tmp_path / "prompts.csv", content), ("Prompt",))


def test_missing_csv(tmp_path):
    with pytest.raises(InputError, match="prompts.csv does not exist"):
        read_csv(tmp_path / "prompts.csv", ("Prompt",))


def test_a_cell_that_looks_like_a_number_or_nan_is_text(tmp_path):
    frame = read_csv(write(tmp_path / "x.csv", "Prompt,Response\n1.50,nan\nNA,None\n"), ("Prompt", "Response"))
    assert frame.values.tolist() == [["1.50", "nan"], ["NA", "None"]]


def test_rows_that_do_not_fit_are_named(small_data, tokenizer):
    prompts = [len(tokenizer.encode(text)) for text in read_csv(small_data / "prompts.csv", ("Prompt",))["Prompt"]]
    limit = max(prompts) - 1  # the longest do not fit
    first = next(i for i, n in enumerate(prompts, start=1) if n > limit)
    with pytest.raises(InputError, match=f"row {first}: the prompt takes {prompts[first - 1]} tokens and there is room "
                                         f"for {limit} .*larger --block-size"):
        load_prompts(str(small_data), tokenizer, limit)
    with pytest.raises(InputError, match="prompt and response together"):
        load_demonstrations(str(small_data), tokenizer, 10)
    with pytest.raises(InputError, match="prompt and longer side"):
        load_comparisons(str(small_data), tokenizer, 10)


def test_identical_pairs_are_dropped_and_counted(tmp_path, tokenizer, capsys):
    """Equal after trimming is equal: " yes" and "yes " are the same response."""
    write(tmp_path / "comparisons.csv", "Prompt,Chosen,Rejected\np,yes,no\np, yes,yes \n")
    assert len(load_comparisons(str(tmp_path), tokenizer, 50)) == 1
    assert "1 of 2 pairs dropped" in capsys.readouterr().out
    write(tmp_path / "comparisons.csv", "Prompt,Chosen,Rejected\np,yes,yes\n")
    with pytest.raises(InputError, match="every row"):
        load_comparisons(str(tmp_path), tokenizer, 50)


def test_one_format_for_all_stages(tmp_path, tokenizer):
    """A response is one space, the trimmed text, end-of-text, in demonstrations and comparisons alike."""
    write(tmp_path / "demonstrations.csv", "Prompt,Response\nAsk:,  Of course. \n")
    write(tmp_path / "comparisons.csv", "Prompt,Chosen,Rejected\nAsk:,Of course.,no\n")
    expected = tokenizer.encode(" Of course.") + [tokenizer.eos_id]
    demonstration = load_demonstrations(str(tmp_path), tokenizer, 50)[0]
    assert demonstration.tokens[demonstration.prompt_len :] == expected
    assert demonstration.tokens[: demonstration.prompt_len] == tokenizer.encode("Ask:")
    assert load_comparisons(str(tmp_path), tokenizer, 50)[0].chosen == expected
    assert encode_response(tokenizer, "Of course.") == expected


def test_tokenizer_of_a_folder(small_data, monkeypatch):
    assert find_tokenizer(str(small_data)).vocab_size <= 1024
    (small_data / "tokenizer.tiktoken").unlink()
    monkeypatch.setattr("rlhf.data.load_tokenizer", lambda name: name)
    assert find_tokenizer(str(small_data)) == "gpt2"


# ---- batches ----


def test_response_mask_by_hand():
    """Prompts of 3 and 1, lengths 6 and 2, width 7: slot t is True where prompt <= t+1 < length."""
    mask = response_mask(torch.tensor([3, 1]), torch.tensor([6, 2]), 7)
    assert mask.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]


def test_demonstration_batch_covers_the_response_alone():
    """5 6 | 7 9 with 9 the end-of-text, and 5 | 9: the mask counts 7 9 and 9."""
    tokens, mask = demonstration_batch([Demonstration([5, 6, 7, 9], 2), Demonstration([5, 9], 1)], 0, CPU)
    assert tokens.tolist() == [[5, 6, 7, 9], [5, 9, 0, 0]]
    assert mask.int().tolist() == [[0, 1, 1], [1, 0, 0]]
    assert tokens[:, 1:][mask].tolist() == [7, 9, 9]


def test_comparison_batch_is_chosen_then_rejected():
    rows = [Comparison(Prompt("", [1]), [2, 9], [3, 4, 9]), Comparison(Prompt("", [5, 6]), [7, 9], [8, 9])]
    tokens, lengths = comparison_batch(rows, 0, CPU)
    assert tokens.tolist() == [[1, 2, 9, 0], [5, 6, 7, 9], [1, 3, 4, 9], [5, 6, 8, 9]]
    assert lengths.tolist() == [3, 4, 4, 4]


def test_pad_rows():
    tokens, lengths = pad_rows([[1], [2, 3]], 7, CPU)
    assert tokens.tolist() == [[1, 7], [2, 3]] and lengths.tolist() == [1, 2]


def test_batches_walk_through_every_epoch():
    """7 rows in batches of 3: each run of 7 positions is a permutation, two epochs differ, so do two seeds, and any
    batch can be asked for by its number alone."""
    flat = [i for step in range(7) for i in batch_indices(7, 3, step, seed=0)]
    assert len(flat) == 21
    epochs = [flat[0:7], flat[7:14], flat[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(7, 3, 4, 0) == flat[12:15]
    assert [batch_indices(7, 7, 0, seed) for seed in (0, 1)][0] != batch_indices(7, 7, 0, 1)
    assert sorted(batch_indices(2, 5, 0, 0)) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])  # a batch larger than the set


def test_chunks_of_rows_alike_in_length():
    rows = [Demonstration([0] * size, 1) for size in (3, 7, 4, 9, 4)]
    assert [[row.size for row in part] for part in chunks(rows, 2)] == [[3, 4], [4, 7], [9]]
    assert [row.size for row in rows] == [3, 7, 4, 9, 4]  # the batch itself stays as it was
    assert chunks(rows, 0) == [rows]
    pair = Comparison(Prompt("", [1, 2, 3]), [4, 9], [5, 6, 7, 9])
    assert pair.size == 3 + 2 + 3 + 4  # the prompt is read with either side


# ---- the bundled set ----


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_prepare_makes_it_again_byte_for_byte(bundled, tmp_path):
    subprocess.run([sys.executable, "-B", str(bundled / "prepare.py"), "--out", str(tmp_path)], check=True,
                   capture_output=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert len(made) == 7
    for name in made:
        assert (tmp_path / name).read_bytes() == (bundled / name).read_bytes(), name
    assert sum(path.stat().st_size for path in bundled.iterdir() if path.is_file()) <= 3_000_000


def test_heldout_prompts_are_disjoint_and_hold_unseen_combinations(bundled):
    judge = load_judge(str(bundled))
    train = {row["Prompt"] for row in table(bundled / "prompts.csv")}
    heldout = {row["Prompt"] for row in table(bundled / "prompts_heldout.csv")}
    assert not train & heldout and len(heldout) >= 500 and len(judge.TOPICS) >= 20
    for name in ("demonstrations", "comparisons"):
        assert {row["Prompt"] for row in table(bundled / f"{name}.csv")} <= train
        assert {row["Prompt"] for row in table(bundled / f"{name}_heldout.csv")} <= heldout

    def combination(prompt):
        topic = judge.topic_of(prompt)
        return topic, prompt.replace(topic, "{}").split(". ")[-1].split("Human: ")[-1]

    seen = {combination(prompt) for prompt in train}
    unseen = {combination(prompt) for prompt in heldout} - seen
    assert len(unseen) == 3 * len(judge.TOPICS)


ASK = "\n\nHuman: Tell me about a sore throat.\n\nAssistant:"


@pytest.mark.parametrize(
    ("reply", "gold"),
    [
        ("Drink tea for the throat. Happy to help. Do not strain your throat.", 3.0),  # +1 +1 +1, the maximum
        ("Glad you asked. Drink tea for the throat. I had soup for lunch.", 1.0),  # +1 +1 -1
        ("Drink tea for the throat. Gargle salt for the throat.", 0.0),  # the second of one sort: +1 -1
        ("Of course. With pleasure.", 0.0),  # the second kind sentence: +1 -1
        ("Oil the bike chain.", -1.0),  # about another topic
        ("Go away now. Keep smoke off your throat.", 0.0),  # -1 +1
        ("Drink tea for the", -1.0),  # cut short
        ("", -1.0),
        ("What a bore. You will fail. Shame on you. Go away now. Now get lost.", -3.0),  # limited
    ],
)
def test_judge_by_hand(bundled, reply, gold):
    judge = load_judge(str(bundled))
    assert judge.score([ASK], [reply]) == [gold]
    assert judge.MIN_SCORE <= gold <= judge.MAX_SCORE


def test_judge_reads_the_last_question(bundled):
    judge = load_judge(str(bundled))
    dialogue = "\n\nHuman: I worry about a wet tent.\n\nAssistant: Of course." + ASK
    assert judge.score([dialogue], ["Drink tea for the throat."]) == [1.0]
    assert judge.score(["\n\nHuman: Tell me a joke.\n\nAssistant:"], ["Drink tea for the throat."]) == [-1.0]


def test_a_broken_judge_is_named(tmp_path):
    for text, message in (
        ("1/0", "ZeroDivisionError"),
        ("x = 1", "defines no score"),
        ("def score(prompts, responses): return [1.0]", "one finite number for each of 2 responses, got 1"),
        ("def score(prompts, responses): return [float('nan')] * len(prompts)", "one finite number"),
        ("def score(prompts, responses): return prompts[9]", "failed: IndexError"),
    ):
        (tmp_path / "judge.py").write_text(text)
        with pytest.raises(InputError, match=message):
            load_judge(str(tmp_path))
    assert load_judge(str(tmp_path / "elsewhere")) is None


def test_a_judge_may_define_dataclasses(tmp_path):
    """With postponed annotations, dataclasses look for the module that they are defined in."""
    (tmp_path / "judge.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass A:\n    x: int\n"
        "\n\ndef score(prompts, responses):\n    return [A(len(r)).x for r in responses]\n")
    assert load_judge(str(tmp_path)).score(["?"], ["four"]) == [4]


def test_vote_probabilities_are_checked():
    judge = SimpleNamespace(__file__="judge.py")
    assert vote_probabilities(judge, [1.0], [2.0]) is None
    judge.preference_probability = lambda a, b: a / b
    assert vote_probabilities(judge, [1.0, 0.0], [2.0, 3.0]) == [0.5, 0.0]
    with pytest.raises(InputError, match="judge.py failed: ZeroDivisionError"):
        vote_probabilities(judge, [1.0], [0.0])
    for a, b in ((3.0, 2.0), (-1.0, 2.0), (math.nan, 1.0)):
        with pytest.raises(InputError, match="a number from 0 to 1"):
            vote_probabilities(judge, [1.0, a], [2.0, b])


def test_votes_follow_the_stated_noise(bundled):
    """The share of votes for the better reply lies within 4 standard errors of the mean of
    sigmoid(2.5 * |difference|)."""
    judge = load_judge(str(bundled))
    rows = table(bundled / "comparisons.csv")
    prompts = [row["Prompt"] for row in rows]
    chosen = judge.score(prompts, [row["Chosen"] for row in rows])
    rejected = judge.score(prompts, [row["Rejected"] for row in rows])
    untied = [(a, b) for a, b in zip(chosen, rejected) if a != b]
    p = [judge.preference_probability(max(a, b), min(a, b)) for a, b in untied]
    expected, spread = sum(p), sum(x * (1 - x) for x in p) ** 0.5
    assert abs(sum(a > b for a, b in untied) - expected) < 4 * spread
    assert judge.preference_probability(1.0, 0.5) == pytest.approx(1 / (1 + 2.718281828459045**-1.25))


def test_the_four_habits_are_independent(bundled):
    """Relevance, completeness, kindness and rambling of the demonstrations: no pair correlates beyond 0.06,
    3.3 standard errors at 3,000 rows."""
    judge = load_judge(str(bundled))
    features = []
    for row in table(bundled / "demonstrations.csv"):
        sentences = judge.split_sentences(row["Response"])
        advice = [s for s in sentences if any(s in tips for sorts in judge.TOPICS.values() for tips in sorts)]
        relevant = any(advice[0] in tips for tips in judge.TOPICS[judge.topic_of(row["Prompt"])])
        features.append([relevant, len(advice) == 2, any(s in judge.KIND for s in sentences),
                         any(s in judge.RAMBLING for s in sentences)])
    correlations = torch.corrcoef(torch.tensor(features, dtype=torch.float64).T)
    assert (correlations - torch.eye(4)).abs().max() < 0.06


def test_judge_imports_without_the_package(bundled):
    """It is a plain file: another project may load it by its path."""
    spec = importlib.util.spec_from_file_location("a_judge", bundled / "judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.MAX_SCORE == 3.0
    with pytest.raises(ValueError, match="pairs"):
        module.score(["one"], [])
