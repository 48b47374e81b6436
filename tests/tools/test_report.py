"""rlhf.tools.report: what goes into the page, that text stays text, and the page in a browser."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas
import pytest

from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.tools import report
from rlhf.tools.report import ReportConfig, main, make_page, read_table
from tests.helpers import ROOT

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
    assert "max_gold" not in contents and re.fullmatch(
        r"([0-9a-f]{7,}(-dirty)?)?", contents["commit"]
    )


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
    contents_of(folder)
    assert (folder / "report.html").stat().st_size < 500_000


# ---- what the models say ----


def by_response(contents):
    """For each response of ppo_tokens.csv: what its rows have in common, and its columns."""
    table = contents["files"]["ppo_tokens.csv"]
    frame = pandas.DataFrame(table["data"], columns=table["columns"])
    for _, rows in frame.groupby("response"):
        yield rows.iloc[0], {name: rows[name].tolist() for name in rows}


def test_page_of_a_finished_run_has_the_numbers_of_a_step(trained, tmp_path):
    """The rewards of a response sum to the score minus the KL cost."""
    data, out, printed = trained
    folder = shutil.copytree(out, tmp_path / "run")
    contents = contents_of(folder, "--data", data)
    assert contents["max_gold"] == 3.0
    kl_coef = json.loads(contents["files"]["ppo.json"])["kl_coef"]
    responses = list(by_response(contents))
    assert len(responses) == 8  # --batch-size
    for first, columns in responses:
        assert len(columns["token"]) == first["length"]
        kl_ref = sum(columns["logprob"]) - sum(columns["ref_logprob"])
        assert sum(columns["reward"]) == pytest.approx(first["score"] - kl_coef * kl_ref, abs=1e-4)
    for stage, text in printed.items():
        warned = {line for line in text.splitlines() if line.startswith("warning: ")}
        found = contents["files"][f"{stage}.warnings.txt"].split("\n")
        assert {f"warning: {line}" for line in found if line} == warned
    assert all(f"{stage}.csv" in contents["files"] for stage in printed)


def test_page_shows_no_more_tokens_than_it_may(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "TOKENS", 3)
    data, out, _ = trained
    contents = contents_of(shutil.copytree(out, tmp_path / "run"), "--data", data)
    assert len(contents["files"]["ppo_tokens.csv"]["data"]) == 3


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


@pytest.mark.slow
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
    whole = [target - value for target, value in zip(columns["return"], columns["value"])]
    assert numbers == [minus(x) for x in whole]
    assert page.faults == []


def minus(x):
    """A number as the page writes it, rounded half away from zero as JavaScript does."""
    text = f"{x:.3f}".replace("-", "−")
    return "0.000" if text == "−0.000" else text
