"""data/hh_rlhf/prepare.py on hand-made lines in the format of the real set. How rows are read is
tested in test_formats.py and tests/tools/test_prepare.py."""

import csv
import gzip
import importlib.util
import json
import re
import statistics
import sys
from typing import NamedTuple

import pytest

import train_ppo
import train_reward
import train_sft
from data.formats import read_file
from data.prepare import PrepareConfig
from data.tables import LONGEST_RESPONSE
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.flags import parse_cli
from rlhf.run.messages import last_turn, read_prompt
from rlhf.run.reward_functions import load_function
from tests.helpers import ROOT

FOLDER = ROOT / "data" / "hh_rlhf"


def load(name):
    spec = importlib.util.spec_from_file_location(f"hh_rlhf_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


hh = load("prepare")
openings = load("openings")
repeat = load("repeat")


def ask(question):
    return f"\n\nHuman: {question}\n\nAssistant:"


def row(question):
    return {"chosen": f"{ask(question)} yes", "rejected": f"{ask(question)} no"}


def packed(questions):
    text = "".join(json.dumps(row(question)) + "\n" for question in questions)
    return gzip.compress(text.encode())


def prepare(*flags):
    hh.main(parse_cli(hh.HHConfig, [*map(str, flags), "--tokenizer", "own"]))


def prompts(out):
    """The questions of a data set, training and held out."""
    found = set()
    for name in ("prompts.csv", "prompts_heldout.csv"):
        with (out / name).open(newline="", encoding="utf-8") as file:
            found |= {last_turn(read_prompt(cells[0])) for cells in list(csv.reader(file))[1:]}
    return found


def test_source_may_hold_one_split_or_both_packed_or_not(tmp_path):
    """If there is train.jsonl.gz, train.jsonl is not read."""
    (tmp_path / "train.jsonl.gz").write_bytes(packed("ab"))
    (tmp_path / "train.jsonl").write_bytes(b"other")
    prepare("--source", tmp_path, "--out", tmp_path / "one")
    assert prompts(tmp_path / "one") == {"a", "b"}
    (tmp_path / "test.jsonl").write_bytes(gzip.decompress(packed("cd")))
    prepare("--source", tmp_path, "--out", tmp_path / "both")
    assert prompts(tmp_path / "both") == {"a", "b", "c", "d"}


def test_source_without_either_split_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no train or test, as .jsonl.gz or .jsonl"):
        prepare("--source", tmp_path, "--out", tmp_path / "out")


class Download(NamedTuple):
    url: str
    folder: str


@pytest.mark.parametrize("subset", ["harmless-base", "helpful-online"])
def test_prepare_downloads_both_splits_of_the_subset_beside_the_script(
    tmp_path, monkeypatch, subset
):
    asked = []

    def fetch(url, folder):
        asked.append(Download(url, folder.relative_to(tmp_path).as_posix()))
        path = tmp_path / f"{len(asked)}.jsonl.gz"
        path.write_bytes(packed(["a", "b"] if "train" in url else ["c"]))
        return path

    monkeypatch.setattr(hh, "HERE", tmp_path)
    monkeypatch.setattr(hh, "fetch", fetch)
    prepare("--subset", subset)
    address = f"https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}"
    assert asked == [
        Download(f"{address}/{split}.jsonl.gz", f"downloads/{subset}")
        for split in ("train", "test")
    ]
    assert prompts(tmp_path / subset) == {"a", "b", "c"}


def test_readme_commands_parse():
    """The last command of each program counts."""
    text = (FOLDER / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    classes = {
        "data/hh_rlhf/prepare.py": hh.HHConfig,
        "data/hh_rlhf/openings.py": openings.OpeningsConfig,
        "data/hh_rlhf/repeat.py": repeat.RepeatConfig,
        "rlhf.tools.prepare": PrepareConfig,
        "train_sft.py": train_sft.SFTConfig,
        "train_reward.py": train_reward.RewardConfig,
        "train_ppo.py": train_ppo.PPOConfig,
    }
    commands = re.findall(r"^    python (?:-m )?(\S+)([^#\n]*)", text, flags=re.M)
    configs = {name: parse_cli(classes[name], flags.split()) for name, flags in commands}
    assert set(classes) == set(configs)
    default = hh.HHConfig()
    assert configs["train_ppo.py"].max_new_tokens == (LONGEST_RESPONSE,)
    for name in ("train_sft.py", "train_reward.py", "train_ppo.py"):
        assert configs[name].data == f"data/hh_rlhf/{default.subset}"


def test_openings_are_the_first_messages_each_once(tmp_path):
    later = "\n\nHuman: One two three\n\nAssistant: So.\n\nHuman: And now?\n\nAssistant:"
    dialogues = [row("One two"), row("One two three"), row("One two three four")]
    dialogues.append({"chosen": f"{later} yes", "rejected": f"{later} no"})
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(dialogue) + "\n" for dialogue in dialogues))
    out = tmp_path / "openings.jsonl"
    flags = [str(source), "--words", "3", "--out", str(out)]
    openings.main(parse_cli(openings.OpeningsConfig, flags))
    found = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    expected = ["One two", "One two three"]
    assert found == [[{"role": "user", "content": text}] for text in expected]


def test_openings_need_a_file():
    with pytest.raises(InputError, match="give one or more files"):
        openings.main(openings.OpeningsConfig())


def test_benign_questions_have_an_answer_and_three_worse_responses():
    rows = read_file(FOLDER / "benign.jsonl", {}).rows
    assert {benign.table for benign in rows} == {"comparisons"}
    answers = {(benign.prompt, benign.responses[0]) for benign in rows}
    assert len({benign.prompt for benign in rows}) == len(answers) == 98
    assert len({(benign.prompt, benign.responses[1]) for benign in rows}) == 3 * 98
    assert all(benign.responses[0] != benign.responses[1] for benign in rows)


@pytest.mark.parametrize("columns", [("Prompt",), ("Prompt", "Response")])
def test_rows_of_benign_questions_are_repeated(tmp_path, capsys, columns):
    path = tmp_path / "rows.csv"
    questions = ("Hi", "Why is the sky blue?")
    cells = [json.dumps([{"role": "user", "content": text}]) for text in questions]
    rows = [dict(zip(columns, (cell, "Yes."))) for cell in cells]
    write_csv(path, rows)
    for _ in range(2):  # the second time changes nothing
        repeat.main(parse_cli(repeat.RepeatConfig, [str(path), "--times", "3"]))
        with path.open(encoding="utf-8", newline="") as file:
            assert list(csv.DictReader(file)) == [rows[0], rows[1], rows[1], rows[1]]
        assert "4 rows, 75 % of them benign questions" in capsys.readouterr().out


def test_a_file_is_repeated_at_least_once(tmp_path):
    with pytest.raises(InputError, match="give a CSV file"):
        repeat.main(repeat.RepeatConfig())
    with pytest.raises(InputError, match="--times 0: it must be at least 1"):
        repeat.main(repeat.RepeatConfig((str(tmp_path / "rows.csv"),), times=0))


def test_linear_reward_learns_the_words_of_the_preferred_responses(tmp_path):
    """Mean and standard deviation are those of the responses that it learned from."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    words = ["one", "two", "three"]
    pairs = [(f"kind {word}", f"rude {word}") for word in words for _ in range(3)]
    rows = [{"Prompt": "Hi", "Chosen": kind, "Rejected": rude} for kind, rude in pairs]
    write_csv(tmp_path / "comparisons.csv", rows)
    (tmp_path / "harmless.py").write_text((FOLDER / "harmless.py").read_text())
    score = load_function(str(tmp_path / "harmless.py"))
    kind, rude, other = score(["Hi"] * 3, ["kind one", "rude one", "Well"])
    assert kind > other > rude and kind == pytest.approx(-rude)
    everything = score(["Hi"] * 18, [text for pair in pairs for text in pair])
    assert statistics.fmean(everything) == pytest.approx(0)
    assert statistics.pstdev(everything) == pytest.approx(1)


def test_judge_is_minus_the_probability_of_offence():
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    good, bad, empty = load("judge").score([""] * 3, ["I like your garden.", "You idiot.", ""])
    assert -0.1 < good <= 0 and -1 <= bad < -0.8 and -1 <= empty <= 0


def test_judge_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(InputError, match="pip install alt-profanity-check"):
        load("judge")
