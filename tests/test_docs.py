"""The documentation pages agree with the code."""

import json
import math
import re
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch

from rlhf.run.reward_functions import load_function
from tests.helpers import ROOT, rows, script


def test_metrics_page_lists_the_columns_of_the_csvs(trained):
    """docs/metrics.md has a table per CSV: the first cells of its rows are the CSV's columns, in
    the same order."""
    _, out, _ = trained
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in ("sft.csv", "reward.csv", "reward_margins.csv", "ppo.csv", "ppo_tokens.csv"):
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        documented = re.findall(r"^\| `(\w+)` \|", section, flags=re.M)
        assert documented == list(rows(out / name)[0]), (
            f"docs/metrics.md: one row per column of {name}"
        )


def test_logger_of_the_metrics_page_sends_each_row_once(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    source = re.search(r"ten lines beside the training:\n\n((?: {4}.*\n)+)", page)[1]
    sent = []

    def log(row, step):
        sent.append((step, row))

    def sleep(seconds):
        """The training writes a second row; after it, Ctrl-C."""
        if len(sent) == 2:
            raise KeyboardInterrupt
        table.write_text(table.read_text() + "2,0.5,1\n")

    table = tmp_path / "runs" / "ppo.csv"
    table.parent.mkdir()
    table.write_text("step,score,gold\n1,-0.5,\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project: None, log=log))
    with pytest.raises(KeyboardInterrupt):
        exec(textwrap.dedent(source), {})
    assert sent == [(1, {"step": 1, "score": -0.5}), (2, {"step": 2, "score": 0.5, "gold": 1})]


def own_reward(heading, path, *changes):
    """The reward function of docs/data.md under this heading, written to path. changes: pairs of
    what the page says and what stands for it in the test."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split(f"\n### {heading}\n")[1]
    block = re.search(r"^ {4}.*\n(?:(?: {4}.*)?\n)*", section, flags=re.M)[0]
    source = textwrap.dedent(block).strip() + "\n"
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    path.write_text(source, encoding="utf-8")
    return load_function(str(path))


def test_rule_of_the_page_trains(trained, tmp_path):
    """Beside the reward model, with the page's weights."""
    data, out, _ = trained
    rule = own_reward("A rule", tmp_path / "brevity.py")
    assert rule(["?"] * 3, ["", "word " * 10, "word " * 12]) == [0, 0, -2]
    rewards = ["--reward", out / "reward.pt", rule.path, "--reward-weights", 1, 0.2]
    script("ppo", "--data", data, "--sft", out / "sft.pt", "--out", tmp_path / "out", *rewards)
    assert all(float(row["score_brevity"]) <= 0 for row in rows(tmp_path / "out" / "ppo.csv"))


def test_classifier_of_the_page_gives_the_log_probability_of_its_label(tmp_path):
    """With a small random BERT. The score depends on prompt and response, and not on what else is
    in the batch."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "bad", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_labels": 2, "initializer_range": 0.5}
    config = transformers.BertConfig(vocab_size=len(words), **sizes, **heads)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    name = ("lvwerra/distilbert-imdb", str(tmp_path))
    classifier = own_reward("A classifier", tmp_path / "favourable.py", name)
    film, long, other = classifier(["a", "a", "bad"], ["film", "fine film bad film", "film"])
    assert film == pytest.approx(classifier(["a"], ["film"])[0], abs=1e-5)
    assert len({round(score, 4) for score in (film, long, other)}) == 3
    model = sys.modules[classifier.score.__module__].model
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.copy_(torch.tensor([1.0, 3.0]).log())
    assert classifier(["a"], [""]) == pytest.approx([math.log(0.75)])


class StubJudge(BaseHTTPRequestHandler):
    """Fails twice. Then it says how many letters the answer has, out of ten."""

    calls = 0

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, answer = asked["messages"][0]["content"].split("\n\n", 1)[1].split("\n\nAnswer: ")
        StubJudge.calls += 1
        if StubJudge.calls <= 2:
            self.send_error(503)
            return
        said = {"content": f"I say {len(prompt + answer)}.5/10"}
        reply = json.dumps({"choices": [{"message": said}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def test_judge_of_the_page_asks_a_server_and_again_if_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(StubJudge, "calls", 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), StubJudge)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = ("127.0.0.1:8000", f"127.0.0.1:{server.server_port}")
    judge = own_reward("A judge over HTTP", tmp_path / "judged.py", address)
    try:
        assert judge(["Hi", "H", ""], ["abc", "", "a"]) == [5.5, 1.5, 1.5]
        assert StubJudge.calls == 5
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    with pytest.raises(RuntimeError, match="raised URLError"):
        judge(["Hi"], ["abc"])


def test_one_response_quotes_numbers_of_the_recorded_walk():
    """Each number with three decimals in the page's prose is in walk.txt, or is one of the sums
    worked on the page."""
    page = (ROOT / "docs" / "one_response.md").read_text(encoding="utf-8")
    walk = (ROOT / "docs" / "results" / "seed0" / "walk.txt").read_text(encoding="utf-8")
    prose = re.sub(r"<!-- table.*?<!-- end -->", "", page, flags=re.S)
    worked = {"0.148"}  # from the rounded numbers
    quoted = {number.lstrip("-") for number in re.findall(r"-?\d\.\d{3}", prose)}
    assert len(quoted) > 20 and quoted - worked <= set(re.findall(r"\d\.\d{3}", walk))
