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

import train_ppo
from rlhf.advantages import gae
from rlhf.extras import parallel
from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from rlhf.rollout import Frozen
from tests.helpers import ROOT, Digits, noisy, rows, script, stopped_by_its_first_checkpoint, tiny

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LONGER = {"sft": ["--steps", 10, "--lr", 1e-2], "reward": ["--steps", 10],  # enough for the weights to move
          "ppo": ["--steps", 10, "--lr", 3e-3, "--missing-eos-score", 1, "--max-kl-old", 1]}


def torchrun(processes, *command, ok=True):
    """Run a script on so many processes with one thread each, as a user does."""
    done = subprocess.run([*TORCHRUN, str(processes), *map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert (done.returncode == 0) is ok, done.stderr
    return done


# ---- each function ----


@pytest.mark.parametrize("world", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_share_gives_each_row_to_one_process(monkeypatch, world, size):
    monkeypatch.setattr(parallel, "WORLD", world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(parallel, "RANK", rank)
        parts.append(parallel.share(list(range(size))))
    assert sum(parts, []) == list(range(size))  # in order, so that `gather` only has to join them
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_has_nothing_to_do(gpt):
    """The same objects come back, so the bits of a run on one process are those of the code without this file."""
    x, rows = torch.rand(3, 4), [1, 2, 3]
    assert parallel.gather(x) is x and parallel.share(rows) == rows
    assert parallel.total({"a": 0.1, "b": 3}) == {"a": 0.1, "b": 3}
    assert parallel.sum_gradients(gpt, x) is x


# ---- against one process, in float64 ----


def main(cfg):
    """One PPO step of plain gradient descent on a ragged batch, in float64. Process 0 writes what came of it. The
    minibatch has 5 rows, so 2 and 3 processes have unequal shares of it."""
    def network(seed):
        return noisy(GPT(GPTConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, n_embd=8)), seed).double()

    policy, reward_model = PolicyWithValue(network(0), network(1)).double(), RewardModel(network(2)).double()
    noisy(policy.value_head), noisy(reward_model.head)
    frozen = Frozen(network(3), reward_model, Digits(eos_id=7), max_new_tokens=9, rows=3)
    prompts, lens = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]]).repeat(4, 1)[:10], torch.tensor([3, 2, 1] * 4)[:10]
    rollout = parallel.collect(policy, frozen, prompts, lens, torch.Generator().manual_seed(1))
    noise = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = rollout._replace(logprobs=rollout.logprobs + 0.3 * noise * rollout.mask)  # some ratios are clipped
    advantages, returns = gae(noise * rollout.mask, rollout.values, rollout.mask, 1.0, 0.95)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    step = train_ppo.PPOConfig(batch_size=10, minibatch_size=5, micro_batch_size=2, entropy_coef=0.1, max_kl_old=0.03)
    learned = train_ppo.update(policy, optimizer, scaler, old, advantages, returns, step, None, 0)
    if parallel.RANK == 0:
        torch.save((rollout._asdict(), policy.state_dict(), learned), cfg.out)
    lengths = set(rollout.mask.sum(dim=1).tolist())
    assert len(lengths) > 3 and 0 < learned["clip_fraction"] < 1, (lengths, learned)
    other = parallel.gather(torch.cat([p.flatten() for p in policy.parameters()])[None].detach())
    assert all(weights.equal(other[0]) for weights in other)  # bitwise the same on every process


if __name__ == "__main__":  # under torchrun
    parallel.one_of_several(main, SimpleNamespace(out=sys.argv[1], device="cpu", batch_size=10, minibatch_size=5))


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ppo_step_is_that_of_one_process_in_float64(tmp_path, processes):
    main(SimpleNamespace(out=tmp_path / "1.pt"))
    torchrun(processes, __file__, tmp_path / "n.pt")
    one, several = (torch.load(tmp_path / name, weights_only=True) for name in ("1.pt", "n.pt"))
    assert several[0]["tokens"].equal(one[0]["tokens"]) and several[0]["mask"].equal(one[0]["mask"])
    for made in one[0], several[0]:
        made["values"] = torch.where(made["mask"], made["values"], 0.0)  # what stands in a pad depends on the padding
    assert_close(several[0], one[0], atol=1e-12, rtol=0)
    assert_close(several[1], one[1], atol=1e-12, rtol=0)
    first = [x[2].pop("first_log_ratio") for x in (one, several)]  # of process 0's rows
    assert 0 < first[1] <= first[0]
    clipped = [x[2].pop("clip_fraction") for x in (one, several)]  # a mean of zeros and ones in float32
    assert clipped[1] == pytest.approx(clipped[0], abs=1e-7)
    assert several[2] == pytest.approx(one[2], abs=1e-12)
    assert one[2]["gradient_steps"] == 2  # --max-kl-old has stopped the second epoch, on the KL of all rows


# ---- the scripts ----


def compare(one, several):
    """Two CSVs: the same numbers but for the clock's, in the first row within 1e-5 and in the others within 1e-3."""
    timed = {"tokens_per_s", "seconds", "first_log_ratio", "policy", "Prompt", "Before", "After"}
    for at, (a, b) in enumerate(zip(rows(one), rows(several), strict=True)):
        tolerance = 1e-5 if at == 0 else 1e-3
        assert {k: float(v or 0) for k, v in b.items() if k not in timed} == pytest.approx(
            {k: float(v or 0) for k, v in a.items() if k not in timed}, abs=tolerance, rel=tolerance), at


@pytest.mark.parametrize(("name", "processes"), [("ppo", 2), *(
    pytest.param(name, n, marks=pytest.mark.slow) for name, n in (
        ("ppo", 4), ("sft", 2), ("reward", 4)))])
def test_script_on_several_processes_equals_one(trained, tmp_path, name, processes):
    data, out, _ = trained
    flags = ["--data", data, *LONGER[name]]
    flags += [] if name == "sft" else ["--sft", out / "sft.pt"]
    flags += ["--reward", out / "reward.pt"] if name == "ppo" else []
    script(name, *flags, "--out", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "several")  # an earlier run
    done = torchrun(processes, f"train_{name}.py", *tiny(name, *flags), "--out", tmp_path / "several", "--overwrite")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == files
    assert done.stdout.count("\nwrote ") == 1  # process 0 prints
    for file in files:
        if file.endswith(".csv"):
            compare(tmp_path / "one" / file, tmp_path / "several" / file)


# ---- faults ----


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
    """kill -9 of one process in the middle of training: the other one ends too, soon, and one line says why."""
    data, out, _ = trained
    flags = tiny("ppo", "--data", data, "--sft", out / "sft.pt", "--reward", out / "reward.pt", "--out", tmp_path)
    with subprocess.Popen([*TORCHRUN, "2", "train_ppo.py", *flags, "--steps", "100000"], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while not run.stdout.readline().strip().startswith("2/100000"):
            pass
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        began = time.monotonic()
        os.kill(next(int(child) for child in children if rank_of(child) == killed), signal.SIGKILL)
        _, printed = run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - began < 60
    assert printed.count("error: another process of this run has ended; see what it printed. --resume") == 1, printed


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "value", "message"), [
    ("--batch-size", 1, "error: --batch-size 1: each of the 2 processes needs a row"),
    ("--lr", 0, "error: --lr is 0.0: it must be above 0"),
    ("--data", "nowhere", "error: --data nowhere: there is no such folder here")])
def test_user_error_is_printed_once(tmp_path, flag, value, message):
    done = torchrun(2, "train_sft.py", "--device", "cpu", flag, value, "--out", tmp_path, ok=False)
    assert done.stderr.count(message) == done.stderr.count("error: ") == 1, done.stderr
    assert not list(tmp_path.glob("*.pt"))
