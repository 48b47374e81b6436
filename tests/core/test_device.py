"""A rehearsal of a run on a GPU: programs on tests/fake_device.py give the CPU's metrics, and the
host seldom waits for the device.

    python -m pytest -s tests/core/test_device.py     # prints the tables of docs/performance.md

The device is registered for a whole process, so what needs it runs in a process of its own,
`elsewhere`.
"""

import collections
import contextlib
import csv
import io
import itertools
import json
import math
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import backend_registration

import train_ppo
import train_sft
from docs.experiments import train_dpo, walk
from rlhf.data import Demonstration, pad_rows
from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from rlhf.ppo import make_experience, update
from rlhf.rollout import Frozen, collect
from rlhf.run.device import read
from rlhf.run.flags import parse_cli
from rlhf.run.optimizer import make_optimizer, optimizer_step
from rlhf.tools import optimality, sample
from tests.helpers import CPU, TINY, Digits, copy_some_rows, rows, script

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="a device written in Python needs torch 2.9 or newer",
)


@pytest.fixture(scope="module")
def elsewhere():
    """elsewhere(function, *args): what the other process returns or raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


# ---- the device itself ----


def check_device():
    from tests.fake_device import DEVICE, Generator, on_the_device

    with on_the_device():
        x = torch.arange(6.0).to(DEVICE)
        with pytest.raises(RuntimeError, match="mixes tensors"):
            x + torch.ones(6)
        with pytest.raises(RuntimeError, match="mixes tensors"):
            x[torch.tensor([0, 1])]
        with pytest.raises(RuntimeError, match="mixes tensors"):
            torch.where(torch.ones(6, dtype=torch.bool), x, 0.0)
        with pytest.raises(RuntimeError, match="generator of another device"):
            torch.rand(2, generator=Generator("cpu"), device=DEVICE)
        with pytest.raises(RuntimeError, match="generator of another device"):
            torch.rand(2, generator=Generator(DEVICE))
        drawn = torch.rand(2, generator=Generator(DEVICE).manual_seed(3), device=DEVICE)
        expected = torch.rand(2, generator=Generator("cpu").manual_seed(3))
        assert drawn.device == DEVICE and drawn.tolist() == expected.tolist()
        assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4, 6, 8, 10]  # a number may be mixed in
        view = x.view(2, 3)
        view[0] += 1
        assert x.tolist() == [1, 2, 3, 3, 4, 5]
    with on_the_device() as meter, torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.nn.functional.linear(view, view).dtype == torch.bfloat16
    assert sum(event.kernel for event in meter.events) == 3  # two casts and a product
    assert not any(event.waits for event in meter.events)


def test_device_refuses_what_a_gpu_refuses(elsewhere):
    elsewhere(check_device)


def count_waits():
    """{what is done: how often the host waits}"""
    from tests.fake_device import DEVICE, on_the_device

    with on_the_device():
        x = torch.arange(6).to(DEVICE)
    actions = {
        "arithmetic": lambda: x * 2 + x.sum(),
        "where": lambda: torch.where(x > 2, x, 0),
        "numbers as index": lambda: x[x],
        "copy to the device": lambda: torch.ones(6).to(DEVICE),
        "tensor of a list": lambda: torch.tensor([1, 2], device=DEVICE),
        "read two": lambda: read(x, x.sum()),
        "item": lambda: x.sum().item(),
        "if": lambda: bool((x > 2).any()),
        "nonzero": lambda: x.nonzero(),
        "mask as index": lambda: x[x > 2],
        "mask as index, in place": lambda: x.clone().index_put_((x > 2,), x[0]),
        "cpu": lambda: x.cpu(),
        "tolist": lambda: x.tolist(),
    }
    counts = {}
    for name, action in actions.items():
        with on_the_device() as meter:
            action()
        counts[name] = sum(event.waits for event in meter.events)
    return counts


def test_device_counts_waits(elsewhere):
    counts = elsewhere(count_waits)
    names = list(counts)
    none = names[: names.index("read two")]
    assert counts == dict.fromkeys(names, 1) | dict.fromkeys(none, 0)


def test_read_gives_the_tensors_themselves():
    """As they were, with their shapes and dtypes, NaN and infinity included."""
    numbers = torch.tensor([[0.1, math.nan], [math.inf, -2.0]])
    tensors = [numbers, numbers.bfloat16(), torch.tensor(2**40), torch.tensor([True]), numbers[:0]]
    for tensor, got in zip(tensors, read(*tensors), strict=True):
        torch.testing.assert_close(got, tensor, rtol=0, atol=0, equal_nan=True)


# ---- runs in the other process ----

# Two steps or more, metrics after some of them, and the evaluation at the end.
SHORT = {
    "sft": ["--steps", 4, "--log-every", 2, "--eval-every", 4],
    "reward": ["--log-every", 2, "--eval-every", 4],
    "ppo": ["--steps", 2, "--max-new-tokens", 5, "--eval-prompts", 4],
}
# Gradient steps after which there are no metrics, and those with metrics, numbered from 0.
PLAIN = {"sft": 2, "reward": 2, "ppo": 0}
WITH_METRICS = {"sft": 1, "reward": 1, "ppo": 3}


def same_on_both(folder, run, tolerance=0.0) -> list:
    """run(out) on the CPU and on the device: both have to write and return the same. Returns the
    device's events.

    tolerance: relative, of the numbers in tables.

    Attention takes the same steps on both. (On a CPU it is one kernel otherwise.)
    """
    from tests.fake_device import on_the_device

    with sdpa_kernel(SDPBackend.MATH):
        expected = run(folder / "cpu")
        with on_the_device() as meter:
            assert run(folder / "device") == expected
    assert meter.events
    for path in (folder / "cpu").iterdir():
        if path.suffix in (".csv", ".jsonl"):
            cells = zip(contents(folder / "device" / path.name), contents(path), strict=True)
            different = [pair for pair in cells if not same(*pair, tolerance)]
            assert not different, f"{path.name}: {different}"
    return meter.events


def same(one: str, other: str, tolerance: float) -> bool:
    if one == other or not tolerance:
        return one == other
    return float(one) == pytest.approx(float(other), rel=tolerance, abs=0.01 * tolerance)


def contents(path) -> list[str]:
    """The cells of a table, without what depends on the clock and on the folder."""
    if path.suffix == ".csv":
        table = rows(path)
    else:
        table = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    left_out = ("seconds", "tokens_per_s", "run", "checkpoint")
    return [f"{row[name]}" for row in table for name in row if name not in left_out]


def run_default(name, data, folder) -> dict[str, float]:
    """A script with its default options. How often the host waits for the device."""
    events = run_script(name, data, folder, [])
    steps = gradient_steps(events)
    tokens = sum(event.name == "searchsorted" for event in events)
    gradient_step = waits(steps[PLAIN[name]])
    with_metrics = waits(steps[WITH_METRICS[name]])
    evaluations = {"validation_loss", "margins_and_scores", "compare"}
    evaluated = waits(event for event in events if evaluations.intersection(event.functions))
    # 40 rows in batches of 16; for heldout, for the scale, and two at the end; two policies.
    batches = {"sft": 3, "reward": 4, "ppo": 2}[name]
    return {
        "sampled token": waits(events)["token"] / max(1, tokens),
        "call of generate": with_metrics["generate"],
        "batch that is scored": with_metrics["score_rows"] / 2,  # PPO has two minibatches
        "gradient step": gradient_step["besides"],
        "step besides": with_metrics["besides"] - gradient_step["besides"],
        "batch in evaluation": (evaluated.total() - evaluated["token"]) / batches,
    }


def pieces(events, places) -> list[list]:
    """The events from each place to the next."""
    return [events[start:end] for start, end in itertools.pairwise(places)]


def gradient_steps(events) -> list[list]:
    """From one update of the weights to the next. AdamW makes one call for the matrices and one for
    the vectors: the first one after the gradient's norm was taken counts."""
    places = []
    has_norm = False
    for i, event in enumerate(events):
        if event.name in ("linalg_vector_norm", "_foreach_norm"):
            has_norm = True
        elif event.name == "_fused_adamw_" and has_norm:
            places.append(i)
            has_norm = False
    return pieces(events, places)


def waits(events) -> collections.Counter:
    """How often the host waits: for a token, elsewhere in generate and score_rows, and besides."""
    return collections.Counter(place(event) for event in events if event.waits)


def place(event) -> str:
    if "fill_with_cache" in event.functions and event.name == "nonzero":
        return "token"
    for name in ("generate", "score_rows"):
        if name in event.functions:
            return name
    return "besides"


def run_script(name, data, folder, flags, tolerance=0.0) -> list:
    """A script with options, on both devices. In flags, OUT is the folder it writes to."""

    def run(out):
        forget_base_models()
        given = [str(flag).replace("OUT", str(out)) for flag in flags]
        script(name, *SHORT[name], "--data", data, "--out", out, *given)

    return same_on_both(folder, run, tolerance)


def waits_of_gradient_step(name, *args) -> int:
    """run_script; how often the host waits in a gradient step without metrics."""
    events = run_script(name, *args)
    return waits(gradient_steps(events)[PLAIN[name]]).total()


def run_program(main, config, models, folder, flags):
    """Another program, on a copy of the trained models. In flags, OUT is that copy."""

    def run(out):
        shutil.copytree(models, out)
        given = [str(flag).replace("OUT", str(out)) for flag in flags]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(parse_cli(config, given))
        # Lines of metrics, and those of a slow machine, end with what the clock says.
        lines = printed.getvalue().splitlines()
        lines = [line for line in lines if not line.endswith((" s", " left"))]
        return "\n".join(lines).replace(str(out), "OUT").replace("fake:0", "cpu")

    same_on_both(folder, run)


def forget_base_models():
    """Models of transformers are loaded once for a process; these are on the other device."""
    if "rlhf.networks.hf" in sys.modules:
        sys.modules["rlhf.networks.hf"].load_base.cache_clear()


# ---- the default runs ----

# On the device, each pass of a network with logits waits twice, for where its actions are.
LIMITS = {
    "sft": {"sampled token": 1, "gradient step": 2, "step besides": 3, "batch in evaluation": 3},
    "reward": {"gradient step": 0, "step besides": 5, "batch in evaluation": 2},
    "ppo": {
        "sampled token": 1,
        "call of generate": 2,
        "batch that is scored": 4,  # by policy and reference
        "gradient step": 2,
        "step besides": 3,
        "batch in evaluation": 7,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_some_rows(tmp_path_factory.mktemp("device") / "data")


@pytest.fixture(scope="module")
def counted(elsewhere, data, tmp_path_factory):
    """{name of a script: what run_default counts}, which it does if the device's metrics are those
    of the CPU."""
    folder = tmp_path_factory.mktemp("default")
    return {name: elsewhere(run_default, name, data, folder) for name in TINY}


@pytest.mark.parametrize("name", TINY)
def test_host_seldom_waits(counted, name):
    numbers = ", ".join(f"{count:.3g} per {what}" for what, count in counted[name].items())
    print(f"\ntrain_{name}.py, waits: {numbers}")
    for what, count in counted[name].items():
        assert count <= LIMITS[name].get(what, 0), what


# ---- kernels ----


def count_kernels(layers) -> dict[str, int]:
    """The kernels of a GPT of so many layers; in PPO with a value network as large."""
    from tests.fake_device import DEVICE, Generator, on_the_device

    def network():
        return GPT(GPTConfig(11, 16, layers, 2, 8)).to(DEVICE)

    compute = CPU._replace(device=DEVICE)
    prompts, prompt_lens = pad_rows([[1, 2], [3]] * 2, 0, torch.device("cpu"))
    demonstrations = [Demonstration([1, 2, 3, 4], prompt_len=2, given="")] * 2
    cfg = train_ppo.PPOConfig(batch_size=4, minibatch_size=1, inner_epochs=1)
    with on_the_device() as sft:
        gpt = network()
        optimizer = make_optimizer(gpt, 0.1, 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            train_sft.weighted_loss(gpt, demonstrations, demonstrations, 0, compute).backward()
            optimizer_step(gpt, optimizer, compute.scaler, 1.0)
    with on_the_device() as ppo:
        policy = PolicyWithValue(network(), network()).to(DEVICE)
        frozen = Frozen(gpt, RewardModel(network()).to(DEVICE), Digits(), 5)
        rollout = collect(
            policy, frozen, prompts.to(DEVICE), prompt_lens.to(DEVICE), Generator(DEVICE)
        )
        experience = make_experience(rollout, rollout.logprobs, rollout.values)
        update(policy, make_optimizer(policy, 0.1, 0.1), compute, experience, cfg, 0)
    tokens = [i for i, event in enumerate(ppo.events) if event.name == "searchsorted"]
    work = {
        "sampled token": pieces(ppo.events, tokens)[1],
        "gradient step of train_sft.py": gradient_steps(sft.events)[1],
        "gradient step of train_ppo.py": gradient_steps(ppo.events)[1],
    }
    return {name: sum(event.kernel for event in piece) for name, piece in work.items()}


@pytest.mark.slow
def test_print_kernels(elsewhere):
    """Each layer adds the same number. Of those of a sampled token, 9 are attention."""
    one = elsewhere(count_kernels, 1)
    two = elsewhere(count_kernels, 2)
    three = elsewhere(count_kernels, 3)
    for name in one:
        layer = two[name] - one[name]
        assert three[name] == two[name] + layer
        print(f"\n{name}: {one[name] - layer} kernels + {layer} per layer")
    assert two["sampled token"] - one["sampled token"] == 20


# ---- options and other programs ----

# {options: waits of a gradient step}. The host waits twice for each micro-batch, and once to know
# whether a gradient in float16 is finite, or which pairs a ranking has.
SFT_OPTIONS = {"--amp bf16 --micro-batch-size 4": 4, "--amp fp16": 3}
REWARD_OPTIONS = {"--amp bf16": 0, "--amp fp16": 1, "--rankings": 1}
PPO_OPTIONS = {
    "--amp bf16 --advantage rloo --group-size 2": 2,
    "--amp fp16": 3,
    "--value-network shared --micro-batch-size 3 --sample-rows 3 --max-new-tokens 4 8 "
    "--entropy-coef 0.1 --value-clip-eps 0.2": 4,
    "--advantage grpo --group-size 2 --missing-eos-score none": 2,
    "--advantage reinforce --reward MODELS/reward.pt DATA/brevity.py --reward-weights 1 0.5": 2,
    "--reward DATA/brevity.py": 2,
}
DPO = (
    "--data DATA --sft OUT/sft.pt --reward OUT/reward.pt --out OUT --steps 2 --batch-size 8 "
    "--max-new-tokens 8 --eval-prompts 10 --beta 0.5 --overwrite"
)
BREVITY = "def score(prompts, responses):\n    return [-len(response) for response in responses]\n"


@pytest.fixture(scope="module")
def more_data(data):
    """The data with rankings and a reward function."""
    lines = [["Prompt", "Response", "Rank"]]
    for row in rows(data / "comparisons.csv"):
        lines += [[row["Prompt"], row["Chosen"], 1], [row["Prompt"], row["Rejected"], 2]]
    with (data / "rankings.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)
    (data / "brevity.py").write_text(BREVITY)
    return data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "limit"),
    [
        *[("sft", options, limit) for options, limit in SFT_OPTIONS.items()],
        *[("reward", options, limit) for options, limit in REWARD_OPTIONS.items()],
        *[("ppo", options, limit) for options, limit in PPO_OPTIONS.items()],
    ],
)
def test_options_give_the_cpus_metrics(
    elsewhere, trained, more_data, tmp_path, name, options, limit
):
    models = trained[1]
    flags = options.replace("MODELS", str(models)).replace("DATA", str(more_data)).split()
    if name != "sft":
        flags += ["--sft", models / "sft.pt"]
    if name == "ppo" and "--reward" not in flags:
        flags += ["--reward", models / "reward.pt"]
    assert elsewhere(waits_of_gradient_step, name, more_data, tmp_path, flags) <= limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "config", "flags"),
    [
        (optimality.main, optimality.OptimalityConfig, "--prompts 4 --samples 4"),
        (sample.main, sample.SampleConfig, "--prompt Hi. --n 2"),
        (sample.main, sample.SampleConfig, "--prompts DATA/prompts.csv --out OUT/said.jsonl"),
        (walk.main, walk.WalkConfig, ""),
        (train_dpo.main, train_dpo.DPOConfig, DPO),
    ],
)
def test_programs_say_what_they_say_on_the_cpu(elsewhere, trained, tmp_path, main, config, flags):
    data, models, _ = trained
    if config is not train_dpo.DPOConfig:
        flags = f"--checkpoint OUT/ppo.pt --data DATA {flags}"
    flags = flags.replace("DATA", str(data)).split()
    elsewhere(run_program, main, config, models, tmp_path, flags)


@pytest.mark.slow
def test_models_of_transformers_and_adapters_give_the_cpus_metrics(elsewhere, data, tmp_path):
    """All three scripts with adapters on a frozen model, and a reward model of its own.

    Gradients are added in another order here, and AdamW makes whole steps of the rounding errors,
    so the metrics differ by up to 1 %. (With another kernel for attention, a CPU's do too.)
    """
    pytest.importorskip("transformers")
    from tests.networks.test_hf import make_model, make_tokenizer

    texts = [cell for row in rows(data / "demonstrations.csv") for cell in row.values()]
    make_model("llama", max_position_embeddings=112).save_pretrained(tmp_path / "base")
    make_tokenizer(texts).save_pretrained(tmp_path / "base")
    init = ["--init", tmp_path / "base", "--lora-rank", 2]
    its_own_size = "--n-layer 3 --n-head 4 --n-embd 64".split()  # the defaults, which say nothing
    # Each pass of a model of transformers waits once more; PPO trains two.
    for name, flags, limit in (
        ("sft", [*init, *its_own_size], 3),
        ("reward", init, 1),
        ("ppo", ["--max-new-tokens", 8], 4),
    ):
        flags += ["--lr", 1e-4]
        assert elsewhere(waits_of_gradient_step, name, data, tmp_path, flags, 0.02) <= limit
