"""data/hh_rlhf/prepare.py on hand-made lines in the format of the real set, with each fault that
may occur."""

import csv
import gzip
import importlib.util
import json
import re
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

import train_ppo
import train_reward
import train_sft
from rlhf.data import load_comparisons, load_demonstrations, load_prompts
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import find_tokenizer
from rlhf.tools.optimality import OptimalityConfig
from tests.helpers import ROOT

SCRIPT = ROOT / "data" / "hh_rlhf" / "prepare.py"
spec = importlib.util.spec_from_file_location("hh_rlhf_prepare", SCRIPT)
hh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hh)

NAMES = [
    "comparisons.csv",
    "comparisons_heldout.csv",
    "demonstrations.csv",
    "demonstrations_heldout.csv",
    "prompts.csv",
    "prompts_heldout.csv",
]
# No merges: each byte is a token, so lengths can be counted.
BYTES = ("--tokenizer", "own", "--vocab-size", "258")


def ask(question):
    return f"\n\nHuman: {question}\n\nAssistant:"


def line(chosen, rejected):
    return json.dumps({"chosen": chosen, "rejected": rejected})


def row(question, good="yes", bad="no"):
    return line(f"{ask(question)} {good}", f"{ask(question)} {bad}")


def make_source(folder, train, test=None, packed=True):
    """A folder in the layout of the real one. train and test are lists of lines."""
    folder.mkdir()
    if test is None:
        test = [row("held out?")]
    for split, lines in (("train", train), ("test", test)):
        encoded = [one if isinstance(one, bytes) else one.encode() for one in lines]
        text = b"".join(one + b"\n" for one in encoded)
        if packed:
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(text))
        else:
            (folder / f"{split}.jsonl").write_bytes(text)
    return folder


def prepare(source, out, *flags):
    folders = ["--source", source, "--out", out]
    hh.main(parse_cli(hh.PrepareConfig, [*map(str, [*folders, *flags])]))
    return out


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def report(printed):
    """{line of the report: (training, test)}"""
    found = {}
    for name in hh.REPORT:
        cells = re.search(rf"^{re.escape(name)} +([\d,]+) +([\d,]+)$", printed, flags=re.M)
        found[name] = tuple(int(cell.replace(",", "")) for cell in cells.groups())
    return found


# ---- rows ----


def test_prepare_writes_the_expected_files(tmp_path):
    """The prompt ends with the last "Assistant:". The first prompt has two rows and is written
    once."""
    dialogue = "\n\nHuman: Hi, you\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    train = [
        row("Why?", "  As it is.", "No\n\nidea. "),
        line(f"{dialogue} Bye.", f"{dialogue} What?"),
        row("Why?"),
    ]
    out = prepare(make_source(tmp_path / "in", train), tmp_path / "out", *BYTES)
    assert sorted(path.name for path in out.iterdir()) == [*NAMES, "tokenizer.tiktoken"]
    why = '"\n\nHuman: Why?\n\nAssistant:"'
    hi = f'"{dialogue}"'
    held = '"\n\nHuman: held out?\n\nAssistant:"'
    assert (out / "prompts.csv").read_text() == f"Prompt\n{why}\n{hi}\n"
    rows = f"{why},As it is.\n{hi},Bye.\n{why},yes\n"
    assert (out / "demonstrations.csv").read_text() == f"Prompt,Response\n{rows}"
    rows = f'{why},As it is.,"No\n\nidea."\n{hi},Bye.,What?\n{why},yes,no\n'
    assert (out / "comparisons.csv").read_text() == f"Prompt,Chosen,Rejected\n{rows}"
    assert (out / "prompts_heldout.csv").read_text() == f"Prompt\n{held}\n"
    assert (out / "demonstrations_heldout.csv").read_text() == f"Prompt,Response\n{held},yes\n"
    header = "Prompt,Chosen,Rejected"
    assert (out / "comparisons_heldout.csv").read_text() == f"{header}\n{held},yes,no\n"


FAULTS = [
    ("broken line", '{"chosen": "\\n\\nHuman: a'),  # cut short
    ("broken line", "<html>"),
    ("broken line", "[" * 100_000),  # deeper than Python can follow
    ("broken line", b'{"chosen": "\xff", "rejected": "\xfe"}'),  # not UTF-8
    ("broken line", "[1, 2]"),
    ("broken line", "null"),
    ("broken line", json.dumps({"chosen": ask("a") + " yes"})),  # a field is missing
    ("broken line", line(ask("a") + " yes", 3)),
    ("broken line", line(ask("a") + " yes", None)),
    ("broken line", line(ask("a") + " \ud83d", ask("a") + " no")),  # half a surrogate pair
    ("broken line", line("yes", "no")),  # no dialogues
    ("broken line", line("\n\nAssistant: yes", "\n\nAssistant: no")),  # nobody asked
    ("broken line", line("\n\nHuman: yes", "\n\nHuman: no")),  # no response
    # does not begin with a turn
    ("broken line", line("Look:" + ask("a") + " yes", "Look:" + ask("a") + " no")),
    ("sides without a common prompt", line(ask("a") + " yes", ask("b") + " no")),
    # one goes on
    ("sides without a common prompt", line(ask("a") + " yes", ask("a") + " no" + ask("b") + " no")),
    # up to the spaces around the reply
    ("identical sides", line(ask("a") + " yes", ask("a") + "  yes\n")),
    ("empty reply", line(ask("a"), ask("a") + " no")),
    ("empty reply", line(ask("a") + " yes", ask("a") + " \n ")),
    ("a human's turn in a reply", line(ask("a") + " yes\n\nHuman: thanks", ask("a") + " no")),
    ("a human's turn in a reply", line(ask("a") + " yes", ask("a") + " no\n\nHuman: oh")),
    ("longer than the context", row("a", good="y" * 472)),
]


@pytest.mark.parametrize(("fault", "bad"), FAULTS)
def test_prepare_counts_and_leaves_out_faulty_rows(tmp_path, capsys, fault, bad):
    """The row is twice in training, beside two sound rows, and once in the test split. It is in
    none of the files."""
    source = make_source(tmp_path / "in", [row("q1"), bad, row("q2"), bad], [bad, row("q3")])
    out = prepare(source, tmp_path / "out", *BYTES, "--context", 100, "--reply-room", 20)
    assert table(out / "comparisons.csv") == [[ask("q1"), "yes", "no"], [ask("q2"), "yes", "no"]]
    assert table(out / "demonstrations.csv") == [[ask("q1"), "yes"], [ask("q2"), "yes"]]
    assert table(out / "prompts.csv") == [[ask("q1")], [ask("q2")]]
    assert table(out / "comparisons_heldout.csv") == [[ask("q3"), "yes", "no"]]
    expected = dict.fromkeys(hh.REPORT, (0, 0))
    expected |= {"read": (4, 2), fault: (2, 1), "kept": (2, 1)}
    assert report(capsys.readouterr().out) == expected


def test_packed_and_plain_files_give_the_same_data_set(tmp_path):
    """If there are both, the .jsonl.gz is read. Blank lines and a missing line end after the last
    row do no harm."""
    rows = [row("q1"), row("q2", "naïve 漢字")]
    packed = make_source(tmp_path / "packed", rows)
    plain = make_source(tmp_path / "plain", rows, packed=False)
    (plain / "train.jsonl").write_text("\n" + rows[0] + "\n\n" + rows[1])
    (packed / "train.jsonl").write_text(row("not me"))
    one = prepare(packed, tmp_path / "one", *BYTES)
    other = prepare(plain, tmp_path / "other", *BYTES)
    for name in NAMES:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert [cells[1] for cells in table(one / "demonstrations.csv")] == ["yes", "naïve 漢字"]


ODD = [
    'Say "hi", please',
    "NA",
    "1.50",
    "nan",
    "a\\",
    '\\"',
    "'",
    "\u200b",
    "a\u2028b",
    "😀",
    "<|endoftext|>",
    "#",
    "a,b\nc",
    "=1+1",
]


def test_odd_text_is_read_back_unchanged(tmp_path):
    rows = [row(f"{i} {text}?", text, f"no {text}") for i, text in enumerate(ODD)]
    out = prepare(make_source(tmp_path / "in", rows), tmp_path / "out", *BYTES)
    tokenizer = find_tokenizer(str(out))
    prompts = [ask(f"{i} {text}?") for i, text in enumerate(ODD)]
    assert [prompt.text for prompt in load_prompts(str(out), tokenizer, 384)] == prompts
    comparisons = load_comparisons(str(out), tokenizer, 512)
    assert [comparison.prompt.text for comparison in comparisons] == prompts
    responses = [f" {text}" for text in ODD]
    assert [tokenizer.decode(row.chosen[:-1]) for row in comparisons] == responses
    demonstrations = load_demonstrations(str(out), tokenizer, 512)
    read = [tokenizer.decode(row.tokens[row.prompt_len : -1]) for row in demonstrations]
    assert read == responses


def test_line_ends_become_newlines_and_nul_is_removed(tmp_path):
    """pandas reads a bare \\r as the end of a row, so all line ends become \\n, between turns too.
    Before version 3 it read NUL as the end of a cell."""
    bad = "\r\n\r\nHuman: a\rb\x00\r\n\r\nAssistant:"
    source = make_source(tmp_path / "in", [line(bad + " c\rd", bad + " \x00e\r\nf")])
    out = prepare(source, tmp_path / "out", *BYTES)
    assert table(out / "comparisons.csv") == [[ask("a\nb"), "c\nd", "e\nf"]]
    assert len(load_comparisons(str(out), find_tokenizer(str(out)), 512)) == 1


def test_rows_limit_counts_faulty_rows_too(tmp_path, capsys):
    """--rows counts the rows that are read."""
    train = [row("q1"), "oops", row("q2"), row("q3")]
    source = make_source(tmp_path / "in", train, [row("q4"), row("q5")])
    out = prepare(source, tmp_path / "out", *BYTES, "--rows", 3)
    assert table(out / "prompts.csv") == [[ask("q1")], [ask("q2")]]
    assert table(out / "prompts_heldout.csv") == [[ask("q4")], [ask("q5")]]
    assert report(capsys.readouterr().out)["read"] == (3, 2)


# ---- lengths ----

# 24 + 24 + 22 bytes
THREE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:"
TWO = "\n\nHuman: c\n\nAssistant: d\n\nHuman: e\n\nAssistant:"  # 24 + 22
ONE = "\n\nHuman: e\n\nAssistant:"  # 22


@pytest.mark.parametrize(
    ("context", "room", "kept"),
    [
        (75, 5, THREE),  # 70 + " yes" + end-of-text = 75
        (74, 5, TWO),
        (51, 5, TWO),  # 46 + 5
        (50, 5, ONE),
        (27, 5, ONE),  # 22 + 5
        (26, 5, None),
        (76, 6, THREE),  # more room than the reply takes: 70 + 6
        (75, 6, TWO),
        (28, 6, ONE),
        (27, 6, None),
        (75, 1, THREE),  # less room than the reply takes
        (74, 1, TWO),
    ],
)
@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_long_prompts_lose_whole_leading_turns(tmp_path, capsys, context, room, kept, longer):
    """A dialogue of three turns, with a context on either side of each limit, in bytes. The longer
    reply counts."""
    good, bad = ("yes", "no") if longer == "chosen" else ("no", "yes")
    short = "\n\nHuman:x\n\nAssistant:"  # 21 + 3 bytes, which always fit
    other = "\n\nHuman:z\n\nAssistant:"
    rows = [line(f"{THREE} {good}", f"{THREE} {bad}"), line(f"{short} y", f"{short} n")]
    source = make_source(tmp_path / "in", rows, [line(f"{other} y", f"{other} n")])
    out = prepare(source, tmp_path / "out", *BYTES, "--context", context, "--reply-room", room)
    expected = [[kept, good, bad]] if kept else []
    assert table(out / "comparisons.csv") == [*expected, [short, "y", "n"]]
    counts = report(capsys.readouterr().out)
    assert counts["longer than the context"] == (int(kept is None), 0)
    assert counts["of these, shortened by whole turns"] == (int(kept in (TWO, ONE)), 0)
    assert counts["kept"] == (1 + bool(kept), 1)


def test_shortened_prompt_begins_with_a_human_turn(tmp_path):
    """The dialogue has two assistant's turns in a row and two human's turns in a row. The cut is
    before a human's turn, the first one from which the rest fits."""
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nHuman: e\n\nAssistant:"
    source = make_source(tmp_path / "in", [line(dialogue + " yes", dialogue + " no")], [row("x")])
    last_two = "\n\nHuman: d\n\nHuman: e\n\nAssistant:"  # 10 + 22 bytes
    for context, kept in (
        (len(dialogue) + 4, last_two),  # one byte too long
        (32 + 5, last_two),
        (31 + 5, ONE),
    ):
        flags = [*BYTES, "--context", context, "--reply-room", 1]
        out = prepare(source, tmp_path / str(context), *flags)
        assert table(out / "comparisons.csv") == [[kept, "yes", "no"]]


def test_heldout_prompts_are_not_training_prompts(tmp_path, capsys):
    """--context 51 leaves TWO if the replies are "yes" and "no", and ONE if a reply has 24 bytes.
    The test rows have: a training prompt; one that differs only before the cut; one that training
    cuts at another turn; a fresh one; and the prompt of a row that is left out of training."""
    other = THREE.replace("Human: a", "Human: z")
    long = "y" * 24
    train = [row("q1"), line(THREE + " yes", THREE + " no"), row("lost", "y" * 50)]
    test = [
        row("q1", "perhaps"),
        line(other + " yes", other + " no"),
        line(f"{THREE} {long}", THREE + " no"),
        row("q2"),
        row("lost"),
    ]
    source = make_source(tmp_path / "in", train, test)
    out = prepare(source, tmp_path / "out", *BYTES, "--context", 51, "--reply-room", 5)
    assert table(out / "comparisons.csv") == [[ask("q1"), "yes", "no"], [TWO, "yes", "no"]]
    assert table(out / "comparisons_heldout.csv") == [
        [ask("q2"), "yes", "no"],
        [ask("lost"), "yes", "no"],
    ]
    assert report(capsys.readouterr().out)["prompt in training too"] == (0, 3)


# ---- errors ----


def refused(source, out, *flags):
    """The error's message. Nothing was written."""
    with pytest.raises(InputError) as caught:
        prepare(source, out, *flags)
    assert not out.exists() or not list(out.iterdir())
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>no such page</html>\n", "train.jsonl.gz is not a whole gzip file"),
        (gzip.compress(row("a").encode())[:-9], "train.jsonl.gz is not a whole gzip file"),
        (
            gzip.compress(row("a").encode() * 99)[:10] + b"\x07" * 60,
            "train.jsonl.gz is not a whole gzip file",
        ),
        (b"", "no line is a JSON object .* it is empty"),  # gzip accepts an empty file
        (gzip.compress(b"\n \n"), "no line is a JSON object .* it is empty"),
        (
            gzip.compress(b"garbled\n{}\n"),
            "train.jsonl.gz: no line is a JSON object .* begins b'garbled",
        ),
        (
            gzip.compress(line(ask("a") + " yes", ask("b") + " no").encode()),
            "a split has no rows left",
        ),
    ],
    ids=[
        "a web page",
        "cut short",
        "damaged",
        "empty",
        "blank lines",
        "no dialogues",
        "only faulty rows",
    ],
)
def test_prepare_rejects_garbled_files(tmp_path, content, message):
    source = make_source(tmp_path / "in", [])
    (source / "train.jsonl.gz").write_bytes(content)
    assert re.search(message, refused(source, tmp_path / "out", *BYTES))


def test_prepare_rejects_missing_files_and_splits_without_rows(tmp_path):
    source = make_source(tmp_path / "in", [row("a")])
    out = tmp_path / "out"
    assert "neither train.jsonl.gz nor train.jsonl" in refused(tmp_path / "nowhere", out, *BYTES)
    assert "no rows left" in refused(source, out, *BYTES, "--context", 20, "--reply-room", 5)
    same = make_source(tmp_path / "same", [row("a")], [row("a")])
    assert "no rows left" in refused(same, out, *BYTES)
    (source / "test.jsonl.gz").unlink()
    assert "neither test.jsonl.gz nor test.jsonl" in refused(source, out, *BYTES)


def test_prepare_with_gpt2_tokenizer_rejects_tokenizer_of_another_run(tmp_path):
    source, out = make_source(tmp_path / "in", [row("a")]), tmp_path / "out"
    prepare(source, out, *BYTES)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="tokenizer.tiktoken is from another run"):
        prepare(source, out, "--tokenizer", "gpt2")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_failure_while_writing_leaves_the_old_files(tmp_path, monkeypatch):
    source, out = make_source(tmp_path / "in", [row("a")]), tmp_path / "out"
    prepare(source, out, *BYTES)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(frame, folder, heldout):
        if heldout:
            raise OSError("no space left")
        write_split(frame, folder, heldout)

    write_split = hh.write_split
    monkeypatch.setattr(hh, "write_split", full_disk)
    with pytest.raises(OSError, match="no space"):
        prepare(make_source(tmp_path / "new", [row("b")]), out, *BYTES)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--context", "128"], "--reply-room 128 leaves nothing of --context 128"),
        (["--vocab-size", "257"], "258 at least"),
        (["--subset", "red-team-attempts"], "invalid choice: 'red-team-attempts'"),
        (["--rows", "-1"], "--rows is -1"),
    ],
)
def test_prepare_config_rejects_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        parse_cli(hh.PrepareConfig, flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_error_is_one_line_and_status_2(tmp_path):
    """Run as a user does, from another folder."""
    command = [sys.executable, "-B", str(SCRIPT), "--source", "nowhere", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "error: --source nowhere holds neither train.jsonl.gz nor train.jsonl\n"
    assert done.returncode == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "subset", ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]
)
def test_prepare_downloads_the_two_splits_of_a_subset(tmp_path, monkeypatch, subset):
    """From the public addresses, each subset into a folder of its own. The files are read like
    those of --source."""
    source = make_source(tmp_path / "in", [row("a")])
    asked = []

    class Download(NamedTuple):
        url: str
        folder: str

    def fetch(url, folder):
        asked.append(Download(url, folder.relative_to(SCRIPT.parent).as_posix()))
        return source / url.rsplit("/", 1)[-1]

    monkeypatch.setattr(hh, "fetch", fetch)
    flags = ["--subset", subset, "--out", str(tmp_path / "out"), *BYTES]
    hh.main(parse_cli(hh.PrepareConfig, flags))
    address = f"https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}"
    assert asked == [
        Download(f"{address}/{split}.jsonl.gz", f"downloads/{subset}")
        for split in ("train", "test")
    ]
    assert table(tmp_path / "out" / "prompts.csv") == [[ask("a")]]


def test_prepare_writes_beside_the_script_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(hh, "HERE", tmp_path)
    source = make_source(tmp_path / "in", [row("a")])
    hh.main(parse_cli(hh.PrepareConfig, ["--source", str(source), *BYTES]))
    assert (tmp_path / "prompts.csv").is_file()


# ---- tokenizers, and the three scripts on the result ----


def dialogues(first, count):
    """Rows of one to four turns. Each row has its own words."""
    rows = []
    for i in range(first, first + count):
        dialogue = ""
        for j in range(i % 4):
            dialogue += ask(f"What about thing {i} and thing {j}?") + f" Thing {j} is fine."
        dialogue += ask(f"So what is thing {i} good for?")
        good = f"{dialogue} It is good for number {i}, I think."
        rows.append(line(good, f"{dialogue} Go away, {i}."))
    return rows


def test_own_tokenizer_is_trained_on_chosen_training_dialogues_only(tmp_path):
    """A word that is frequent there is one token. A word of the test split or of rejected replies
    is not."""
    train = [row(f"q{i}", "marmalade", "xylophone") for i in range(9)]
    source = make_source(tmp_path / "in", train, [row("held out", "quicksilver")])
    out = prepare(source, tmp_path / "out", "--tokenizer", "own", "--vocab-size", 300)
    tokenizer = find_tokenizer(str(out))
    size = tokenizer.vocab_size
    assert size <= 300
    assert (tokenizer.eos_id, tokenizer.pad_id) == (size - 2, size - 1)
    assert len(tokenizer.encode(" marmalade")) == 1
    assert len(tokenizer.encode(" xylophone")) > 5 and len(tokenizer.encode(" quicksilver")) > 5


def test_lengths_with_gpt2_tokenizer_are_in_its_tokens(tmp_path, gpt2_ranks):
    r"""ONE has nine tokens of GPT-2 (\n, \n, Human, :, e, \n, \n, Assistant, :), TWO has 9 + 1 + 9,
    and a reply of one word has two with end-of-text."""
    source = make_source(tmp_path / "in", [line(TWO + " yes", TWO + " no")], [row("x")])
    for context, kept in ((21, TWO), (20, ONE), (11, ONE)):
        out = prepare(source, tmp_path / str(context), "--context", context, "--reply-room", 1)
        assert table(out / "prompts.csv") == [[kept]]
        assert len(load_comparisons(str(out), find_tokenizer(str(out)), context)) == 1
    assert "no rows left" in refused(source, tmp_path / "none", "--context", 10, "--reply-room", 1)


@pytest.mark.parametrize("tokenizer", ["own", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_three_scripts_run_on_the_prepared_data(tmp_path, tokenizer, request):
    """Two steps of each stage. PPO has the room for its responses that --reply-room asked for."""
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2_ranks")
    source = make_source(tmp_path / "in", dialogues(0, 40), dialogues(100, 8))
    sizes = ["--vocab-size", 400, "--context", 96, "--reply-room", 40]
    data = prepare(source, tmp_path / "data", "--tokenizer", tokenizer, *sizes)
    assert (data / "tokenizer.tiktoken").exists() == (tokenizer == "own")
    common = f"--data {data} --out {tmp_path / 'runs'} --device cpu --steps 2 --batch-size 4"

    def run(main, cls, flags):
        main(parse_cli(cls, f"{common} {flags}".split()))

    network = "--block-size 96 --n-layer 1 --n-head 2 --n-embd 8"
    run(train_sft.main, train_sft.SFTConfig, f"{network} --log-every 1")
    run(train_reward.main, train_reward.RewardConfig, "--log-every 1")
    sizes = "--max-new-tokens 40 --minibatch-size 4 --eval-prompts 4"
    run(train_ppo.main, train_ppo.PPOConfig, sizes)
    size = torch.load(tmp_path / "runs" / "ppo.pt", weights_only=True)["model_config"]["vocab_size"]
    assert size == 50257 if tokenizer == "gpt2" else size <= 400
    assert (tmp_path / "runs" / "evaluation.csv").is_file()


def test_readme_commands_parse_and_their_sizes_agree():
    """--context is --block-size, and --reply-room is --max-new-tokens. The last command of each
    script counts."""
    text = (SCRIPT.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    classes = {
        "data/hh_rlhf/prepare.py": hh.PrepareConfig,
        "train_sft.py": train_sft.SFTConfig,
        "train_reward.py": train_reward.RewardConfig,
        "train_ppo.py": train_ppo.PPOConfig,
        "rlhf.tools.optimality": OptimalityConfig,
    }
    commands = re.findall(r"^    python (?:-m )?(\S+)([^#\n]*)", text, flags=re.M)
    configs = {name: parse_cli(classes[name], flags.split()) for name, flags in commands}
    assert set(classes) - set(configs) <= {"rlhf.tools.optimality"}
    made, default = configs["data/hh_rlhf/prepare.py"], hh.PrepareConfig()
    assert made.context == default.context == configs["train_sft.py"].block_size
    assert made.reply_room == default.reply_room == configs["train_ppo.py"].max_new_tokens
