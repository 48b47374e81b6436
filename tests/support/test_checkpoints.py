"""Checkpoints: what they hold, how a run resumes from one, and which files are rejected."""

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf.extras.alternatives import PolicyWithoutValue
from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from rlhf.support import checkpoints
from rlhf.support.checkpoints import (
    begin,
    check_input,
    check_tokenizer,
    digests,
    load_checkpoint,
    load_policy,
    load_reward_model,
    load_weights,
    merged,
    save,
    trained_state,
)
from rlhf.support.cli import InputError
from rlhf.support.runtime import make_optimizer, optimizer_step, setup
from rlhf.support.tables import Progress
from tests.helpers import Digits, f64, noisy

SHAPE = GPTConfig(11, 8, 1, 2, 8)
INPUTS = {"demonstrations": "123"}
TOKENS = torch.tensor([[3, 1, 4]])
NEW = {"step": 0, "metrics": []}


@dataclass(frozen=True)
class Config:
    lr: float = 0.5
    steps: int = 9
    resume: bool = False
    overwrite: bool = False
    out: str = "runs"


def step(gpt, optimizer, scaler):
    """One optimizer step on a loss that depends on all weights."""
    optimizer.zero_grad()
    scaler.scale(gpt(TOKENS).square().mean()).backward()
    optimizer_step(gpt, optimizer, scaler, 1.0)


@pytest.fixture(params=["off"])
def run(request, tmp_path):
    """A GPT after one optimizer step, and `save` for this run: run.save(step number)."""
    torch.manual_seed(0)
    gpt = GPT(SHAPE)
    made = SimpleNamespace(path=tmp_path / "sft.pt", gpt=gpt, optimizer=make_optimizer(gpt, 0.1, 0.0),
                           scaler=setup("cpu", request.param)[2])
    step(gpt, made.optimizer, made.scaler)

    def save_run(number, **state):
        progress = Progress(tmp_path / "sft.csv", 9, NEW, ())
        progress.rows.append({"step": number, "loss": 0.5, "seconds": 7.0})
        save(made.path, "sft", gpt, Config(), number, Digits(), made.optimizer, made.scaler, INPUTS, progress, **state)
        return made.path

    made.save = save_run
    return made


def save_finished(path, kind, model, config=None, tokenizer=None):
    progress = SimpleNamespace(rows=[], saved=lambda: None)
    save(path, kind, model, config or Config(), 9, tokenizer or Digits(), None, None, INPUTS, progress)
    return path


# ---- what a checkpoint holds ----


def test_checkpoint_holds_weights_and_what_the_run_was_made_from(run):
    checkpoint = load_checkpoint(run.save(7, kl_coef=0.25), "sft", unfinished=True)
    gpt = GPT(GPTConfig(**checkpoint["model_config"]))
    gpt.load_state_dict(checkpoint["model"])
    assert torch.equal(gpt(TOKENS), run.gpt(TOKENS))
    assert (checkpoint["step"], checkpoint["kl_coef"]) == (7, 0.25) and checkpoint["inputs"] == INPUTS
    assert checkpoint["config"] == {"lr": 0.5, "steps": 9, "resume": False, "overwrite": False, "out": "runs"}
    assert (checkpoint["tokenizer"], checkpoint["tokenizer_name"]) == ("abc", "digits")
    assert checkpoint["metrics"] == [{"step": 7, "loss": 0.5, "seconds": 7.0}]
    assert sorted(file.name for file in run.path.parent.iterdir()) == ["sft.csv", "sft.pt"]


def test_unfinished_checkpoint_holds_optimizer_and_scaler_state(run):
    checkpoint = torch.load(run.save(8), weights_only=True)
    assert_close(checkpoint["optimizer"]["state"], run.optimizer.state_dict()["state"], atol=0, rtol=0)
    assert len(checkpoint["optimizer"]["state"]) > 0 and checkpoint["scaler"] == run.scaler.state_dict()


def test_finished_checkpoint_holds_no_optimizer_state(run):
    run.save(8)
    unfinished = run.path.stat().st_size
    checkpoint = torch.load(run.save(9), weights_only=True)
    assert not checkpoint.keys() & {"optimizer", "scaler"}
    assert run.path.stat().st_size < unfinished / 2  # AdamW keeps two numbers for each weight


def test_unfinished_checkpoint_holds_only_trained_parameters(run):
    run.gpt.wte.requires_grad_(False)
    assert torch.load(run.save(8), weights_only=True)["model"].keys() == dict(
        run.gpt.named_parameters()).keys() - {"wte.weight"}


def test_finished_checkpoint_holds_the_whole_state_dict(run):
    run.gpt.wte.requires_grad_(False)
    assert_close(torch.load(run.save(9), weights_only=True)["model"], dict(run.gpt.state_dict()), atol=0, rtol=0)


def test_digests_follow_from_the_contents(tmp_path):
    """SHA-256 of the three bytes "abc", from FIPS 180-2, appendix B.1."""
    (tmp_path / "x").write_bytes(b"abc")
    assert digests(x=tmp_path / "x")["x"].startswith("ba7816bf8f01cfea414140de5dae2223")


def test_failed_save_leaves_the_old_checkpoint_and_the_metrics_that_belong_to_it(run, monkeypatch):
    before = run.save(7).read_bytes(), run.path.with_suffix(".csv").read_bytes()

    def write_half(content, file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 57792 vs 57744")  # what torch makes of a full disk

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(InputError, match="sft.pt cannot be written"):
        run.save(8)
    assert (run.path.read_bytes(), run.path.with_suffix(".csv").read_bytes()) == before
    assert len(list(run.path.parent.iterdir())) == 2


# ---- begin ----


def start(run, config=None, tokenizer=None, inputs=INPUTS, path=None):
    """What `begin` returns to a run of these settings."""
    optimizer, scaler = make_optimizer(run.gpt, 0.1, 0.0), setup("cpu", "off")[2]
    return begin(path or run.path, config or Config(resume=True), tokenizer or Digits(), inputs, run.gpt, optimizer,
                 scaler)


def test_begin_of_a_new_run_is_at_step_0(run):
    assert start(run, Config()) == {"step": 0, "metrics": [], "replaced": []}


@pytest.mark.parametrize("name", ["sft.pt", "sft.csv"])
def test_begin_refuses_to_replace_another_run(run, name):
    """The checkpoint or the metrics are there."""
    (run.path.parent / name).write_text("old")
    with pytest.raises(InputError, match=f"{name} is of another run; give --resume .*, --overwrite .* another --out"):
        start(run, Config())


def test_begin_with_overwrite_names_what_goes_when_the_run_is_first_saved(run):
    """Not the checkpoint, which is renamed over the old one."""
    folder = run.path.parent
    for name in ("ppo.pt", "ppo.csv", "optimality.csv", "sft.csv"):
        (folder / name).write_text("old")
    begun = start(run, Config(overwrite=True), path=folder / "ppo.pt")
    assert begun == {"step": 0, "metrics": [], "replaced": [folder / "ppo.csv", folder / "optimality.csv"]}


def test_begin_without_the_old_checkpoint_replaces_what_it_left(run):
    (run.path.parent / "sft.csv").write_text("old")
    assert start(run, Config(overwrite=True))["replaced"] == [run.path.parent / "sft.csv"]


# ---- resume ----


@pytest.mark.parametrize("run", ["off", "fp16"], indirect=True)
def test_resume_continues_as_the_uninterrupted_run(run):
    """Two more steps from the checkpoint give the weights and the loss scale of two more steps without it."""
    half = run.scaler.is_enabled()
    if half:
        run.scaler.update(128.0)  # another scale than that of a new scaler
    path, gpt = run.save(7), GPT(SHAPE)
    optimizer, scaler = make_optimizer(gpt, 0.1, 0.0), setup("cpu", "fp16" if half else "off")[2]
    checkpoint = begin(path, Config(resume=True), Digits(), INPUTS, gpt, optimizer, scaler)
    assert checkpoint["step"] == 7 and len(checkpoint["metrics"]) == 1 and scaler.get_scale() == run.scaler.get_scale()
    for _ in range(2):
        step(run.gpt, run.optimizer, run.scaler)
        step(gpt, optimizer, scaler)
    assert_close(dict(gpt.state_dict()), dict(run.gpt.state_dict()), atol=0, rtol=0)


def test_resume_of_a_finished_run_loads_the_weights(run):
    gpt = GPT(SHAPE)
    optimizer, scaler = make_optimizer(gpt, 0.1, 0.0), setup("cpu", "off")[2]
    checkpoint = begin(run.save(9), Config(resume=True), Digits(), INPUTS, gpt, optimizer, scaler)
    assert checkpoint["step"] == 9 and torch.equal(gpt(TOKENS), run.gpt(TOKENS))


def test_resume_allows_settings_that_change_no_training_step(run):
    run.save(7)
    assert start(run, Config(resume=True, out="elsewhere"))["step"] == 7


def test_resume_rejects_another_setting(run):
    run.save(7)
    with pytest.raises(InputError, match=r"begun with another lr \(0.5, now 0.1\)"):
        start(run, Config(resume=True, lr=0.1))


@pytest.mark.parametrize("inputs", [{"demonstrations": "456"}, {}, {**INPUTS, "weights": "789"}])
def test_resume_rejects_another_input_file(run, inputs):
    run.save(7)
    with pytest.raises(InputError, match="begun with another (demonstrations|weights) file"):
        start(run, inputs=inputs)


def test_resume_rejects_another_tokenizer(run):
    run.save(7)
    with pytest.raises(InputError, match="another tokenizer"):
        start(run, tokenizer=SimpleNamespace(fingerprint="xyz"))


def test_resume_rejects_missing_checkpoint(run):
    with pytest.raises(InputError, match="nothing to resume from; drop --resume"):
        start(run)


def test_resume_rejects_the_checkpoint_of_another_script(run):
    """The name of the file says whose it should be."""
    other = run.save(7).rename(run.path.with_name("reward.pt"))
    with pytest.raises(InputError, match="written by train_sft.py; a checkpoint of train_reward.py is needed"):
        start(run, path=other)


BROKEN = {
    "missing": (lambda state: state.pop("wte.weight"), 'Missing key.*"wte.weight"'),
    "unknown": (lambda state: state.update(extra=torch.zeros(1)), 'Unexpected key.*"extra"'),
    "of another shape": (lambda state: state.update({"ln_f.bias": torch.zeros(9)}), "size mismatch for ln_f.bias"),
    "NaN": (lambda state: state["ln_f.bias"].fill_(torch.nan), "the weight ln_f.bias is NaN or infinite"),
    "infinite": (lambda state: state["ln_f.bias"].fill_(torch.inf), "the weight ln_f.bias is NaN or infinite"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_load_weights_names_the_file_and_what_does_not_fit(resume, name):
    state = {name: tensor.clone() for name, tensor in GPT(SHAPE).state_dict().items()}
    load_weights(Path("x.pt"), GPT(SHAPE), state, resume=resume)
    change, message = BROKEN[name]
    change(state)
    with pytest.raises(InputError, match=f"(?s)x.pt.*{message}.*train it again"):
        load_weights(Path("x.pt"), GPT(SHAPE), state, resume=resume)


@pytest.mark.parametrize("change", [{"c.B": None}, {"c.A": f64([1, 2, 3])}])
def test_load_weights_rejects_adapters_that_fit_no_layer(change):
    """B is missing, or A is of another width than B."""
    state = {"c.A": f64([1, -1]), "c.B": f64([2], [0]), "c.scale": torch.tensor(0.5), "c.linear.bias": f64(5, 6),
             "c.linear.weight": f64([1, 2], [3, 4])}
    state = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
    with pytest.raises(InputError, match="x.pt does not fit its own settings"):
        load_weights(Path("x.pt"), GPT(SHAPE), state)


def test_load_weights_to_resume_needs_only_the_trained_parameters():
    gpt = GPT(SHAPE)
    gpt.wte.requires_grad_(False)
    load_weights(Path("x.pt"), gpt, trained_state(gpt), resume=True)
    assert "wte.weight" not in trained_state(gpt)
    with pytest.raises(InputError, match="wte.weight"):
        load_weights(Path("x.pt"), gpt, trained_state(gpt))


# ---- load for use ----


def test_load_checkpoint_rejects_another_scripts_checkpoint(run):
    with pytest.raises(InputError, match="written by train_sft.py; a checkpoint of train_reward.py is needed"):
        load_checkpoint(run.save(9), "reward")


def test_load_checkpoint_takes_one_of_several_kinds(run):
    assert load_checkpoint(run.save(9), "ppo", "sft")["kind"] == "sft"


def test_load_checkpoint_rejects_an_unfinished_one(run):
    with pytest.raises(InputError, match="stopped at step 7 of 9: finish it with `python train_sft.py --resume`"):
        load_checkpoint(run.save(7), "sft")


def test_load_checkpoint_rejects_missing_file(tmp_path):
    with pytest.raises(InputError, match="run `python train_ppo.py` first"):
        load_checkpoint(tmp_path / "ppo.pt", "ppo")


def test_load_checkpoint_rejects_a_file_that_is_cut_short(run):
    run.path.write_bytes(run.save(9).read_bytes()[:500])
    with pytest.raises(InputError, match="is not a checkpoint of this project"):
        load_checkpoint(run.path, "sft")


@pytest.mark.parametrize("content", [{"model": 1}, {"kind": "sft"}, {"kind": "sft", "format": checkpoints.FORMAT}, [1]])
def test_load_checkpoint_rejects_a_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "sft.pt")
    with pytest.raises(InputError, match="is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "sft.pt", "sft")


def test_load_checkpoint_rejects_another_format(run):
    content = torch.load(run.save(9), weights_only=True)
    torch.save({**content, "format": 1}, run.path)
    with pytest.raises(InputError, match="run train_sft.py again .*of format 1, this code reads 3"):
        load_checkpoint(run.path, "sft")


def test_load_checkpoint_rejects_a_flipped_bit(run):
    """In the middle of a weight, which torch reads as another number."""
    content = bytearray(run.save(9).read_bytes())
    content[content.index(run.gpt.wte.weight.detach().numpy().tobytes()) + 5] ^= 1
    run.path.write_bytes(content)
    assert torch.load(run.path, weights_only=True)["kind"] == "sft"
    with pytest.raises(InputError, match="run train_sft.py again .*damaged in"):
        load_checkpoint(run.path, "sft")


def test_load_checkpoint_rejects_sizes_that_make_no_network_and_weights_that_are_none(run):
    content = torch.load(run.save(9), weights_only=True)
    broken = [{"model_config": {**content["model_config"], **sizes}}
              for sizes in ({"n_head": 3}, {"n_embd": 0}, {"width": 8})]
    for change in (*broken, {"model": "weights"}, {"model": {"wte.weight": [1.0]}}):
        torch.save({**content, **change}, run.path)
        with pytest.raises(InputError, match="is not a checkpoint of this project"):
            load_checkpoint(run.path, "sft")


def test_load_policy_rejects_weights_of_another_config(run):
    content = torch.load(run.save(9), weights_only=True)
    torch.save({**content, "model_config": {**content["model_config"], "n_layer": 2}}, run.path)
    with pytest.raises(InputError, match="sft.pt does not fit its own settings"):
        load_policy(run.path, "sft")


def test_check_input_rejects_another_file_than_the_checkpoint_was_made_from(run, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abd")
    checkpoint = {"inputs": digests(sft=tmp_path / "a")}
    check_input(run.path, checkpoint, "sft", tmp_path / "a")
    with pytest.raises(InputError, match="sft.pt was made from another sft file than .*b"):
        check_input(run.path, checkpoint, "sft", tmp_path / "b")


def test_merged_folds_an_adapter_into_its_matrix():
    """W = 1 2 | 3 4, B A = 2 -2 | 0 0, scale 1/2: W + scale * B A = 2 1 | 3 4. The names of other networks are left
    out."""
    state = {"gpt.fc.linear.weight": f64([1, 2], [3, 4]), "gpt.fc.linear.bias": f64(5, 6), "gpt.fc.A": f64([1, -1]),
             "gpt.fc.B": f64([2], [0]), "gpt.fc.scale": torch.tensor(0.5), "gpt.ln.weight": f64(7), "head": f64(8)}
    before = copy.deepcopy(state)
    got = merged(state, prefix="gpt.")
    assert got.keys() == {"fc.weight", "fc.bias", "ln.weight"}
    assert_close(got["fc.weight"], f64([2, 1], [3, 4]))
    assert torch.equal(got["fc.bias"], f64(5, 6)) and torch.equal(got["ln.weight"], f64(7))
    assert_close(state, before, atol=0, rtol=0)


def test_load_policy_of_sft_is_the_gpt(tmp_path):
    gpt = noisy(GPT(SHAPE))
    got, checkpoint = load_policy(save_finished(tmp_path / "sft.pt", "sft", gpt), "sft", "ppo")
    assert torch.equal(got(TOKENS), gpt(TOKENS)) and checkpoint["kind"] == "sft"


def test_load_policy_of_ppo_is_the_policy_at_its_temperature(tmp_path):
    """The value network is left out. A policy trained at temperature 1/2 has twice the logits."""

    @dataclass(frozen=True)
    class PPOConfig(Config):
        temperature: float = 0.5

    policy = noisy(PolicyWithValue(GPT(SHAPE), GPT(SHAPE)))
    got, _ = load_policy(save_finished(tmp_path / "ppo.pt", "ppo", policy, PPOConfig()), "ppo")
    assert_close(got(TOKENS), 2 * policy.gpt(TOKENS))


def test_load_policy_takes_dpo_wherever_it_takes_ppo(tmp_path):
    policy = PolicyWithoutValue(noisy(GPT(SHAPE)))
    path = save_finished(tmp_path / "dpo.pt", "dpo", policy)
    got, checkpoint = load_policy(path, "sft", "ppo")
    assert torch.equal(got(TOKENS), policy.gpt(TOKENS)) and checkpoint["kind"] == "dpo"
    with pytest.raises(InputError, match="rlhf.tools.train_dpo; a checkpoint of train_sft.py is needed here"):
        load_policy(path, "sft")


def test_load_reward_model_has_head_shift_and_scale(tmp_path):
    model = noisy(RewardModel(GPT(SHAPE)))
    model.mean.fill_(2.0)
    model.scale.fill_(4.0)
    got, _ = load_reward_model(save_finished(tmp_path / "reward.pt", "reward", model))
    lengths = torch.tensor([3])
    assert torch.equal(got(TOKENS, lengths), model(TOKENS, lengths))


def test_check_tokenizer_rejects_another_tokenizer(run):
    checkpoint = load_checkpoint(run.save(9), "sft")
    check_tokenizer(run.path, checkpoint, Digits())
    with pytest.raises(InputError, match="another tokenizer"):
        check_tokenizer(run.path, checkpoint, SimpleNamespace(fingerprint="xyz"))
