"""Labelling on a page in the browser, served on this computer only.

The server listens on the loopback address. Other users of this computer, and web sites that are
open in the same browser, can reach that too, so the page's address holds a random token, and every
request without it is refused. So is one that another site sends (Origin), or that reached this
server under another site's name (Host: DNS rebinding). The page may load nothing from elsewhere
(Content-Security-Policy).

    GET  /TOKEN/        the page, data/label.html
    GET  /TOKEN/state   what it shows, as JSON: `state`
    POST /TOKEN/answer  {"pair": the number of the pair on the page, "answer": of ANSWERS or "undo"}

An answer is followed by the new state. An answer from a page that shows another pair than the
present one does not count: the pair was voted on in another window, or the key was pressed twice.
"""

import contextlib
import hmac
import json
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data.formats import parse_dialogue
from data.label_votes import Labelling
from rlhf.run.errors import InputError
from rlhf.run.heldout import ANSWERS
from rlhf.run.messages import read_prompt

PAGE = Path(__file__).with_name("label.html")
LONGEST_BODY = 200  # bytes
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def annotate(labelling: Labelling, port: int = 0) -> None:
    """Serve the page until Ctrl-C.

    Raises InputError if the port is not free, or if a vote could not be written.
    """
    try:
        server = LabelServer(labelling, port)
    except OSError as error:
        raise InputError(f"--port {port} cannot be used ({error}); give another one") from None
    with server:
        print(f"open {server.address()}\nCtrl-C here ends it; every vote is saved", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        with server.lock:  # a vote that is being written
            print()
    if server.error:
        raise server.error


def state(labelling: Labelling) -> dict:
    """What the page shows. pair: None if there is nothing left to vote on."""
    pair = labelling.pair
    shown = {
        "pair": None,
        "progress": labelling.progress(),
        "done": len(labelling.votes),
        "left": labelling.left(),
        "summary": labelling.summary(),
    }
    if pair:
        prompt = read_prompt(pair.prompt)
        if isinstance(prompt, str):
            prompt = parse_dialogue(prompt)
        if isinstance(prompt, str):
            prompt = [{"role": "prompt", "content": prompt.strip()}]
        shown |= {"pair": pair.number, "prompt": prompt, "sides": [pair.first, pair.second]}
    return shown


class LabelServer(ThreadingHTTPServer):
    """A thread for each request, since a browser may open a connection and send nothing."""

    def __init__(self, labelling: Labelling, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.labelling = labelling
        self.lock = threading.Lock()  # one request at a time reads or changes the votes
        self.token = secrets.token_urlsafe(24)
        self.error: InputError | None = None  # what ended the server

    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def hosts(self) -> tuple[str, ...]:
        """The names under which the page may be asked for."""
        return (f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}")

    def vote(self, number: int | None, answer: str) -> dict:
        """Vote on the pair with this number, if it is the present one. Returns the state."""
        with self.lock:
            labelling = self.labelling
            present = labelling.pair.number if labelling.pair else None
            if number == present and (labelling.pair or answer == "undo"):
                labelling.answer(answer)
            return state(labelling)

    def stop(self, error: InputError) -> None:
        self.error = error
        self.shutdown()

    def handle_error(self, request, client_address) -> None:
        """A browser that hangs up is no error; any other one prints its traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: LabelServer
    timeout = 60  # seconds without a byte

    def do_GET(self) -> None:
        path = self.path_after_token()
        if path == "":
            self.send_page()
        elif path == "state":
            with self.server.lock:
                shown = state(self.server.labelling)
            self.send_json(HTTPStatus.OK, shown)
        elif path is not None:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        path = self.path_after_token()
        if path is None:
            return
        if path != "answer":
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            number, answer = self.read_vote()
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        try:
            shown = self.server.vote(number, answer)
            self.send_json(HTTPStatus.OK, shown)
        except InputError as error:
            self.send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})
            self.server.stop(error)

    # ---- what comes in ----

    def path_after_token(self) -> str | None:
        """The path below /TOKEN/. None if the request is refused, which is then answered."""
        hosts = self.server.hosts()
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin", f"http://{host}")
        token, slash, path = self.path.removeprefix("/").partition("/")
        same = hmac.compare_digest(token.encode(), self.server.token.encode())
        if host in hosts and origin == f"http://{host}" and same and slash:
            return path
        self.send_error(HTTPStatus.FORBIDDEN, "open the address that the program has printed")
        return None

    def read_vote(self) -> tuple[int | None, str]:
        """The pair's number and the answer. Raises ValueError if the body is something else."""
        length = int(self.headers.get("Content-Length", ""))
        if not 0 <= length <= LONGEST_BODY:
            raise ValueError("the body is too long")
        vote = json.loads(self.rfile.read(length))
        if not isinstance(vote, dict) or vote.keys() != {"pair", "answer"}:
            raise ValueError("expected pair and answer")
        if vote["answer"] not in (*ANSWERS, "undo"):
            raise ValueError("unknown answer")
        return vote["pair"], vote["answer"]

    # ---- what goes out ----

    def send_page(self) -> None:
        """The page, whose script and style run by a number that is used once."""
        nonce = secrets.token_urlsafe(16)
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        policy = POLICY.format(nonce=nonce)
        self.send_body(HTTPStatus.OK, "text/html", page, {"Content-Security-Policy": policy})

    def send_json(self, status: HTTPStatus, value: dict) -> None:
        self.send_body(status, "application/json", json.dumps(value), {})

    def send_body(self, status: HTTPStatus, kind: str, text: str, headers: dict[str, str]) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing: the address would show the token."""
