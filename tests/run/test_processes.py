"""Several processes do what one does: the three scripts under torchrun, on the CPU with gloo."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import gae
from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from rlhf.ppo import make_experience, update
from rlhf.rollout import Frozen, collect
from rlhf.run import processes
from rlhf.run.device import make_generator, setup
from rlhf.run.errors import InputError
from tests.helpers import ROOT, Digits, noisy, rows, script, stopped_by_its_first_checkpoint, tiny
from train_ppo import PPOConfig

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LONGER = {
    "sft": ["--steps", 10, "--lr", 1e-2],
    "reward": ["--steps", 10],  # enough for the weights to move
    "ppo": ["--steps", 10, "--lr", 3e-3, "--missing-eos-score", 1],
}


def torchrun(count, *command, ok=True):
    """Run a script on so many processes with one thread each, as a user does."""
    done = subprocess.run(
        [*TORCHRUN, str(count), *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode == 0) is ok, done.stderr
    return done


# ---- each function ----


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_share_gives_each_row_to_one_process(monkeypatch, world, size):
    monkeypatch.setattr(processes, "WORLD", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(processes, "RANK", rank)
        parts.append(processes.share(list(range(size))))
    assert sum(parts, []) == list(range(size))  # in order, so that `gather` only has to join them
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_has_nothing_to_do(gpt):
    """The same objects come back, so the bits of a run on one process are those of the code without
    this file."""
    x = torch.rand(3, 4)
    assert processes.gather(x) is x and processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.total(torch.tensor([0.1, 3])).equal(torch.tensor([0.1, 3]))
    assert processes.total(torch.tensor(0.5)) == 0.5
    gpt(torch.tensor([[1, 2, 3]])).sum().backward()
    before = [parameter.grad.clone() for parameter in gpt.parameters()]
    processes.sum_gradients(gpt)
    assert all(p.grad.equal(old) for p, old in zip(gpt.parameters(), before))
    assert processes.is_first()


def test_total_sums_each_number_over_processes(monkeypatch):
    """The other process has three times the numbers of this one."""
    monkeypatch.setattr(processes, "WORLD", 2)
    monkeypatch.setattr(processes, "gather", lambda mine: torch.cat([mine, 3 * mine]))
    assert processes.total(torch.tensor([0.25, 3])).equal(torch.tensor([1.0, 12]))
    assert processes.total(torch.tensor(0.5)) == 2.0


@pytest.mark.parametrize("name", ["batch_size", "minibatch_size"])
def test_batch_with_fewer_rows_than_processes_is_refused(monkeypatch, name):
    monkeypatch.setattr(processes, "WORLD", 3)
    processes.check_batch_sizes(SimpleNamespace(**{name: 3}))
    flag = "--" + name.replace("_", "-")
    with pytest.raises(InputError, match=f"{flag} 2: each of the 3 processes needs a row"):
        processes.check_batch_sizes(SimpleNamespace(**{name: 2}))


# ---- against one process, in float64 ----


def network(seed):
    gpt = GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=8))
    return noisy(gpt, seed).double()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def main(cfg):
    """One PPO step of plain gradient descent on a ragged batch, in float64. Process 0 writes what
    came of it. The minibatch has 5 rows, so 2 and 3 processes have unequal shares of it."""
    policy = PolicyWithValue(network(0), network(1)).double()
    reward_model = RewardModel(network(2)).double()
    noisy(policy.value_head)
    noisy(reward_model.head)
    frozen = Frozen(network(3), reward_model, Digits(eos_id=7), max_new_tokens=9, rows=3)
    prompts = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]).repeat(4, 1)[:10]
    prompt_lens = torch.tensor([3, 2, 1] * 4)[:10]
    rollout = collect(policy, frozen, prompts, prompt_lens, seeded(1))
    mask = rollout.mask
    noise = torch.randn(mask.shape, generator=seeded(2), dtype=torch.float64)
    advantages, returns = gae(noise * mask, rollout.values, mask, 1.0, 0.95)
    size = torch.full((10, 1), 0.3)  # some ratios are clipped
    order = torch.randperm(10, generator=make_generator("cpu", 0, "update", 0, 0))
    size[order[4]] = 1.0  # the largest, in the last process's share of the first minibatch
    old_logprobs = rollout.logprobs + size * noise * mask
    experience = make_experience(rollout._replace(logprobs=old_logprobs), advantages, returns)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    settings = PPOConfig(batch_size=10, minibatch_size=5, micro_batch_size=2, entropy_coef=0.1)
    learned = update(policy, optimizer, setup("cpu", "off"), experience, settings, step=0)
    if processes.is_first():
        torch.save((rollout._asdict(), policy.state_dict(), learned), cfg.out)
    lengths = set(mask.sum(dim=1).tolist())
    assert len(lengths) > 3 and 0 < learned["clip_fraction"] < 1, (lengths, learned)
    weights = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    of_all = processes.gather(weights[None])
    assert all(weights.equal(other) for other in of_all)  # bitwise the same on every process


if __name__ == "__main__":  # under torchrun
    sizes = {"batch_size": 10, "minibatch_size": 5}
    processes.run(main, SimpleNamespace(out=sys.argv[1], device="cpu", **sizes))


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ppo_step_is_that_of_one_process_in_float64(tmp_path, count):
    main(SimpleNamespace(out=tmp_path / "1.pt"))
    torchrun(count, __file__, tmp_path / "n.pt")
    rollout, weights, learned = torch.load(tmp_path / "1.pt", weights_only=True)
    of_several = torch.load(tmp_path / "n.pt", weights_only=True)
    assert of_several[0]["tokens"].equal(rollout["tokens"])
    assert of_several[0]["mask"].equal(rollout["mask"])
    for made in rollout, of_several[0]:  # what stands in a pad depends on the padding
        made["values"] = torch.where(made["mask"], made["values"], 0.0)
    assert_close(of_several[0], rollout, atol=1e-12, rtol=0)
    assert_close(of_several[1], weights, atol=1e-12, rtol=0)
    clip_fraction = learned.pop("clip_fraction")  # a mean of zeros and ones in float32
    assert of_several[2].pop("clip_fraction") == pytest.approx(clip_fraction, abs=1e-7)
    assert of_several[2] == pytest.approx(learned, abs=1e-12)


# ---- the scripts ----


def compare(one, several):
    """Two CSVs: the same numbers but for the clock's, in the first row within 1e-5 and in the
    others within 1e-3."""
    left_out = {"tokens_per_s", "seconds", "policy", "Prompt", "last_turn", "Before", "After"}

    def numbers(row):
        return {name: float(cell or 0) for name, cell in row.items() if name not in left_out}

    for at, (row, other) in enumerate(zip(rows(one), rows(several), strict=True)):
        tolerance = 1e-5 if at == 0 else 1e-3
        expected = pytest.approx(numbers(row), abs=tolerance, rel=tolerance)
        assert numbers(other) == expected, at


SLOW = [("ppo", 4), ("sft", 2), ("reward", 4)]


@pytest.mark.parametrize(
    ("name", "count"),
    [("ppo", 2), *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]],
)
def test_script_on_several_processes_equals_one(trained, tmp_path, name, count):
    data, out, _ = trained
    flags = ["--data", data, *LONGER[name]]
    flags += [] if name == "sft" else ["--sft", out / "sft.pt"]
    flags += ["--reward", out / "reward.pt"] if name == "ppo" else []
    one = tmp_path / "one"
    several = tmp_path / "several"
    script(name, *flags, "--out", one)
    shutil.copytree(one, several)  # an earlier run
    flags = tiny(name, *flags)
    done = torchrun(count, f"train_{name}.py", *flags, "--out", several, "--overwrite")
    files = sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in several.iterdir()) == files
    assert done.stdout.count("\nwrote ") == 1  # process 0 prints
    for file in files:
        # Rounding moves the numbers of single tokens and pairs by more than it moves means.
        if file.endswith(".csv") and file not in ("ppo_tokens.csv", "reward_margins.csv"):
            compare(one / file, several / file)


# ---- faults ----


@pytest.mark.slow
def test_run_resumes_on_another_number_of_processes(trained, tmp_path):
    """One process, stopped after step 2 of 4; two go on. As one process from beginning to end."""
    data, out, _ = trained
    flags = ["--data", data, "--sft", out / "sft.pt", "--reward", out / "reward.pt", "--out"]
    with stopped_by_its_first_checkpoint():
        script("ppo", *flags, tmp_path)
    torchrun(2, "train_ppo.py", *tiny("ppo", *flags, tmp_path, "--resume"))
    compare(out / "ppo.csv", tmp_path / "ppo.csv")


def rank_of(process):
    """RANK of a process of torchrun; None for others, or if it has ended."""
    try:
        environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(x[5:]) for x in environment if x.startswith(b"RANK=")), None)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_death_of_a_process_ends_the_run(trained, tmp_path, killed):
    """kill -9 of one process in the middle of training: the other one ends too, soon, and one line
    says why."""
    data, out, _ = trained
    models = ["--sft", out / "sft.pt", "--reward", out / "reward.pt"]
    flags = tiny("ppo", "--data", data, *models, "--out", tmp_path, "--steps", 100000)
    with subprocess.Popen(
        [*TORCHRUN, "2", "train_ppo.py", *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as run:
        lines = iter(run.stdout.readline, "")
        assert any(line.strip().startswith("2/100000") for line in lines), run.stderr.read()
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        began = time.monotonic()
        os.kill(next(int(child) for child in children if rank_of(child) == killed), signal.SIGKILL)
        _, printed = run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - began < 60
    line = "error: another process of this run has ended; see what it printed. --resume"
    assert printed.count(line) == 1, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch-size", 1, "error: --batch-size 1: each of the 2 processes needs a row"),
        ("--lr", 0, "error: --lr is 0.0: it must be above 0"),
        ("--data", "nowhere", "error: --data nowhere: there is no such folder here"),
    ],
)
def test_user_error_is_printed_once(tmp_path, flag, value, message):
    done = torchrun(2, "train_sft.py", "--device", "cpu", flag, value, "--out", tmp_path, ok=False)
    assert done.stderr.count(message) == done.stderr.count("error: ") == 1, done.stderr
    assert not list(tmp_path.glob("*.pt"))
