"""data/hh_rlhf/prepare.py on hand-made lines in the format of the real set. How rows are read is
tested in test_formats.py and tests/tools/test_prepare.py."""

import csv
import gzip
import importlib.util
import json
import re
from typing import NamedTuple

import pytest

import train_ppo
import train_reward
import train_sft
from data.prepare import PrepareConfig
from data.tables import LONGEST_RESPONSE
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.messages import last_turn, read_prompt
from rlhf.tools.optimality import OptimalityConfig
from tests.helpers import ROOT

SCRIPT = ROOT / "data" / "hh_rlhf" / "prepare.py"
spec = importlib.util.spec_from_file_location("hh_rlhf_prepare", SCRIPT)
hh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hh)


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


def test_readme_commands_parse_and_their_sizes_agree():
    """Both programs have the same sizes. The last command of each script counts."""
    text = (SCRIPT.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    classes = {
        "data/hh_rlhf/prepare.py": hh.HHConfig,
        "data/hh_rlhf/openings.py": openings.OpeningsConfig,
        "rlhf.tools.prepare": PrepareConfig,
        "train_sft.py": train_sft.SFTConfig,
        "train_reward.py": train_reward.RewardConfig,
        "train_ppo.py": train_ppo.PPOConfig,
        "rlhf.tools.optimality": OptimalityConfig,
    }
    commands = re.findall(r"^    python (?:-m )?(\S+)([^#\n]*)", text, flags=re.M)
    configs = {name: parse_cli(classes[name], flags.split()) for name, flags in commands}
    assert set(classes) - set(configs) <= {"rlhf.tools.optimality"}
    default = hh.HHConfig()
    assert default.block_size == configs["train_sft.py"].block_size
    assert configs["train_ppo.py"].max_new_tokens == (LONGEST_RESPONSE,)
    for name in ("train_sft.py", "train_reward.py", "train_ppo.py"):
        assert configs[name].data == f"data/hh_rlhf/{default.subset}"
