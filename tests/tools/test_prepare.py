"""rlhf.tools.prepare on small files: the tables that it writes, the split, the lengths, what it
refuses, and that the commands that it prints work as they are."""

import base64
import csv
import gzip
import hashlib
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import train_ppo
import train_reward
import train_sft
from data import prepare
from data.prepare import PrepareConfig
from data.tables import Sizes, Split, first_turn, split_tables
from rlhf.data import load_comparisons, load_demonstrations, load_prompts
from rlhf.run.errors import InputError
from rlhf.run.files import csv_path, data_folder
from rlhf.run.flags import parse_cli
from rlhf.run.heldout import hash_of
from rlhf.run.loading import find_tokenizer
from rlhf.run.messages import last_turn, read_prompt
from tests.helpers import BUNDLED, real_data

NAMES = ["demonstrations", "comparisons", "prompts"]
CONFIGS = {
    "train_sft.py": train_sft.SFTConfig,
    "train_reward.py": train_reward.RewardConfig,
    "train_ppo.py": train_ppo.PPOConfig,
}


@pytest.fixture(scope="module")
def byte_flags(tmp_path_factory):
    """Flags for a tokenizer without merges: each byte is a token, so lengths can be counted."""
    path = tmp_path_factory.mktemp("bytes") / "bytes.tiktoken"
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    path.write_text("".join(lines))
    return ("--tokenizer", path)


def run(out, *flags):
    prepare.main(parse_cli(PrepareConfig, [*map(str, flags), "--out", str(out)]))
    return out


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def table(path):
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [tuple(row) for row in csv.reader(file)][1:]


def both(out, name):
    """The rows of a table, training and held out, in any order."""
    return sorted(table(csv_path(out, name)) + table(csv_path(out, name, heldout=True)))


def sides(out):
    """The last turns of all prompts to train on, and of all that are held out."""
    train = set()
    heldout = set()
    for name in NAMES:
        train |= {last_turn(read_prompt(row[0])) for row in table(csv_path(out, name))}
        rows = table(csv_path(out, name, heldout=True))
        heldout |= {last_turn(read_prompt(row[0])) for row in rows}
    return train, heldout


def commands(printed):
    """{script: its flags} of the printed commands."""
    found = {}
    for line in re.findall(r"^    python (.*train_.*)$", printed, flags=re.M):
        script, *flags = shlex.split(line)
        found[Path(script).name] = flags
    return found


def configs(printed):
    """{script: its config} of the printed commands."""
    found = commands(printed)
    return {name: parse_cli(CONFIGS[name], flags) for name, flags in found.items()}


def pair(i, **others):
    return {"prompt": f"Question {i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}.", **others}


# ---- tables ----


def test_pairs_give_all_six_files(tmp_path, capsys, byte_flags):
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(40)])
    out = run(tmp_path / "out", file, *byte_flags)
    names = {f"{name}{suffix}.csv" for name in NAMES for suffix in ("", "_heldout")}
    assert {path.name for path in out.iterdir()} == {*names, "tokenizer.tiktoken", "prepare.json"}
    numbers = range(40)
    pairs = [(f"Question {i}?", f"Yes {i}.", f"No {i}.") for i in numbers]
    assert both(out, "comparisons") == sorted(pairs)
    assert both(out, "demonstrations") == sorted(row[:2] for row in pairs)
    assert both(out, "prompts") == sorted(row[:1] for row in pairs)
    assert (out / "prompts.csv").read_text().startswith("Prompt\nQuestion ")
    assert (out / "comparisons.csv").read_text().startswith("Prompt,Chosen,Rejected\nQ")
    printed = capsys.readouterr().out
    assert "40 rows, preference pairs (JSON lines" in printed
    assert "no file holds demonstrations: they are the chosen responses" in printed


def test_files_join_and_each_table_comes_from_its_own_file(tmp_path, byte_flags):
    pairs = jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(9)])
    answers = tmp_path / "answers.csv"
    answers.write_text("Question;Answer\n" + "".join(f"Q{i};A{i}\n" for i in range(9)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why 1?\nWhy 2?\nWhy 3?\n")
    out = run(tmp_path / "out", pairs, answers, prompts, *byte_flags)
    assert both(out, "demonstrations") == [(f"Q{i}", f"A{i}") for i in range(9)]
    assert both(out, "prompts") == [("Why 1?",), ("Why 2?",), ("Why 3?",)]
    assert len(both(out, "comparisons")) == 9


def test_demonstrations_give_prompts_and_no_comparisons(tmp_path, capsys, byte_flags):
    rows = [{"instruction": f"Do {i}.", "input": "", "output": f"Done {i}."} for i in range(9)]
    out = run(tmp_path / "out", jsonl(tmp_path / "a.json", rows), *byte_flags)
    assert both(out, "prompts") == [(f"Do {i}.",) for i in range(9)]
    assert not (out / "comparisons.csv").exists()
    printed = capsys.readouterr().out
    found = commands(printed)
    assert list(found) == ["train_sft.py", "train_ppo.py"]
    assert "--reward FILE.py" in " ".join(found["train_ppo.py"])
    assert "PPO needs comparisons, votes or, as here, a reward function" in printed


def test_thumbs_give_pairs_where_a_prompt_has_both(tmp_path, byte_flags):
    rows = []
    for i in range(5):
        rows.append({"prompt": f"Q{i}", "completion": "good", "label": True})
    rows.append({"prompt": "Q1", "completion": "bad", "label": False})
    rows.append({"prompt": "Q1", "completion": "worse", "label": False})
    rows.append({"prompt": "Q1", "completion": "good", "label": False})  # once up, once down
    rows.append({"prompt": "Q2", "completion": "bad", "label": False})
    rows.append({"prompt": "Q9", "completion": "bad", "label": False})
    out = run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), *byte_flags)
    pairs = [("Q1", "good", "bad"), ("Q1", "good", "worse"), ("Q2", "good", "bad")]
    assert both(out, "comparisons") == pairs
    assert both(out, "demonstrations") == [(f"Q{i}", "good") for i in range(5)]
    assert both(out, "prompts") == [("Q0",), ("Q1",), ("Q2",), ("Q3",), ("Q4",), ("Q9",)]


def test_repetitions_are_dropped_and_counted(tmp_path, capsys, byte_flags):
    rows = [pair(i) for i in (0, 1, 2, 1, 1)]
    out = run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), *byte_flags)
    assert len(both(out, "comparisons")) == len(both(out, "demonstrations")) == 3
    assert "dropped, repetitions: 2 rows" in capsys.readouterr().out
    record = json.loads((out / "prepare.json").read_text())
    assert record["dropped"] == {"dropped, repetitions": 2}


def test_ranked_middle_responses_are_no_demonstrations(tmp_path, byte_flags):
    """Only a response that is never the worse one is."""
    lines = [f"Q{i}|bad|fair|good\n" for i in range(5)]
    (tmp_path / "a.csv").write_text("Prompt|C|B|A\n" + "".join(lines))
    out = run(tmp_path / "out", tmp_path / "a.csv", "--ranked", "C,B,A", *byte_flags)
    assert len(both(out, "comparisons")) == 15
    assert both(out, "demonstrations") == [(f"Q{i}", "good") for i in range(5)]


def test_record_names_sources_digests_counts_and_options(tmp_path, byte_flags):
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    out = run(tmp_path / "out", file, "--heldout", "0.2", *byte_flags)
    record = json.loads((out / "prepare.json").read_text())
    assert record["sha256"] == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert record["taken for"][str(file)].startswith("9 rows, preference pairs")
    for path in out.glob("*.csv"):
        assert record["rows"][path.name] == len(table(path))
    assert record["options"]["heldout"] == 0.2
    flags = {"sft": "--block-size 24 --steps 60", "reward": "--steps 40"}  # 11 + 8 bytes
    assert record["flags"] == {**flags, "ppo": "--max-new-tokens 8 --steps 224"}


def test_result_is_read_back_by_the_loaders(tmp_path, byte_flags):
    odd = ['Say "hi", you', "NA", "1.50", "a\\", "a\u2028b", "a,b\nc", "=1+1", "漢字 😀"]
    rows = [{"prompt": f"{x} {i}?", "chosen": x, "rejected": f"no {x}"} for i, x in enumerate(odd)]
    out = str(run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), *byte_flags))
    tokenizer = find_tokenizer(out)
    comparisons = load_comparisons(out, tokenizer, 512)
    comparisons += load_comparisons(out, tokenizer, 512, heldout=True)
    read = set()
    for comparison in comparisons:
        read.add((comparison.prompt.text, tokenizer.decode(comparison.chosen[:-1])))
    assert read == {(f"{x} {i}?", f" {x}") for i, x in enumerate(odd)}
    assert load_prompts(out, tokenizer, 512) and load_demonstrations(out, tokenizer, 512)


# ---- the split ----


def test_no_prompt_is_on_both_sides_and_sides_do_not_depend_on_the_file(tmp_path, byte_flags):
    """The same prompt in three files, in another order and beside others."""
    pairs = jsonl(tmp_path / "pairs.jsonl", [pair(i) for i in range(200)])
    answers = [{"prompt": f"Question {i}?", "response": "x"} for i in range(250, 50, -1)]
    answers = jsonl(tmp_path / "answers.jsonl", answers)
    prompts = jsonl(tmp_path / "p.jsonl", [{"prompt": f"Question {i}?"} for i in range(100, 300)])
    train, heldout = sides(run(tmp_path / "first", pairs, answers, prompts, *byte_flags))
    assert not train & heldout and len(train | heldout) == 300
    assert heldout == {f"Question {i}?" for i in range(300) if hash_of(f"Question {i}?") < 0.1}
    again, heldout_again = sides(run(tmp_path / "second", prompts, *byte_flags))
    assert again <= train and heldout_again <= heldout


def test_dialogues_with_one_beginning_are_on_one_side():
    assert [round(hash_of(text), 2) for text in "abc"] == [0.79, 0.24, 0.18]
    rows = []
    for first in ("a", "b", "c"):
        for last in ("x", "y"):
            contents = [("user", first), ("assistant", "z"), ("user", last)]
            messages = [{"role": role, "content": text} for role, text in contents]
            rows.append((json.dumps(messages),))
    files = split_tables({"prompts": rows}, Split(0.5))
    assert files == {"prompts.csv": rows[:2], "prompts_heldout.csv": rows[2:]}


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "prompt",
    [
        "Hi!",
        "\n\nHuman: Hi!\n\nAssistant:",
        "Human: Hi!\n\nAssistant: Yes?\n\nHuman: Hi!\n\nHuman: Bye.\n\nAssistant:",
        [SYSTEM, {"role": "user", "content": "Hi!"}],
        [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Yes?"}, SYSTEM],
    ],
)
def test_first_turn(prompt):
    assert first_turn(prompt) == "Hi!"


def test_prompts_of_test_files_are_held_out_in_all_tables(tmp_path, byte_flags):
    """With --heldout 0 nothing else is. Rows of other files with the same prompt go with them."""
    pairs = [{"prompt": p, "chosen": "yes", "rejected": "no"} for p in "abc"]
    train = jsonl(tmp_path / "train.jsonl", pairs)
    test = jsonl(
        tmp_path / "test.jsonl", [dict(pairs[2], rejected="never"), dict(pairs[0], prompt="d")]
    )
    out = run(tmp_path / "out", train, "--test", test, "--heldout", 0, *byte_flags)
    assert table(out / "comparisons.csv") == [("a", "yes", "no"), ("b", "yes", "no")]
    heldout = [("c", "yes", "no"), ("c", "yes", "never"), ("d", "yes", "no")]
    assert table(out / "comparisons_heldout.csv") == heldout
    assert table(out / "prompts_heldout.csv") == [("c",), ("d",)]
    assert set(json.loads((out / "prepare.json").read_text())["sha256"]) == {str(train), str(test)}


def test_share_is_held_out_beside_the_test_file(tmp_path, byte_flags):
    """The hashes of a to d are 0.79, 0.24, 0.18 and 0.1."""
    train = jsonl(tmp_path / "train.jsonl", [{"prompt": p} for p in "abcd"])
    test = jsonl(tmp_path / "test.jsonl", [{"prompt": "a"}])
    out = run(tmp_path / "out", train, "--test", test, "--heldout", 0.2, *byte_flags)
    assert table(out / "prompts_heldout.csv") == [("a",), ("c",), ("d",)]


def test_turn_that_one_table_holds_out_is_trained_on_in_none():
    """With hashes of 0.79, 0.24 and 0.18 no prompt is below 0.1, so each table holds out the one
    with the lowest: "b" and "c". Both are held out in both."""
    assert [round(hash_of(text), 2) for text in "abc"] == [0.79, 0.24, 0.18]
    demonstrations = [("a", "x"), ("b", "x")]
    prompts = [("a",), ("b",), ("c",)]
    expected = {
        "demonstrations.csv": [("a", "x")],
        "demonstrations_heldout.csv": [("b", "x")],
        "prompts.csv": [("a",)],
        "prompts_heldout.csv": [("b",), ("c",)],
    }
    tables = {"demonstrations": demonstrations, "prompts": prompts}
    assert split_tables(tables, Split()) == expected
    assert split_tables(dict(reversed(tables.items())), Split()) == expected


# ---- lengths ----


def test_rows_that_do_not_fit_are_dropped_with_room_for_ppos_response(tmp_path, capsys, byte_flags):
    """Prompts of 11 bytes. Responses with a space and end-of-text have 7, so PPO has 8; one has
    30. A prompt of 13 bytes is one too long for PPO's 8 in 20."""
    rows = [{"prompt": f"Question {i}", "response": "four5"} for i in range(10, 30)]
    rows[3]["response"] = "x" * 28
    rows[4]["prompt"] = "Question 14??"
    run(tmp_path / "all", jsonl(tmp_path / "a.jsonl", rows), *byte_flags)
    printed = capsys.readouterr().out
    assert re.search(r"prompt +11 +11 +13\nresponse +7 +7 +30\ntogether +18 +20 +41\n", printed)
    found = configs(printed)
    assert found["train_sft.py"].block_size == 48  # the next multiple of 8
    assert found["train_ppo.py"].max_new_tokens == (8,)
    out = run(tmp_path / "some", tmp_path / "a.jsonl", "--block-size", 20, *byte_flags)
    printed = capsys.readouterr().out
    # The long response, and that prompt in both tables.
    assert "dropped, longer than 20 tokens: 3 rows" in printed
    assert "--block-size 20 " in printed and len(both(out, "prompts")) == 19
    load_prompts(str(out), find_tokenizer(str(out)), 20 - 8)  # refuses longer ones


def test_longest_response_of_ppo_is_128(tmp_path, capsys, byte_flags):
    rows = [{"prompt": f"Q{i}", "response": "x" * 300} for i in range(9)]
    run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows), *byte_flags)
    assert "--max-new-tokens 128" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "init", "sft", "reward"),
    [
        (10, "", 60, 40),
        (3200, "", 600, 200),
        (1600, "", 300, 100),
        (32_000, "", 600, 400),
        (3200, "gpt2", 200, 50),
    ],
)
def test_steps_are_epochs_between_a_floor_and_a_cap(count, init, sft, reward):
    """6 epochs of 32 rows and 4 of 64; 2 and 1 of a pretrained model."""
    counts = {"demonstrations.csv": count, "comparisons.csv": count}
    flags = prepare.choose_flags(init, counts, Sizes(96, 32))
    assert flags["sft"].endswith(f" --steps {sft}")
    assert flags["reward"].endswith(f"--steps {reward}")


@pytest.mark.parametrize(("block_size", "steps"), [(40, 224), (96, 187), (512, 40)])
def test_ppo_of_longer_rows_has_fewer_steps(block_size, steps):
    """224 * 80 / 96 = 186.7, and 224 * 80 / 512 = 35, which is below the floor."""
    flags = prepare.choose_flags("", {}, Sizes(block_size, 32))
    assert flags["ppo"] == f"--max-new-tokens 32 --steps {steps}"


# ---- tokenizers ----


def test_own_tokenizer_is_trained_on_training_rows_only(tmp_path):
    """A word of all training rows is one token; one that is only in held-out rows is not."""
    prompts = [f"Question {i}?" for i in range(60)]
    rows = []
    for prompt in prompts:
        word = "quicksilver" if hash_of(prompt) < 0.1 else "marmalade"
        number = len(rows)
        rows.append(
            {"prompt": prompt, "chosen": f"{word} {number}", "rejected": f"xylophone{number}"}
        )
    assert "quicksilver" in str(rows)
    out = run(tmp_path / "out", jsonl(tmp_path / "a.jsonl", rows))
    tokenizer = find_tokenizer(str(out))
    assert tokenizer.vocab_size <= 512
    assert len(tokenizer.encode(" marmalade")) == len(tokenizer.encode(" xylophone")) == 1
    assert len(tokenizer.encode(" quicksilver")) > 5


def test_given_tokenizer_is_copied_and_gpt2s_is_not(tmp_path, gpt2_ranks):
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    own = BUNDLED / "tokenizer.tiktoken"
    out = run(tmp_path / "out", file, "--tokenizer", own)
    assert (out / "tokenizer.tiktoken").read_bytes() == own.read_bytes()
    for flags in (("--tokenizer", "gpt2"), ("--init", "gpt2")):
        run(tmp_path / "out", file, "--overwrite", *flags)
        assert not (out / "tokenizer.tiktoken").exists()


def test_prompts_alone_go_with_the_bundled_tokenizer(tmp_path, capsys):
    file = tmp_path / "a.csv"
    file.write_text("Prompt\n" + "".join(f"Why {i}?\n" for i in range(40)))
    out = run(tmp_path / "out", file)
    own = BUNDLED / "tokenizer.tiktoken"
    assert (out / "tokenizer.tiktoken").read_bytes() == own.read_bytes()
    printed = capsys.readouterr().out
    found = configs(printed)
    assert [data_folder(cfg.data).resolve() for cfg in found.values()] == [BUNDLED, out.resolve()]
    assert list(found) == ["train_sft.py", "train_ppo.py"] and "--reward FILE.py" in printed
    assert found["train_sft.py"].block_size == 80 and found["train_ppo.py"].max_new_tokens == (40,)


# ---- what is refused ----


def test_folder_with_files_is_replaced_only_with_overwrite(tmp_path, byte_flags):
    """The second data set has no comparisons; those of the first one go, and other files stay."""
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    other = jsonl(tmp_path / "b.jsonl", [{"prompt": f"Q{i}", "response": "x"} for i in range(9)])
    out = run(tmp_path / "out", file, *byte_flags)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="holds files; --overwrite"):
        run(out, other, *byte_flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "judge.py").write_text("# mine")
    run(out, other, "--overwrite", *byte_flags)
    assert not (out / "comparisons.csv").exists() and (out / "judge.py").exists()
    assert both(out, "demonstrations") == [(f"Q{i}", "x") for i in range(9)]


def test_refused_file_leaves_the_old_data_set(tmp_path, byte_flags):
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    out = run(tmp_path / "out", file, *byte_flags)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(InputError, match="b.jsonl: "):
        run(out, file, tmp_path / "b.jsonl", "--overwrite", *byte_flags)
    with pytest.raises(InputError, match="no row is left for demonstrations.csv"):
        run(out, file, "--overwrite", "--block-size", 9, *byte_flags)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_folder_of_a_source_is_no_out_folder(tmp_path, byte_flags):
    """Its prompts.csv would be replaced by that of the data set."""
    file = tmp_path / "prompts.csv"
    file.write_text("Prompt\na\nb\n")
    with pytest.raises(InputError, match="is the folder of a file that is read"):
        run(tmp_path, file, "--overwrite", *byte_flags)
    assert file.read_text() == "Prompt\na\nb\n"


def test_column_that_no_file_has_is_refused(tmp_path, byte_flags):
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    with pytest.raises(InputError, match="no file has a column 'Promt' that is used"):
        run(tmp_path / "out", file, "--prompt", "Promt", *byte_flags)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "a.jsonl",
        "--out x",
        "a.jsonl --out x --heldout 0",
        "a.jsonl --out x --heldout 1 --test b.jsonl",
        "a.jsonl --out x --block-size 0",
    ],
)
def test_bad_flags_end_with_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_cli(PrepareConfig, flags.split())
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


# ---- the commands ----


REWARD = """
def score(prompts, responses):
    return [float(len(response)) for response in responses]
"""


def train(printed, monkeypatch, folder):
    """Run the printed commands in a folder, with fewer and smaller steps."""
    monkeypatch.chdir(folder)
    (folder / "FILE.py").write_text(REWARD)
    short = "--steps 2 --batch-size 4 --device cpu"
    for name, flags in commands(printed).items():
        more = short + (" --minibatch-size 4 --eval-prompts 2" if "ppo" in name else "")
        config = parse_cli(CONFIGS[name], [*flags, *more.split()])
        importlib.import_module(Path(name).stem).main(config)
        assert (folder / config.out / f"{config.kind}.pt").is_file()


USER = {"role": "user", "content": "What is {}?"}
GOOD = {"role": "assistant", "content": "A number, {}."}
BAD = {"role": "assistant", "content": "No."}
EXCEL = "\ufeffPrompt;Chosen;Rejected\n" + "".join(f"Caf\xe9 {i};Oui;Non\n" for i in range(8))
RANKED = "Prompt|Least|Somewhat|Most\n" + "".join(f"Q{i}|bad|fair|good\n" for i in range(8))


def filled(records):
    """Eight rows of each record, {} replaced by a number."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    return "".join(text.replace("{}", str(i)) for i in range(8)).encode()


PAIRS = filled([{"prompt": "What is {}?", "chosen": "A number, {}.", "rejected": "No."}])
DIALOGUES = filled([{"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}])
ALPACA = filled([{"instruction": "Add.", "input": "1 and {}", "output": "{} and 1"}])
ASK = "\n\nHuman: What is {}?\n\nAssistant:"
HH = filled([{"chosen": f"{ASK} Hm.{ASK} A number.", "rejected": f"{ASK} Hm.{ASK} No."}])

# What people bring: the name of the file, its bytes, flags, and the stages that are printed.
DOORS = {
    "preference JSONL of TRL": ("a.jsonl", PAIRS, "", "sft reward ppo"),
    "conversational JSONL": ("a.jsonl", DIALOGUES, "", "sft reward ppo"),
    "Alpaca": ("a.json", b"[" + ALPACA.strip().replace(b"\n", b",") + b"]", "", "sft ppo"),
    "HH-RLHF": ("a.jsonl.gz", gzip.compress(HH), "", "sft reward ppo"),
    "CSV of Excel": ("a.csv", EXCEL.encode(), "", "sft reward ppo"),
    "CSV of Excel, Windows-1252": ("a.csv", EXCEL[1:].encode("cp1252"), "", "sft reward ppo"),
    "prompts": ("a.csv", "\n".join(["Prompt", *"abcdefgh"]).encode("utf-16"), "", "sft ppo"),
    "rankings": ("a.csv", RANKED.encode(), "--ranked Least,Somewhat,Most", "sft reward ppo"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DOORS)
def test_usual_file_becomes_a_data_set_and_commands(tmp_path, name, capsys, monkeypatch):
    """And these train, with a reward function if the file holds no comparisons. Parquet is in
    tests/data/test_formats.py."""
    file, contents, flags, stages = DOORS[name]
    (tmp_path / file).write_bytes(contents)
    monkeypatch.chdir(tmp_path)
    run("my set", file, *flags.split())
    printed = capsys.readouterr().out
    found = commands(printed)
    assert list(found) == [f"train_{stage}.py" for stage in stages.split()]
    assert ("--reward FILE.py" in printed) == ("reward" not in stages)
    train(printed, monkeypatch, tmp_path)
    assert (tmp_path / "runs" / "my set" / "evaluation.csv").is_file()


def test_flags_for_pretrained_models(tmp_path, capsys, gpt2_ranks):
    file = jsonl(tmp_path / "a.jsonl", [pair(i) for i in range(9)])
    run(tmp_path / "out", file, "--init", "gpt2")
    found = configs(capsys.readouterr().out)
    assert found["train_sft.py"].init == "gpt2"
    assert {config.lora_rank for config in found.values()} == {16}
    assert found["train_ppo.py"].value_network == "shared"


# ---- real files ----


def test_real_files_of_a_notebook_train(tmp_path, capsys, monkeypatch):
    """Its prompts overlap between the files, three are ranked twice, and one row is repeated."""
    names = "Least preferable response,Somewhat preferable response,Most preferable response"
    files = sorted(real_data("notebook_s1").iterdir())
    out = run(tmp_path / "out", *files, "--ranked", names)
    assert len(both(out, "comparisons")) == 3 * 46
    assert len(both(out, "demonstrations")) == 103 and len(both(out, "prompts")) == 68
    train_side, heldout = sides(out)
    assert heldout and not train_side & heldout
    train(capsys.readouterr().out, monkeypatch, tmp_path)


def test_real_hh_rlhf_rows_train(tmp_path, capsys, monkeypatch):
    """The first 300."""
    with gzip.open(real_data("hh_rlhf/harmless_base_1900.jsonl.gz"), "rb") as file:
        lines = file.readlines()[:300]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    out = run(tmp_path / "out", tmp_path / "a.jsonl")
    train_side, heldout = sides(out)
    assert heldout and not train_side & heldout
    prompts = [read_prompt(prompt) for (prompt,) in table(out / "prompts.csv")]
    assert sum(isinstance(prompt, list) for prompt in prompts) > 0.99 * len(prompts)
    train(capsys.readouterr().out, monkeypatch, tmp_path)
