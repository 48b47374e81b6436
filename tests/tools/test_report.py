"""rlhf.tools.report: what goes into the page, that text stays text, and the page in a browser."""

import base64
import copy
import hashlib
import json
import math
import re
import shutil
import statistics
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas
import pytest
import torch

from rlhf.data import Prompt
from rlhf.rollout import Frozen, Rollout
from rlhf.run.checkpoints import load_checkpoint
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.tools import report
from rlhf.tools.optimality import Run, RunConfig, load_run
from rlhf.tools.report import ReportConfig, main, make_page, read_table, take_step, with_values
from tests.helpers import CPU, ROOT, Digits, f64, noisy, script

TEMPLATE = (ROOT / "rlhf" / "tools" / "report.html").read_text(encoding="utf-8")
ATTACK = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> & \u2028 \"q\" 'q'"


def write(folder, files):
    """A folder with files of a run, {name: text}."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def contents_of(folder, *flags):
    """What the page of a folder holds."""
    main(parse_cli(ReportConfig, [str(folder), *map(str, flags)]))
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="contents">(.*?)</script>', page)[1])


# ---- what lies in the folder ----

SFT = "step,loss,valid\n1,6.5,\n2,3.25,0.75\n"
EVALUATION = (
    "policy,score,gold,kl_ref,objective,win_rate_vs_sft,prompts,optimality,optimality_se\n"
    "sft,-0.5,-1,0,-0.5,0.5,40,0,0\nppo,1.5,2,4,1.22,0.9,40,0.875,0.01\n"
    "best_of_n,1.6,2.1,4,1.32,,10,0.9,0.02\noptimum,1.75,1.9,5,1.4,,10,1,0\n"
)
PPO = "step,score,gold,kl_ref,objective,seconds\n1,-0.5,-1,0,-0.5,2\n2,0.5,1,2,0.36,4.5\n"
SAMPLES = "Prompt,last_turn,Before,After,score_before,score_after,gold_before,gold_after\n"


def test_page_holds_the_files_of_the_folder(tmp_path):
    """Tables by column and row, with None for an empty cell; the other files as text."""
    texts = {"sft.json": '{"steps": 2}', "sft.warnings.txt": "few rows\noverfitting\n"}
    tables = {"sft.csv": SFT, "evaluation.csv": EVALUATION}
    folder = write(tmp_path / "run", {**texts, **tables, "other.csv": SFT})
    contents = contents_of(folder)
    files = contents["files"]
    assert files["sft.csv"] == {
        "columns": ["step", "loss", "valid"],
        "data": [[1, 6.5, None], [2, 3.25, 0.75]],
    }
    assert files["evaluation.csv"]["data"][1] == ["ppo", 1.5, 2, 4, 1.22, 0.9, 40, 0.875, 0.01]
    assert files.keys() == texts.keys() | tables.keys()
    assert {name: files[name] for name in texts} == texts
    assert contents["commands"]["sft"].endswith("train_sft.py")
    assert "responses" not in contents and "ppo.pt does not exist" in contents["missing"]


def test_folder_of_the_run_needs_no_flag():
    assert parse_cli(ReportConfig, []).folder == "runs"
    assert parse_cli(ReportConfig, ["a b", "--data", "d"]).folder == "a b"


def test_folder_without_a_run_is_refused_and_no_page_written(tmp_path):
    with pytest.raises(InputError, match="holds no sft.csv, reward.csv or ppo.csv"):
        main(ReportConfig(folder=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_long_curve_is_thinned_out_and_rare_values_stay(tmp_path, monkeypatch):
    """601 rows of 3 numbers, at most 902: groups of two, from which each column's first value is
    taken."""
    monkeypatch.setattr(report, "NUMBERS", 902)
    lines = [f"{step},{step / 2},{0.5 if step == 6 else ''}" for step in range(1, 602)]
    path = tmp_path / "sft.csv"
    path.write_text("\n".join(["step,loss,valid", *lines]) + "\n")
    data = read_table(path)["data"]
    assert len(data) == 301
    assert data[2:4] == [[5, 2.5, 0.5], [7, 3.5, None]] and data[-1] == [601, 300.5, None]


def sample_table(folder, gold):
    """Forty prompts; gold: of a row number after PPO."""
    lines = [f"p{i},t{i},b{i},NA,0.5,{i},-1,{gold(i)}" for i in range(40)]
    files = {"ppo_samples.csv": SAMPLES + "\n".join(lines)}
    return read_table(write(folder, files) / "ppo_samples.csv")


@pytest.mark.parametrize(
    ("gold", "worst"),
    [
        (lambda i: -i, {39, 38, 37, 36, 35}),
        (lambda i: 3 if i % 10 else -3, {0, 10, 20, 30, 1}),  # of equal gold, the lower score
        (lambda i: "", {0, 1, 2, 3, 4}),  # without a judge, by score
    ],
)
def test_only_the_first_and_the_worst_responses_have_texts(tmp_path, gold, worst):
    """All numbers stay. A response that reads NA is no empty cell."""
    table = sample_table(tmp_path, gold)
    after = [row[3] for row in table["data"]]
    assert {i for i, text in enumerate(after) if text == "NA"} == worst | set(range(20))
    assert set(after) <= {"NA", None}
    assert [row[5] for row in table["data"]] == list(range(40))


def test_texts_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "CHARACTERS", 2)
    table = sample_table(tmp_path, lambda i: 1)
    assert table["data"][12][:4] == ["p1", "t1", "b1", "NA"]


def long_responses(cfg):
    numbers = {name: [-0.123456] * report.TOKENS for name in "abcdefghi"}
    return {"tokens": report.as_json(pandas.DataFrame(numbers))}


def test_page_of_a_long_run_with_long_texts_stays_below_500_kb(tmp_path, monkeypatch):
    names = ["step", *"abcdefghijklmnopqrstu"]
    steps = [",".join([str(step), *["-0.123456"] * 21]) for step in range(20_000)]
    text = "word " * 4_000
    line = f"{text},{text},{text},{text},0.123456,0.123456,-1.5,2.5"
    curves = "\n".join([",".join(names), *steps])
    files = {name: curves for name in ("sft.csv", "reward.csv", "reward_margins.csv", "ppo.csv")}
    files["ppo_samples.csv"] = SAMPLES + "\n".join([line] * 1_000)
    folder = write(tmp_path / "run", files)
    monkeypatch.setattr(report, "ask_models", long_responses)
    contents_of(folder)
    assert (folder / "report.html").stat().st_size < 500_000


# ---- what the models say ----


def by_response(contents):
    """Each response with {column: numbers of its tokens}."""
    table = contents["tokens"]
    tokens = [dict(zip(table["columns"], row)) for row in table["data"]]
    responses = contents["responses"]
    for row in responses["data"]:
        response = dict(zip(responses["columns"], row))
        own, tokens = tokens[: response["length"]], tokens[response["length"] :]
        yield response, {name: [token[name] for token in own] for name in table["columns"]}
    assert not tokens


def test_page_of_a_finished_run_has_its_models_numbers(trained, tmp_path):
    """The tokens of a response are its text. Its rewards sum to the score minus the KL cost, and a
    return is value plus advantage."""
    data, out, printed = trained
    folder = shutil.copytree(out, tmp_path / "run")
    contents = contents_of(folder, "--data", data)
    assert "missing" not in contents and contents["max_gold"] == 3.0
    assert len(contents["responses"]["data"]) == 10  # prompts held out
    for response, columns in by_response(contents):
        texts = [text for text in columns["token"] if text != "<|endoftext|>"]
        assert "".join(texts).strip() == response["text"]
        paid = contents["kl_coef"] * response["kl_ref"]
        assert sum(columns["reward"]) == pytest.approx(response["score"] - paid, abs=2e-3)
        for value, advantage, target in zip(
            columns["value"], columns["advantage"], columns["return"]
        ):
            assert target == pytest.approx(value + advantage, abs=2e-4)
    for stage, text in printed.items():
        warned = {line for line in text.splitlines() if line.startswith("warning: ")}
        found = contents["files"][f"{stage}.warnings.txt"].split("\n")
        assert {f"warning: {line}" for line in found if line} == warned
    assert all(f"{stage}.csv" in contents["files"] for stage in printed)


def test_page_shows_no_more_tokens_than_it_may(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TOKENS", 3)
    data, out, _ = trained
    contents = contents_of(shutil.copytree(out, tmp_path / "run"), "--data", data)
    assert len(contents["tokens"]["data"]) == 3


def test_models_that_cannot_be_asked_leave_a_sentence(tmp_path, monkeypatch):
    """As for a run with reward functions, which run only if the user names them."""

    def refuse(cfg):
        assert (cfg.checkpoint, cfg.sft) == (str(folder / "ppo.pt"), "a.pt")
        assert (cfg.reward, cfg.data) == (("brief.py",), "d")
        raise InputError("give --reward brief.py")

    folder = write(tmp_path / "run", {"ppo.csv": PPO})
    monkeypatch.setattr(report, "load_run", refuse)
    contents = contents_of(folder, "--sft", "a.pt", "--reward", "brief.py", "--data", "d")
    assert contents["missing"] == "give --reward brief.py" and "responses" not in contents


# ---- a PPO step ----

MASK = torch.tensor([[False, True, True, True], [True, True, False, False]])
TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
LOGPROBS, REF, VALUES = [-1.0, -2.0, -0.5], [-1.5, -1.0, -0.25], [0.3, 0.6, 1.1]
CONFIG = {"gamma": 0.9, "lam": 0.8, "lr": 0.05, "seed": 0, "micro_batch_size": 0}
CONFIG |= {"clip_eps": 0.2, "value_clip_eps": 0.0, "value_coef": 0.5, "entropy_coef": 0.0}
CONFIG |= {"max_grad_norm": 1.0, "inner_epochs": 7, "minibatch_size": 1}
CONFIG |= {"advantage": "gae", "group_size": 4}


@pytest.fixture
def step(policy, monkeypatch):
    """A step on two responses, of 3 and 2 tokens; kl_coef 0.5."""
    rollout = Rollout(
        TOKENS,
        MASK,
        f64([0, *LOGPROBS], [-1, -1, 0, 0]),
        f64([0, *REF], [-2, -1, 0, 0]),
        f64([9, *VALUES], [0.5, -0.5, 9, 9]),
        f64(2.0, -1.0),
    )
    monkeypatch.setattr(report, "collect", lambda *arguments: rollout)
    monkeypatch.setattr(report, "with_values", lambda run: policy)
    frozen = Frozen(copy.deepcopy(policy.gpt), None, Digits())
    checkpoint = {"config": CONFIG, "kl_coef": 0.5}
    run = Run(Path("ppo.pt"), checkpoint, policy.gpt, frozen, None, [], CPU)
    return take_step(run, [Prompt("12", [1, 2]), Prompt("6", [6])])


def test_numbers_before_the_step_recomputed_in_plain_arithmetic(step):
    """The first row by hand, from its end: rewards -0.5 * (logprob - ref), plus the score 2 on the
    last; gamma 0.9, lambda 0.8. The second row: rewards -0.5 and -1, deltas -0.5 + 0.9 * -0.5 - 0.5
    and -1 + 0.5."""
    _, columns = step
    costs = [0.5 * (a - b) for a, b in zip(LOGPROBS, REF)]
    rewards = [-costs[0], -costs[1], 2 - costs[2]]
    deltas = [r + 0.9 * after - v for r, after, v in zip(rewards, [*VALUES[1:], 0.0], VALUES)]
    third = deltas[2]
    second = deltas[1] + 0.9 * 0.8 * third
    advantages = [deltas[0] + 0.9 * 0.8 * second, second, third]
    others = [-1.45 + 0.72 * -0.5, -0.5]
    mean, std = statistics.fmean(advantages + others), statistics.pstdev(advantages + others)
    expected = {
        "logprob": LOGPROBS,
        "ref": REF,
        "reward": rewards,
        "value": VALUES,
        "advantage": advantages,
        "whitened": [(a - mean) / math.sqrt(std**2 + 1e-8) for a in advantages],
        "return": [a + v for a, v in zip(advantages, VALUES)],
    }
    assert [*columns] == [*expected, "new_logprob", "new_value"]
    for name, numbers in expected.items():
        assert columns[name][0, 1:].tolist() == pytest.approx(numbers, abs=1e-12), name


def test_new_numbers_are_those_of_the_policy_after_one_gradient_step(step, policy):
    """Its weights have moved by at most the learning rate of AdamW's first step. The config's
    epochs and minibatches do not count."""
    _, columns = step
    with torch.no_grad():
        logits, values = policy(TOKENS)
    for row, slot in MASK.nonzero().tolist():
        expected = logits[row, slot].log_softmax(0)[TOKENS[row, slot + 1]].item()
        assert columns["new_logprob"][row, slot].item() == pytest.approx(expected, abs=1e-9)
        assert columns["new_value"][row, slot].item() == values[row, slot].item()


def test_step_is_one_gradient_step(policy, step, gpt):
    """AdamW's first step moves no weight by more than the learning rate; seven epochs would."""
    before = noisy(type(gpt)(gpt.config).double())  # as the fixture made it
    moved = []
    for old, new in zip(before.parameters(), policy.gpt.parameters()):
        moved.append((new - old).abs().max().item())
    assert 0.04 < max(moved) <= 0.05 + 1e-9


# ---- the value network ----


def loaded(out, data, sft, reward):
    cfg = RunConfig(str(out / "ppo.pt"), str(sft), (str(reward),), str(data), "cpu")
    return with_values(load_run(cfg))


@pytest.mark.parametrize("value_network", ["reward", "shared", "of a function"])
def test_with_values_loads_all_weights_of_the_run(trained, tmp_path, value_network):
    """The value network: the reward model's, the policy's own, or one that started from the
    fine-tuned model, because a function is the only reward."""
    data, out, _ = trained
    sft, reward = out / "sft.pt", out / "reward.pt"
    flags = ["--value-network", value_network]
    if value_network == "of a function":
        reward = tmp_path / "rules.py"
        reward.write_text("def score(prompts, responses): return [len(x) for x in responses]")
        flags = []
    files = ["--data", data, "--sft", sft, "--reward", reward, "--out", tmp_path]
    script("ppo", *files, *flags, "--steps", 1)
    policy = loaded(tmp_path, data, sft, reward)
    assert (policy.value_gpt is None) == (value_network == "shared")
    expected = load_checkpoint(tmp_path / "ppo.pt", "ppo")["model"]
    torch.testing.assert_close(dict(policy.state_dict()), expected, atol=0, rtol=0)


def test_step_needs_a_value_network(trained, tmp_path):
    data, out, _ = trained
    sft, reward = out / "sft.pt", out / "reward.pt"
    files = ["--data", data, "--sft", sft, "--reward", reward, "--out", tmp_path]
    script("ppo", *files, "--advantage", "rloo", "--group-size", 2, "--steps", 1)
    with pytest.raises(InputError, match="ppo.pt has no value network to follow"):
        loaded(tmp_path, data, sft, reward)


# ---- the page ----


def test_text_of_a_run_cannot_end_its_element():
    page = make_page({"text": ATTACK})
    inside = re.search(r'id="contents">(.*?)</script>', page)[1]
    assert json.loads(inside) == {"text": ATTACK} and "<" not in inside


@pytest.mark.parametrize("tag", ["style", "script"])
def test_template_names_the_hash_of_its_script_and_style(tag):
    """The browser runs nothing else. After a change, put the hash that this test shows into the
    template."""
    source = re.search(f"<{tag}>(.*?)</{tag}>", TEMPLATE, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    assert re.search(f"{tag}-src '(.*?)'", TEMPLATE)[1] == f"sha256-{digest}"


def test_template_loads_nothing_and_takes_no_text_for_markup():
    assert "default-src 'none'" in TEMPLATE and TEMPLATE.count("CONTENTS") == 1
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "src=",
        "url(",
    ):
        assert word not in TEMPLATE, word
    assert re.findall(r"https?://[^\s\"']+", TEMPLATE) == ["http://www.w3.org/2000/svg"]


def documented_end(page, stage, column):
    """Where a recorded run ends: the last range in the third column of docs/metrics.md."""
    section = page.split(f"\n## {stage}.csv\n")[1].split("\n## ")[0]
    healthy = re.search(rf"^\| `{column}` \|[^|]*\|([^|]*)\|", section, flags=re.M)[1]
    numbers = re.findall(r"-?[\d.]+", healthy.split("→")[-1].replace("–", " "))
    return [0.0] * (healthy.strip().startswith("at most")) + [float(x) for x in numbers]


def test_healthy_ranges_are_those_of_the_metrics_page():
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    healthy = json.loads(re.search(r'id="healthy">(.*?)</script>', TEMPLATE, re.DOTALL)[1])
    assert [len(columns) for columns in healthy.values()] == [2, 3, 8]
    for stage, columns in healthy.items():
        for column, ends in columns.items():
            assert ends == documented_end(page, stage, column), column


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Server(BaseHTTPRequestHandler):
    """Serves one page, whatever is asked for, and remembers what was."""

    page = b""
    asked = []

    def do_GET(self):
        Server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.page)

    def log_message(self, *args):
        pass


@pytest.fixture
def opened(browser, monkeypatch):
    """Opens a page over HTTP; the page of playwright, its errors, and what it asked the server
    for."""
    monkeypatch.setattr(Server, "asked", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    pages = []

    def open_page(path, width=1280, scheme="light"):
        monkeypatch.setattr(Server, "page", path.read_bytes())
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda message: page.faults.append(message.text))
        page.on("dialog", lambda dialog: page.faults.append(dialog.message) or dialog.dismiss())
        page.goto(f"http://127.0.0.1:{server.server_port}/report.html")
        return page

    yield open_page
    for page in pages:
        page.close()
    server.shutdown()
    server.server_close()


def test_browser_shows_verdict_and_charts_and_runs_no_text(opened, tmp_path):
    """A response that holds a script is shown as text. The page asks for nothing but itself."""
    quoted = ATTACK.replace('"', '""')
    samples = SAMPLES + f'p,"{quoted}","{quoted}","{quoted}",0.5,1.5,-1,2\n' * 3
    files = {"sft.csv": SFT, "ppo.csv": PPO, "evaluation.csv": EVALUATION}
    files |= {"ppo_samples.csv": samples, "sft.warnings.txt": f"{ATTACK}\n"}
    files |= {"sft.json": '{"changed": ["seed"], "data": "d", "seed": 7}'}
    folder = write(tmp_path / "run", files)
    contents_of(folder)
    page = opened(folder / "report.html")
    verdict = page.inner_text("#verdict")
    assert "raised the mean gold of responses to 40 held-out prompts: it was −1" in verdict
    assert "optimality of 0.88 (95 % interval 0.86 to 0.89)" in verdict
    assert "on 90 % of the prompts" in verdict and "4 nats of KL" in verdict
    assert "Warning, SFT: </script><script>alert(1)</script>" in verdict
    assert page.inner_text("#responses .after p >> nth=0").startswith("</script><script>alert(1)")
    assert page.locator("#last-charts figure").count() == 4
    assert "settings differ from the defaults:\n" in page.inner_text("#settings")
    assert page.inner_text("#settings td >> nth=0") == "seed"
    assert "This folder has no reward.csv." in page.inner_text("#training")
    assert "Left out: " in page.inner_text("#tokens")
    page.click("#last-charts details >> nth=0")
    page.wait_for_selector("#last-charts td")
    cells = page.locator("#last-charts figure >> nth=0").locator("td").all_inner_texts()
    assert cells == ["1", "−0.50", "2", "0.50"]
    assert page.locator("img").count() == 0 and page.faults == []
    assert set(Server.asked) == {"/report.html"}


def test_browser_shows_a_run_of_dpo(opened, tmp_path):
    files = {
        "dpo.csv": "step,loss,accuracy,heldout\n1,0.7,0.5,\n2,0.5,0.75,0.625\n",
        "evaluation.csv": EVALUATION.replace("\nppo,", "\ndpo,"),
        "dpo_samples.csv": SAMPLES + "p,p,b,a,0.5,1.5,-1,2\n",
    }
    folder = write(tmp_path / "run", files)
    contents_of(folder)
    page = opened(folder / "report.html")
    assert "DPO raised the mean gold" in page.inner_text("#verdict")
    assert page.inner_text("#last-stage") == "Stage 3: DPO"
    assert page.locator("#last-charts figure").count() == 2
    assert page.inner_text("#responses .after p >> nth=0") == "a"
    assert page.inner_text("#tokens p").startswith("Left out: ") and page.faults == []


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1920, "light")])
def test_browser_shows_one_response_token_by_token(opened, trained, tmp_path, width, scheme):
    """At each width nothing is wider than the window. Pointing at a token names the six parts, with
    its numbers; the switch changes the number under each token."""
    data, out, _ = trained
    folder = shutil.copytree(out, tmp_path / "run")
    _, (_, columns), *_ = by_response(contents_of(folder, "--data", data))
    page = opened(folder / "report.html", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.select_option("#response", "1")
    tokens = page.locator(".tokens button")
    assert tokens.count() == len(columns["token"])
    tokens.nth(0).hover()
    shown = page.inner_text(".parts")
    for part in ("generate", "score", "shape", "credit", "losses", "update"):
        assert f"{part}: " in shown
    assert f"log-probability {minus(columns['logprob'][0])}" in shown
    page.check("input[value=advantage]")
    numbers = page.locator(".tokens small").all_inner_texts()
    assert numbers == [minus(x) for x in columns["advantage"]]
    assert page.faults == []


def minus(x):
    """A number as the page writes it, rounded half away from zero as JavaScript does."""
    text = f"{x:.3f}".replace("-", "−")
    return "0.000" if text == "−0.000" else text
