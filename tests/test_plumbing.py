"""Flags, devices, checkpoints, optimizer steps, progress."""

import csv
import io
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf.cli import arg, parse_cli, run
from rlhf.common import (
    InputError, Progress, autocast, check_finite, check_tokenizer, digests, load_checkpoint, load_resumable,
    make_generator, make_scaler, pick_amp, pick_device, save_checkpoint, read_csv, write_csv,
)
from rlhf.model import GPT, GPTConfig
from rlhf.optim import cosine_schedule, linear_schedule, make_optimizer, optimizer_step


@dataclass(frozen=True)
class Config:
    """A config."""

    lr: float = arg(0.5, "the rate")
    steps: int = arg(9, "the steps")
    resume: bool = arg(False, "go on")
    amp: str = arg("off", "precision", ("off", "bf16"))
    block_size: int = arg(8, "context")
    files: tuple[str, ...] = arg(("a", "b"), "some files")

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("--steps must be at least 1")


class FakeTokenizer:
    name, fingerprint = "own", "abc"


INPUTS = {"demonstrations": "123"}


# ---- flags ----


def test_flags_become_a_config():
    assert parse_cli(Config, []) == Config()
    got = parse_cli(Config, ["--lr", "1e-3", "--resume", "--amp", "bf16", "--block-size", "4"])
    assert got == Config(lr=1e-3, resume=True, amp="bf16", block_size=4)
    assert parse_cli(Config, ["--files", "c", "d", "--lr", "0.5", "--files", "e"]) == Config(files=("c", "d", "e"))


@pytest.mark.parametrize(
    "argv",
    [["--stepz", "3"], ["--steps", "many"], ["--steps", "0"], ["--amp", "fp8"], ["--step", "3"], ["--lr", "nan"]],
)
def test_impossible_flags_exit_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_cli(Config, argv)
    assert exit.value.code == 2
    assert argv[0].strip("-")[:4] in capsys.readouterr().err


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_cli(Config, ["--help"])
    shown = capsys.readouterr().out
    assert "the rate (default: 0.5)" in shown and "--no-resume" in shown
    assert "some files (default: a b)" in " ".join(shown.split())


# ---- devices and seeds ----


def test_device_and_amp(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="no CUDA GPU"):
        pick_device("cuda")
    assert pick_amp("auto", torch.device("cpu")) is None and pick_amp("off", torch.device("cpu")) is None
    assert pick_amp("bf16", torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"
    for has_bf16, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        assert pick_amp("auto", torch.device("cuda")) == expected


def test_autocast_casts_matrix_products():
    x = torch.randn(4, 4)
    for amp, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with autocast(torch.device("cpu"), amp):
            assert (x @ x).dtype == expected


def test_generators_follow_from_their_key():
    def draw(*key):
        return torch.rand(4, generator=make_generator("cpu", *key)).tolist()

    assert draw(0, "rollout", 3) == draw(0, "rollout", 3)
    draws = [draw(0, "rollout", 3), draw(1, "rollout", 3), draw(0, "update", 3), draw(0, "rollout", 4)]
    assert len({tuple(x) for x in draws}) == 4


# ---- optimizer ----


def test_schedules_by_hand():
    """Cosine over 12 steps with 2 of warm-up: 1/2, 1, 1, ..., half-way (step 7) 0.55, and 0.1 at the end. Linear:
    1/2, 1, then 10/10, 9/10, ... 1/10 in the last step."""
    assert [cosine_schedule(s, 12, 2) for s in (0, 1, 2)] == [0.5, 1, 1]
    assert cosine_schedule(7, 12, 2) == pytest.approx(0.55) and cosine_schedule(12, 12, 2) == pytest.approx(0.1)
    assert [linear_schedule(s, 12, 2) for s in (0, 1, 2, 3, 11)] == pytest.approx([0.5, 1, 1, 0.9, 0.1])
    assert [linear_schedule(s, 4, 0) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [linear_schedule(s, 2, 2) for s in range(2)] == [cosine_schedule(s, 2, 2) for s in range(2)] == [0.5, 1]


def test_decay_is_on_matrices_alone():
    optimizer = make_optimizer(GPT(GPTConfig(11, 8, 1, 2, 8)), lr=0.1, weight_decay=0.3)
    for group, (decay, dims) in zip(optimizer.param_groups, ((0.3, {2}), (0.0, {1}))):
        assert group["weight_decay"] == decay and {p.dim() for p in group["params"]} == dims


@pytest.mark.parametrize("amp", [None, torch.float16])
def test_step_clips_the_true_gradient(amp):
    """Loss 3 w0 + 4 w1 at (1, 1) is 7; gradient (3, 4) of norm 5, clipped to norm 1: (0.6, 0.8); descent with rate 1
    takes that away. In float16 the scaler multiplies the loss by 65536 and the clipping must not see that."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = make_scaler(torch.device("cpu"), amp)
    assert scaler.is_enabled() == (amp is torch.float16)
    model.weight.grad = torch.full((1, 2), 1e6)  # left over from an earlier step: must be forgotten
    losses = [model(torch.tensor([3.0, 0.0])).sum(), model(torch.tensor([0.0, 4.0])).sum()]  # their gradients add
    loss, norm = optimizer_step(losses, model, optimizer, scaler, max_grad_norm=1.0)
    assert norm.item() == pytest.approx(5.0, rel=1e-5) and loss.item() == 7
    assert_close(model.weight.data, torch.tensor([[0.4, 0.2]]), atol=1e-5, rtol=0)


def test_float16_step_with_an_infinite_gradient_is_skipped():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = make_scaler(torch.device("cpu"), torch.float16)
    optimizer_step([model(torch.tensor([math.inf])).sum()], model, optimizer, scaler, 1.0)
    assert model.weight.item() == before and scaler.get_scale() < 65536


# ---- checkpoints ----


@pytest.fixture
def saved(tmp_path):
    gpt = GPT(GPTConfig(11, 8, 1, 2, 8))
    optimizer = make_optimizer(gpt, 0.1, 0.0)
    scaler = make_scaler(torch.device("cpu"), None)
    optimizer_step([gpt(torch.tensor([[1, 2]])).sum()], gpt, optimizer, scaler, 1.0)
    path = tmp_path / "sft.pt"
    save_checkpoint(path, "sft", gpt, Config(), 7, FakeTokenizer, optimizer, scaler, INPUTS)
    return path, gpt, optimizer


def test_checkpoint_round_trip(saved):
    path, gpt, optimizer = saved
    checkpoint = load_checkpoint(path, "sft", unfinished=True)
    other = GPT(GPTConfig(**checkpoint["model_config"]))
    other.load_state_dict(checkpoint["model"])
    tokens = torch.tensor([[3, 1, 4]])
    assert torch.equal(gpt(tokens), other(tokens)) and checkpoint["step"] == 7
    resumed = make_optimizer(other, 0.1, 0.0)
    resumed.load_state_dict(checkpoint["optimizer"])
    assert_close(resumed.state_dict()["state"], optimizer.state_dict()["state"], atol=0, rtol=0)
    assert not path.with_name("sft.pt.tmp").exists()


def test_wrong_checkpoints(saved, tmp_path):
    path, *_ = saved
    with pytest.raises(InputError, match="written by train_sft.py; a checkpoint of train_reward.py is needed"):
        load_checkpoint(path, "reward")

    class Other:
        fingerprint = "xyz"

    with pytest.raises(InputError, match="another tokenizer"):
        check_tokenizer(path, load_checkpoint(path, "sft", unfinished=True), Other)
    with pytest.raises(InputError, match="stopped at step 7 of 9: finish it with `python train_sft.py --resume`"):
        load_checkpoint(path, "sft")
    with pytest.raises(InputError, match="run `python train_ppo.py` first"):
        load_checkpoint(tmp_path / "ppo.pt", "ppo")
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="is not a checkpoint of this project"):
        load_checkpoint(path, "sft")
    for content in ({"model": 1}, {"kind": "sft", "format": 1}):
        torch.save(content, path)
        with pytest.raises(InputError, match="is not a checkpoint of this project"):
            load_checkpoint(path, "sft")


def test_a_checkpoint_with_a_flipped_byte_is_refused(saved):
    """In the middle of a weight, where torch reads it as another number."""
    path, gpt, _ = saved
    content = bytearray(path.read_bytes())
    content[content.index(gpt.wte.weight.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["kind"] == "sft"
    with pytest.raises(InputError, match="is damaged, in .*: run `python train_sft.py` again"):
        load_checkpoint(path, "sft", unfinished=True)


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    path, gpt, optimizer = saved
    before = path.read_bytes()

    def broken(checkpoint, to):
        to.write_bytes(b"half")
        raise OSError("disk full")

    def full(checkpoint, to):
        to.write_bytes(b"half")
        raise RuntimeError("unexpected pos 57792 vs 57744\n(a page of C++)")

    scaler = make_scaler(torch.device("cpu"), None)
    for save, error in ((broken, OSError), (full, InputError)):
        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(error) as raised:
            save_checkpoint(path, "sft", gpt, Config(), 8, FakeTokenizer, optimizer, scaler, INPUTS)
        assert path.read_bytes() == before
    assert "cannot be written" in str(raised.value) and "C++" not in str(raised.value)
    assert not path.with_name("sft.pt.tmp").exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [(InputError("one\n  two"), "error: one two"), (OSError("no room"), "error: no room"),
     (MemoryError(), "error: not enough memory"), (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "give a smaller --micro-batch-size")])
def test_what_the_user_can_mend_is_one_line(monkeypatch, capsys, error, line):
    def main(cfg):
        raise error

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(SystemExit) as stop:
        run(main, Config)
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and line in shown and shown.count("\n") == 1


def test_faults_of_ours_keep_their_traceback(monkeypatch):
    def main(cfg):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("sys.argv", ["script.py"])
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(main, Config)


def test_a_letter_that_the_terminal_lacks_is_replaced(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.argv", ["script.py"])
    monkeypatch.setattr("sys.stdout", out)
    run(lambda cfg: print("caf\u00e9"), Config)
    out.flush()
    assert out.buffer.getvalue() == b"caf?\n"


def test_a_closed_standard_input_has_ended(monkeypatch):
    """`script.py <&-` leaves None in sys.stdin."""
    read = []
    monkeypatch.setattr("sys.argv", ["script.py"])
    monkeypatch.setattr("sys.stdin", None)
    run(lambda cfg: read.append(sys.stdin.readline()), Config)
    assert read == [""]


def test_resume_refuses_another_run(saved):
    path, *_ = saved
    assert load_resumable(path, "sft", Config(resume=True), FakeTokenizer, INPUTS)["step"] == 7
    with pytest.raises(InputError, match="trained with --lr 0.5, not 0.1"):
        load_resumable(path, "sft", Config(lr=0.1), FakeTokenizer, INPUTS)
    with pytest.raises(InputError, match="begun with another demonstrations file"):
        load_resumable(path, "sft", Config(), FakeTokenizer, {"demonstrations": "456"})
    with pytest.raises(InputError, match="nothing to go on from; drop --resume"):
        load_resumable(path.with_name("other.pt"), "sft", Config(), FakeTokenizer, INPUTS)


def test_digests_follow_the_contents(tmp_path):
    """SHA-256 of the three bytes "abc", from FIPS 180-2, appendix B.1."""
    (tmp_path / "x").write_bytes(b"abc")
    assert digests(x=tmp_path / "x")["x"].startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_a_run(value):
    gpt = GPT(GPTConfig(11, 8, 1, 2, 8))
    check_finite(gpt, 3)
    gpt.wte.weight.data[2, 1] = value
    with pytest.raises(InputError, match="after step 3: the run has diverged"):
        check_finite(gpt, 3)


# ---- progress ----


def test_progress_writes_what_it_prints_and_resumes(tmp_path, capsys):
    path = tmp_path / "x.csv"
    first = Progress(path, steps=4, start=0, csv_only=("lr",))
    for step in (1, 2, 3):
        first.tokens += 100
        first.log(step, loss=step / 8, valid=None, lr=0.5)
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert [name.strip() for name in header.split("|")] == ["step", "loss", "valid", "tokens/s", "left"]
    assert [cell.strip() for cell in line.split("|")][:3] == ["1/4", "0.125", ""] and len(line) == len(header)
    again = Progress(path, steps=4, start=2)  # the checkpoint was of step 2: row 3 will be made again
    again.log(3, loss=9.0, valid=1.0, lr=0.5)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    got = [(row["step"], row["loss"], row["valid"]) for row in rows]
    assert got == [("1", "0.125", ""), ("2", "0.25", ""), ("3", "9", "1")]


def test_progress_counts_the_seconds_before(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("step,loss,tokens_per_s,seconds\n1,0.5,9,100\n2,0.4,9,200\n3,0.3,9,300\n")
    again = Progress(path, steps=4, start=2)
    again.log(3, loss=0.3)
    assert 200 <= again.rows[-1]["seconds"] < 260


@pytest.mark.parametrize("text", ["step,loss,seconds\none,0.5,100\n", "loss,seconds\n0.5,100\n", "step\n1\n"])
def test_progress_refuses_the_record_of_something_else(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match="not the record of this run"):
        Progress(path, steps=4, start=2)
    assert path.read_text() == text


def test_progress_refuses_a_record_with_other_columns(tmp_path):
    path, text = tmp_path / "x.csv", "step,loss,tokens_per_s,seconds\n1,0.5,9,100\n"
    path.write_text(text)
    with pytest.raises(InputError, match="other columns than this run writes"):
        Progress(path, steps=4, start=1).log(2, loss=0.3, valid=0.4)
    assert path.read_text() == text


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", 'a "b", c'])
def test_csv_cells_come_back_as_they_were(tmp_path, text):
    write_csv(tmp_path / "table.csv", [{"Prompt": text, "Response": "after"}, {"Prompt": "plain", "Response": text}])
    frame = read_csv(tmp_path / "table.csv", ("Prompt", "Response"))
    assert frame.values.tolist() == [[text, "after"], ["plain", text]]
