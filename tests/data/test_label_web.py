"""data/label_web.py: who may talk to the server, what a vote does, and the page in a browser."""

import contextlib
import http.client
import json
import re
import shutil
import socket
import threading
import time

import pytest

from data import label_terminal, label_web
from data.label_pairs import ListedPairs
from data.label_votes import Labelling, Pair, read_votes
from data.label_web import LabelServer
from rlhf.run.errors import InputError
from tests.data.test_label import type_keys

EVIL = '<script>alert(1)</script><img src="http://example.com/x.png">'


def some_pairs(count):
    return [Pair(i, f"p{i}", f"a{i}", f"b{i}") for i in range(count)]


@contextlib.contextmanager
def serving(labelling):
    """The server, in a thread."""
    with LabelServer(labelling) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def labelling(tmp_path):
    return Labelling(ListedPairs(some_pairs(30)), tmp_path / "votes.csv")


@pytest.fixture
def server(labelling):
    with serving(labelling) as server:
        yield server


def request(server, method, path, body=None, headers=None):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def get_state(server):
    status, _, text = request(server, "GET", f"/{server.token}/state")
    assert status == 200
    return json.loads(text)


def vote(server, pair, answer, headers=None):
    """The status and the state after a vote; None if there is none."""
    body = json.dumps({"pair": pair, "answer": answer})
    status, _, text = request(server, "POST", f"/{server.token}/answer", body, headers)
    return status, json.loads(text) if status == 200 else None


# ---- who may talk to it ----


def test_server_listens_on_the_loopback_address_only(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.address() == f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert len(server.token) == 32  # 24 bytes in base64


def test_each_server_has_its_own_token(labelling):
    with LabelServer(labelling) as one, LabelServer(labelling) as other:
        assert one.token != other.token


@pytest.mark.parametrize("start", ["", "/{wrong}", "/{longer}", "/{shorter}", "/%C3%A9"])
def test_request_without_the_token_is_refused(server, labelling, start):
    token = server.token
    start = start.format(wrong="A" * len(token), longer=f"{token}x", shorter=token[:-1])
    body = json.dumps({"pair": 0, "answer": "first"})
    for path in ("/", "/state", "/answer"):
        for method in ("GET", "POST"):
            status, _, text = request(server, method, start + path, body)
            assert status == 403 and "p0" not in text and token not in text
    assert request(server, "GET", f"/{token}")[0] == 403
    assert labelling.votes == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1.evil.example:{port}"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Host": "localhost:{port}", "Origin": "http://127.0.0.1:{port}"},
    ],
    ids=str,
)
def test_request_of_another_site_is_refused(server, labelling, headers):
    """Also with the token."""
    headers = {name: value.format(port=server.server_port) for name, value in headers.items()}
    assert vote(server, 0, "first", headers) == (403, None)
    for path in ("", "state"):
        assert request(server, "GET", f"/{server.token}/{path}", headers=headers)[0] == 403
    assert labelling.votes == []


def test_own_page_may_vote_under_both_names(server, labelling):
    for number, name in enumerate(("127.0.0.1", "localhost")):
        host = f"{name}:{server.server_port}"
        assert vote(server, number, "first", {"Host": host, "Origin": f"http://{host}"})[0] == 200
    assert len(labelling.votes) == 2


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", '"x"', '{"pair": 0}', '{"pair": 0, "answer": "maybe"}', "[" * 199]
    + ['{"pair": 0, "answer": ["first"]}', '{"pair": 0, "answer": "first", "x": 1}', "\xff"],
)
def test_body_that_is_no_vote_is_refused(server, labelling, body):
    path = f"/{server.token}/answer"
    assert request(server, "POST", path, body.encode("latin-1"))[0] == 400
    assert labelling.votes == []


@pytest.mark.parametrize("length", ["-1", "x", "201", "9" * 30])
def test_length_that_is_no_votes_is_refused_at_once(server, length):
    headers = {"Content-Length": length}
    assert request(server, "POST", f"/{server.token}/answer", headers=headers)[0] == 400


def test_other_paths_and_methods_are_not_there(server):
    assert request(server, "GET", f"/{server.token}/answer")[0] == 404
    assert request(server, "GET", f"/{server.token}/../label.py")[0] == 404
    assert request(server, "POST", f"/{server.token}/state", "{}")[0] == 404
    assert request(server, "PUT", f"/{server.token}/answer", "{}")[0] == 501


def test_silent_connection_does_not_hold_up_the_others(server):
    """A browser opens connections ahead of need."""
    with socket.create_connection(("127.0.0.1", server.server_port)):
        assert get_state(server)["pair"] == 0


def test_page_loads_nothing_and_tells_nobody(server):
    """Script and style have the policy's nonce, another each time. The page holds no address."""
    nonces = set()
    for _ in range(2):
        status, headers, page = request(server, "GET", f"/{server.token}/")
        assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
        policy = headers["Content-Security-Policy"]
        [nonce] = set(re.findall(r"'nonce-([\w-]+)'", policy))
        nonces.add(nonce)
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
        assert page.count(f'nonce="{nonce}"') == 2 and "NONCE" not in page
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "http:" not in page and "https:" not in page and server.token not in page
    assert len(nonces) == 2


# ---- votes ----


def test_thirty_votes_give_the_file_of_the_terminal(server, tmp_path, monkeypatch):
    """Each answer six times."""
    keys = "12tbs" * 6
    for number, key in enumerate(keys):
        assert vote(server, number, label_terminal.KEYS[key])[0] == 200
    there = tmp_path / "terminal.csv"
    type_keys(monkeypatch, keys)
    label_terminal.annotate(Labelling(ListedPairs(some_pairs(30)), there))
    assert (tmp_path / "votes.csv").read_bytes() == there.read_bytes()
    assert len(read_votes(there)) == 30
    shown = get_state(server)
    assert shown["pair"] is None and shown["summary"] == "30 answered, 12 of them with a choice"
    assert shown["progress"] == "30 of 30"


def test_vote_on_another_pair_than_the_present_one_does_not_count(server, labelling):
    """It was voted on in another window. The same holds for a second undo, and at the end."""
    assert vote(server, 0, "first")[1]["pair"] == 1
    for pair in (0, 2, 99, None, "1", -1):
        for answer in ("second", "undo"):
            status, shown = vote(server, pair, answer)
            assert status == 200 and shown["pair"] == 1 and shown["done"] == 1
    assert [row.answer for row in labelling.votes] == ["first"]
    for number in range(1, 30):
        vote(server, number, "tie")
    assert vote(server, None, "first")[1]["done"] == 30
    assert vote(server, 29, "undo")[1]["done"] == 30


def test_votes_at_the_same_time_count_once(server, labelling):
    windows = [threading.Thread(target=vote, args=(server, 0, "first")) for _ in range(8)]
    for window in windows:
        window.start()
    for window in windows:
        window.join()
    assert len(labelling.votes) == 1 and read_votes(labelling.path) == labelling.votes


def test_undo_shows_the_last_pair_again(server, labelling):
    assert vote(server, 0, "undo")[1]["pair"] == 0  # nothing to undo
    vote(server, 0, "first")
    vote(server, 1, "both bad")
    status, shown = vote(server, 2, "undo")
    assert (shown["pair"], shown["done"], shown["left"]) == (1, 1, 29)
    assert [row.answer for row in read_votes(labelling.path)] == ["first"]
    for number in range(1, 30):
        vote(server, number, "second")
    assert get_state(server)["pair"] is None
    assert vote(server, None, "undo")[1]["pair"] == 29


def test_reload_and_restart_show_the_same_pair(server, labelling):
    vote(server, 0, "skip")
    before = get_state(server)
    assert get_state(server) == before and before["sides"] == ["a1", "b1"]
    with serving(Labelling(ListedPairs(some_pairs(30)), labelling.path)) as restarted:
        assert get_state(restarted) == before


def test_state_holds_texts_as_they_are(tmp_path):
    """A dialogue comes as its messages, any other prompt as one text."""
    dialogue = "\n\nHuman: Hi!\n\nAssistant: Yes?\n\nHuman: <b>Why?</b>\n\nAssistant:"
    messages = '[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "é"}]'
    prompts = ["\n\nplain </script>", dialogue, messages]
    pairs = [Pair(i, prompt, EVIL, "b\n\x00") for i, prompt in enumerate(prompts)]
    labelling = Labelling(ListedPairs(pairs), tmp_path / "votes.csv")
    with serving(labelling) as server:
        _, headers, _ = request(server, "GET", f"/{server.token}/state")
        assert headers["Content-Type"] == "application/json; charset=utf-8"
        shown = get_state(server)
        assert shown["sides"] == [EVIL, "b\n\x00"]
        assert shown["prompt"] == [{"role": "prompt", "content": "plain </script>"}]
        roles = [[turn["role"] for turn in vote(server, i, "tie")[1]["prompt"]] for i in (0, 1)]
    assert roles == [["user", "assistant", "user"], ["system", "user"]]


# ---- how it ends ----


def test_vote_that_cannot_be_written_ends_the_program(labelling, monkeypatch, capsys):
    """With the error on the page, and no vote counted."""

    def full(path, vote):
        raise InputError("votes.csv cannot be written")

    monkeypatch.setattr("data.label_votes.append_vote", full)
    made = []

    class Noted(LabelServer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(label_web, "LabelServer", Noted)
    answers = []

    def person():
        while not made:
            time.sleep(0.01)
        path = f"/{made[0].token}/answer"
        answers.append(request(made[0], "POST", path, '{"pair": 0, "answer": "first"}'))

    thread = threading.Thread(target=person)
    thread.start()
    with pytest.raises(InputError, match="votes.csv cannot be written"):
        label_web.annotate(labelling)
    thread.join()
    assert answers[0][0] == 500 and json.loads(answers[0][2]) == {
        "error": "votes.csv cannot be written"
    }
    assert labelling.votes == [] and made[0].address() in capsys.readouterr().out


def test_port_that_is_taken_is_a_user_error(labelling):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} cannot be used .*; give another one"):
            label_web.annotate(labelling, port)


# ---- the page ----


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--headless", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Window:
    """The page in a window of a browser, and what it asks for."""

    def __init__(self, context, address):
        self.page = context.new_page()
        self.asked = []
        self.trouble = []  # dialogs, errors, messages of the console
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.goto(address)
        self.wait(r"\d+ of 30")

    def wait(self, progress):
        """Until the page shows it."""
        self.page.locator("#progress", has_text=re.compile(f"^{progress}")).wait_for(timeout=5000)
        self.page.wait_for_timeout(350)  # it takes no vote sooner

    def texts(self):
        return [self.page.locator(place).inner_text() for place in ("#prompt", "#first", "#second")]


@pytest.mark.slow
def test_thirty_votes_in_a_browser(browser, tmp_path):
    """With keys and buttons, a double-click, a key that is held down, undo, a reload in the middle,
    and a second window. What a model has written stays text."""
    pairs = [Pair(0, "p0", EVIL, "b0"), *some_pairs(30)[1:]]
    labelling = Labelling(ListedPairs(pairs), tmp_path / "votes.csv")
    with serving(labelling) as server, browser.new_context() as context:
        window = Window(context, server.address())
        page = window.page
        assert window.texts() == ["Prompt\np0", EVIL, "b0"]
        assert page.locator("#sides script, #sides img").count() == 0
        page.keyboard.press("Control+1")
        page.keyboard.press("F5")
        window.wait("0 of 30")

        page.get_by_role("button", name="Second").dblclick()
        window.wait("1 of 30")
        page.keyboard.down("1")
        for _ in range(5):
            page.keyboard.down("1")  # what the keyboard repeats
            page.wait_for_timeout(100)
        page.keyboard.up("1")
        window.wait("2 of 30")
        page.keyboard.press("u")
        window.wait("1 of 30")
        page.get_by_role("button", name="Both bad").click()
        window.wait("2 of 30")
        page.reload()
        window.wait("2 of 30")
        assert window.texts() == ["Prompt\np2", "a2", "b2"]

        other = Window(context, server.address().replace("127.0.0.1", "localhost"))
        other.page.keyboard.press("t")
        other.wait("3 of 30")
        page.keyboard.press("2")  # still on pair 2, which has a vote
        window.wait("3 of 30")
        assert window.texts() == ["Prompt\np3", "a3", "b3"] and len(labelling.votes) == 3

        keys = "12tbs" * 6
        for number, key in enumerate(keys[3:], start=4):
            page.keyboard.press(key)
            window.wait(f"{number} of 30")
        assert "All done: 30 answered, 11 of them with a choice" in page.inner_text("#notice")
        page.keyboard.press("1")
        page.keyboard.press("u")
        window.wait("29 of 30")
        assert window.texts() == ["Prompt\np29", "a29", "b29"]
        other.page.evaluate("dispatchEvent(new Event('focus'))")
        other.wait("29 of 30")
        assert window.trouble == other.trouble == []
        asked = {url.replace("localhost", "127.0.0.1") for url in window.asked + other.asked}
        assert asked == {server.address() + path for path in ("", "state", "answer")}
    answers = [vote.answer for vote in read_votes(tmp_path / "votes.csv")]
    expected = ["second", "both bad"] + [label_terminal.KEYS[key] for key in keys[2:29]]
    assert answers == expected


@pytest.mark.slow
def test_other_site_in_the_same_browser_cannot_vote(browser, labelling):
    """A page of another origin does not know the token, and is refused if it does."""
    body = json.dumps({"pair": 0, "answer": "first"})
    script = """async ([address, body]) => {
        await fetch(address, {method: "POST", mode: "no-cors", body}).catch(() => {});
    }"""
    with serving(labelling) as server, serving(labelling) as elsewhere:
        with browser.new_context() as context:
            page = context.new_page()
            for start in ("about:blank", elsewhere.address() + "nowhere"):
                page.goto(start)
                for token in ("", server.token + "/"):
                    address = f"http://127.0.0.1:{server.server_port}/{token}answer"
                    page.evaluate(script, [address, body])
            assert labelling.votes == []


@pytest.mark.slow
def test_page_in_a_browser_says_that_the_program_has_ended(browser, labelling):
    with browser.new_context() as context:
        with serving(labelling) as server:
            window = Window(context, server.address())
        window.page.keyboard.press("1")
        window.page.get_by_text("The program does not answer. Start it again").wait_for()
        assert labelling.votes == []
