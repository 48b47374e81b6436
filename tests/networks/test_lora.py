"""LoRA: the adapter's arithmetic, what is trained, and the three scripts with it."""

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from rlhf.model import GPT, GPTConfig, PolicyWithValue
from rlhf.networks.lora import ALPHA, LoRALinear, add_adapters
from rlhf.run.checkpoints import merged
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import frozen_copy, load_policy, load_reward_model, with_adapters
from rlhf.run.training import Training
from rlhf.sampling import generate
from tests.helpers import TINY, lora, noisy, rows, save_gpt2, stopped_by_its_first_checkpoint

TOKENS = torch.randint(11, (3, 10), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([10, 10, 10])


def generator():
    return torch.Generator().manual_seed(5)


def adapted(gpt, rank=2):
    """The GPT with adapters that change its output: B is no longer zero."""
    return with_other_b(add_adapters(gpt, rank, generator()).double())


def with_other_b(gpt):
    for name, parameter in gpt.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3, generator=generator())
    return gpt


@pytest.fixture
def layer():
    """W = [[1, 2], [0, 1], [3, 0]], b = (0, 1, 0); rank 1, A = [1, -1], B = (1, 0, 1/2)."""
    layer = LoRALinear(nn.Linear(2, 3), 1, generator()).double()
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1, 2], [0, 1], [3, 0]]))
        layer.linear.bias.copy_(torch.tensor([0, 1, 0]))
        layer.A.copy_(torch.tensor([[1, -1]]))
        layer.B.copy_(torch.tensor([[1], [0], [float(Fraction(1, 2))]]))
    return layer


def test_lora_linear_matches_hand_computation(layer):
    """x = (2, 5): W x + b = (12, 6, 6); A x = -3; B A x = (-3, 0, -3/2); scale 16.

    The sum is (12 - 48, 6, 6 - 24) = (-36, 6, -18).
    """
    x = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    assert ALPHA == 16
    assert layer(x).tolist() == [[-36, 6, -18]]
    assert layer.linear(x).tolist() == [[12, 6, 6]]


def test_merged_layer_matches_hand_computation(layer):
    """It is W + 16 B A, with B A = [[1, -1], [0, 0], [1/2, -1/2]]. The bias does not change, and
    neither does a weight without an adapter."""
    state = {f"c_fc.{name}": tensor for name, tensor in layer.state_dict().items()}
    plain = merged({**state, "other.weight": torch.ones(2)})
    assert {name: tensor.tolist() for name, tensor in plain.items()} == {
        "c_fc.weight": [[17, -14], [0, 1], [11, -8]],
        "c_fc.bias": [0, 1, 0],
        "other.weight": [1, 1],
    }


def test_merged_layer_uses_scale_16_over_rank():
    """W = [[1]], A = (1, 2)^T, B = (3, 5), rank 2: B A = 13 and 1 + 16/2 * 13 = 105."""
    layer = LoRALinear(nn.Linear(1, 1), 2, generator())
    with torch.no_grad():
        layer.linear.weight.fill_(1)
        layer.A.copy_(torch.tensor([[1], [2]]))
        layer.B.copy_(torch.tensor([[3, 5]]))
    plain = merged({f"c_fc.{name}": tensor for name, tensor in layer.state_dict().items()})
    assert plain["c_fc.weight"].tolist() == [[105]]


def test_adapter_on_a_base_in_bfloat16_computes_in_float32():
    """W = -16, A = 1 + 1/1024, which bfloat16 rounds to 1, B = 1, scale 16: the sum is 16 / 1024.
    The output is in bfloat16, and the gradients of A and B in float32."""
    layer = LoRALinear(nn.Linear(1, 1, bias=False, dtype=torch.bfloat16), 1, generator())
    with torch.no_grad():
        layer.linear.weight.fill_(-16)
        layer.A.fill_(1 + 1 / 1024)
        layer.B.fill_(1)
    y = layer(torch.ones(1, 1, dtype=torch.bfloat16))
    assert (y.dtype, y.item()) == (torch.bfloat16, 1 / 64)
    y.sum().backward()
    assert (layer.A.grad.dtype, layer.A.grad.item()) == (torch.float32, 16)
    assert layer.B.grad.item() == 16 + 1 / 64


def test_lora_scale_is_alpha_over_rank():
    assert [LoRALinear(nn.Linear(4, 4), rank, generator()).scale.item() for rank in (1, 2, 8)] == [
        16,
        8,
        2,
    ]


def test_new_adapters_leave_logits_unchanged(gpt):
    before = gpt(TOKENS)
    assert torch.equal(add_adapters(gpt, 3, generator()).double()(TOKENS), before)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_merged_state_makes_plain_gpt_with_same_logits(gpt, rank):
    """The merged state has a plain GPT's names and loads into one."""
    plain = GPT(gpt.config).double()
    expected = adapted(gpt, rank)(TOKENS)
    plain.load_state_dict(merged(gpt.state_dict()))
    assert_close(plain(TOKENS), expected, atol=1e-12, rtol=0)
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())


def test_merged_with_prefix_leaves_out_other_networks(gpt, reward_model):
    """Of a policy with a value network of its own, prefix "gpt." takes the policy's weights
    only."""
    plain = GPT(gpt.config).double()
    expected = adapted(gpt)(TOKENS)
    policy = PolicyWithValue(gpt, adapted(reward_model.gpt))
    plain.load_state_dict(merged(policy.state_dict(), prefix="gpt."))
    assert_close(plain(TOKENS), expected, atol=1e-12, rtol=0)


def test_only_adapters_get_gradients(gpt):
    """Each block has four linear layers, C -> 3C, C -> C, C -> 4C and 4C -> C. With two blocks, C =
    8 and rank 2 that makes 2 * 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8)) = 512 numbers."""
    adapted(gpt)(TOKENS).square().mean().backward()
    trained = {name for name, p in gpt.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert all(name.endswith((".A", ".B")) for name in trained)
    assert sum(p.numel() for p in gpt.parameters() if p.requires_grad) == 512


def test_frozen_copy_equals_original_network(gpt):
    """The reference of PPO: it gives the same logits as before the adapters, bit for bit, also when
    it samples with a cache, while the adapters of the other network change."""
    before = gpt(TOKENS)
    prompts, lens = TOKENS[:, :3], torch.tensor([3, 3, 3])
    sampled = generate(gpt, prompts, lens, 6, 10, generator())
    trained = with_adapters(gpt, lora(2), generator())
    frozen = frozen_copy(trained)
    changed = with_other_b(trained.double())(TOKENS)
    reference = frozen.double()
    assert not torch.allclose(changed, before)
    assert torch.equal(reference(TOKENS), before)
    assert all(map(torch.equal, generate(reference, prompts, lens, 6, 10, generator()), sampled))
    assert torch.equal(gpt(TOKENS), changed)
    assert not generate(gpt, prompts, lens, 6, 10, generator())[0].equal(sampled[0])


@pytest.mark.parametrize("rank", [0, 2])
def test_frozen_copy_shares_what_is_not_trained(gpt, rank):
    """With adapters these are the weights under them. Without, everything is trained, and
    everything is a copy."""
    trained = with_adapters(gpt, lora(rank), generator())
    frozen = frozen_copy(trained)
    assert trained is gpt and not any(p.requires_grad for p in frozen.parameters())
    copies = dict(frozen.named_parameters())
    assert copies.keys() == dict(gpt.named_parameters()).keys()
    for name, parameter in gpt.named_parameters():
        assert torch.equal(copies[name], parameter)
        assert parameter.requires_grad == (rank == 0 or name.endswith((".A", ".B"))), name
        assert (copies[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), (
            name
        )


# ---- the scripts ----

SCRIPTS = {
    "sft": (train_sft, train_sft.SFTConfig),
    "reward": (train_reward, train_reward.RewardConfig),
    "ppo": (train_ppo, train_ppo.PPOConfig),
}


def train(name, *flags):
    """Run a script in this process, with --lora-rank 2 unless the flags give another rank."""
    module, config = SCRIPTS[name]
    tiny = "--steps" + TINY[name].split("--steps")[1]  # without the sizes, which come with --init
    module.main(
        parse_cli(config, ["--device", "cpu", *tiny.split(), "--lora-rank", "2", *map(str, flags)])
    )


def saved(path):
    return torch.load(path, weights_only=True)


class Outputs(NamedTuple):
    """Of a network with its adapters, at the end of its training."""

    logits: Tensor
    scores: Tensor | None


@pytest.fixture(scope="module")
def lora_runs(trained, tmp_path_factory):
    """Reward model and policy trained as adapters on the sft.pt of `trained`; outputs: {script:
    Outputs}."""
    data, out, _ = trained
    folder, outputs = tmp_path_factory.mktemp("lora"), {}
    (folder / "sft.pt").write_bytes((out / "sft.pt").read_bytes())
    save = Training.save

    @torch.no_grad()
    def save_and_keep_outputs(run, step, **state):
        save(run, step, **state)
        assert any(isinstance(module, LoRALinear) for module in run.model.modules())
        scores = run.model(TOKENS, LENGTHS) if run.cfg.kind == "reward" else None
        outputs[run.cfg.kind] = Outputs(run.model.gpt(TOKENS), scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "save", save_and_keep_outputs)
        for name in ("reward", "ppo"):
            train(name, "--data", data, "--out", folder)
    return SimpleNamespace(data=data, folder=folder, outputs=outputs)


def test_scripts_with_lora_train_adapters_and_heads_only(lora_runs):
    """The facts of the first step hold. The base weights are those of sft.pt, and the loaded
    networks have learned."""
    folder = lora_runs.folder
    assert float(rows(folder / "reward.csv")[0]["loss"]) == pytest.approx(0.693147, abs=1e-5)
    ppo = rows(folder / "ppo.csv")
    assert abs(float(ppo[0]["kl_ref"])) < 1e-5 and all(
        float(row["first_log_ratio"]) < 1e-5 for row in ppo
    )
    base = saved(folder / "sft.pt")["model"]
    for name in ("reward", "ppo"):
        state = saved(folder / f"{name}.pt")["model"]
        for key, tensor in base.items():
            layer, _, last = key.rpartition(".")
            key = f"{layer}.linear.{last}" if ".c_" in layer else key
            assert torch.equal(state[f"gpt.{key}"], tensor), (name, key)
    (sft, _), (policy, _) = (load_policy(folder / f"{name}.pt", name) for name in ("sft", "ppo"))
    assert policy.state_dict().keys() == sft.state_dict().keys()
    assert not torch.equal(policy.blocks[0].attn.c_attn.weight, sft.blocks[0].attn.c_attn.weight)
    assert torch.equal(policy.wte.weight, sft.wte.weight)
    model, _ = load_reward_model(folder / "reward.pt")
    assert model(TOKENS, LENGTHS).std() > 0


@torch.no_grad()
def test_finished_lora_checkpoint_is_self_contained(lora_runs, tmp_path):
    """Without sft.pt, ppo.pt and reward.pt give the logits and scores of the networks with their
    adapters. Those are not the logits of sft.pt."""
    sft, elsewhere = lora_runs.folder / "sft.pt", tmp_path / "moved.pt"
    sft.rename(elsewhere)
    try:
        policy, _ = load_policy(lora_runs.folder / "ppo.pt", "ppo")
        model, _ = load_reward_model(lora_runs.folder / "reward.pt")
    finally:
        elsewhere.rename(sft)
    ppo, reward = lora_runs.outputs["ppo"], lora_runs.outputs["reward"]
    assert_close(policy(TOKENS), ppo.logits, atol=1e-5, rtol=0)
    assert_close(model.gpt(TOKENS), reward.logits, atol=1e-5, rtol=0)
    assert_close(model(TOKENS, LENGTHS), reward.scores, atol=1e-5, rtol=0)
    reference, _ = load_policy(sft, "sft")
    for outputs in (ppo, reward):
        assert (outputs.logits - reference(TOKENS)).abs().max() > 1e-3


def test_loaded_lora_weights_are_base_plus_scaled_product(lora_runs):
    """Rank 2: each loaded matrix is W + 16/2 * B A of the file's W, B and A, and each bias is the
    file's."""
    policy, _ = load_policy(lora_runs.folder / "ppo.pt", "ppo")
    model, _ = load_reward_model(lora_runs.folder / "reward.pt")
    for name, gpt in (("ppo", policy), ("reward", model.gpt)):
        state = saved(lora_runs.folder / f"{name}.pt")["model"]
        for block in ("blocks.0", "blocks.1"):
            for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                W, b, A, B = (
                    state[f"gpt.{block}.{layer}.{key}"]
                    for key in ("linear.weight", "linear.bias", "A", "B")
                )
                assert B.any()
                loaded = gpt.get_submodule(f"{block}.{layer}")
                assert_close(loaded.weight.detach(), W + 8 * (B @ A), atol=1e-6, rtol=0)
                assert torch.equal(loaded.bias, b)


@pytest.fixture(scope="module")
def unfinished(lora_runs, tmp_path_factory):
    """{script: its folder}: runs like those of lora_runs, and one of train_sft.py, stopped after
    their first save."""
    folders = {name: tmp_path_factory.mktemp(f"unfinished_{name}") for name in SCRIPTS}
    save_gpt2(
        load_policy(lora_runs.folder / "sft.pt", "sft")[0],
        folders["sft"] / "base",
        eos_id=798,
    )
    models = {
        "sft": ["--init", folders["sft"] / "base"],
        "reward": ["--sft", lora_runs.folder / "sft.pt"],
        "ppo": ["--sft", lora_runs.folder / "sft.pt", "--reward", lora_runs.folder / "reward.pt"],
    }

    for name, folder in folders.items():
        with stopped_by_its_first_checkpoint():
            train(name, "--data", lora_runs.data, "--out", folder, *models[name])
    return folders


ADAPTERS = [
    f"blocks.{block}.{layer}.{matrix}"
    for block in (0, 1)
    for matrix in "AB"
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
TRAINED = {
    "sft": set(ADAPTERS),
    "reward": {*(f"gpt.{name}" for name in ADAPTERS), "head.weight", "head.bias"},
    "ppo": {
        *(f"{gpt}.{name}" for gpt in ("gpt", "value_gpt") for name in ADAPTERS),
        "value_head.weight",
        "value_head.bias",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_unfinished_lora_checkpoint_holds_the_optimizers_state_of_adapters_and_heads(
    unfinished, name
):
    checkpoint = saved(unfinished[name] / f"{name}.pt")
    assert 0 < checkpoint["step"] < checkpoint["config"]["steps"]
    assert checkpoint["model"].keys() > TRAINED[name]
    assert len(checkpoint["optimizer"]["state"]) == len(TRAINED[name]) and "scaler" in checkpoint


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_finished_lora_checkpoint_holds_all_weights_and_no_optimizer_state(lora_runs, name):
    """The parameters that were trained, the embeddings, and W, b and scale of each adapted
    layer."""
    checkpoint = saved(lora_runs.folder / f"{name}.pt")
    layer = "gpt.blocks.0.mlp.c_fc"
    assert checkpoint["model"].keys() > TRAINED[name] | {
        "gpt.wte.weight",
        "gpt.wpe.weight",
        f"{layer}.linear.weight",
        f"{layer}.linear.bias",
        f"{layer}.scale",
    }
    assert checkpoint["model"][f"{layer}.scale"] == 8
    assert not {"optimizer", "scaler"} & checkpoint.keys()


@pytest.mark.slow
def test_resumed_lora_run_equals_uninterrupted_run(lora_runs, unfinished, tmp_path):
    for name in ("ppo.pt", "ppo.csv"):
        (tmp_path / name).write_bytes((unfinished["ppo"] / name).read_bytes())
    train(
        "ppo",
        "--data",
        lora_runs.data,
        "--out",
        tmp_path,
        "--sft",
        lora_runs.folder / "sft.pt",
        "--reward",
        lora_runs.folder / "reward.pt",
        "--resume",
    )
    whole, resumed = (saved(folder / "ppo.pt")["model"] for folder in (lora_runs.folder, tmp_path))
    assert whole.keys() == resumed.keys() and all(
        torch.equal(whole[key], resumed[key]) for key in whole
    )


@pytest.mark.slow
def test_fine_tuning_with_init_starts_from_its_weights(trained, tmp_path):
    """With and without adapters, the first held-out loss is that of the given weights and not ln V.
    The folder is needed for training only: a changed one does not change the checkpoint, but a run
    cannot resume with it."""
    data, out, _ = trained
    gpt, _ = load_policy(out / "sft.pt", "sft")
    base = tmp_path / "base"
    save_gpt2(gpt, base, eos_id=798)
    flags = {
        name: [
            "--data",
            data,
            "--out",
            tmp_path / name,
            "--init",
            base,
            "--lr",
            "1e-4",
            "--lora-rank",
            rank,
        ]
        for name, rank in (("full", 0), ("adapters", 2))
    }
    for name in flags:
        train("sft", *flags[name])
        first = next(row for row in rows(tmp_path / name / "sft.csv") if row["valid"])
        assert float(first["valid"]) == pytest.approx(
            float(rows(out / "sft.csv")[-1]["valid"]), abs=0.02
        )
        assert float(first["valid"]) < math.log(800) - 0.04
    full, adapters = (
        load_policy(tmp_path / name / "sft.pt", "sft")[0] for name in ("full", "adapters")
    )
    assert torch.equal(adapters.wte.weight, gpt.wte.weight) and not torch.equal(
        full.wte.weight, gpt.wte.weight
    )
    assert not torch.equal(adapters.blocks[0].mlp.c_fc.weight, gpt.blocks[0].mlp.c_fc.weight)

    save_gpt2(noisy(gpt), base, eos_id=798)
    again, _ = load_policy(tmp_path / "adapters" / "sft.pt", "sft")
    assert torch.equal(again(TOKENS), adapters(TOKENS))
    with pytest.raises(InputError, match="begun with another init pytorch_model.bin file"):
        train("sft", *flags["adapters"], "--resume")
    save_gpt2(GPT(GPTConfig(vocab_size=19, block_size=80, n_layer=1, n_head=1, n_embd=4)), base, 18)
    with pytest.raises(InputError, match="knows 19 tokens and the tokenizer 800"):
        train("sft", *flags["adapters"])


def test_fine_tuning_with_init_reads_what_transformers_writes(trained, tmp_path):
    """With adapters. From model.safetensors it becomes the checkpoint that it becomes from
    pytorch_model.bin, bit for bit."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    data, out, _ = trained
    gpt, _ = load_policy(out / "sft.pt", "sft")
    save_gpt2(gpt, tmp_path / "bin", eos_id=798)
    original = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "bin")
    original.save_pretrained(tmp_path / "safetensors")
    for name in ("bin", "safetensors"):
        train("sft", "--data", data, "--out", tmp_path / name, "--init", tmp_path / name)
    expected = saved(tmp_path / "bin" / "sft.pt")["model"]
    weights = saved(tmp_path / "safetensors" / "sft.pt")["model"]
    assert weights.keys() == expected.keys() > TRAINED["sft"]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_full_training_from_lora_sft_trains_every_weight(trained, tmp_path):
    """Fine-tuning with adapters, then reward model and PPO without: every weight is trained and
    saved."""
    data, out, _ = trained
    save_gpt2(load_policy(out / "sft.pt", "sft")[0], tmp_path / "base", eos_id=798)
    train("sft", "--data", data, "--out", tmp_path, "--init", tmp_path / "base")
    sft, _ = load_policy(tmp_path / "sft.pt", "sft")
    assert all(p.requires_grad for p in sft.parameters())
    for name in ("reward", "ppo"):
        train(name, "--data", data, "--out", tmp_path, "--lora-rank", 0)
        state = saved(tmp_path / f"{name}.pt")["model"]
        for key, tensor in sft.state_dict().items():
            if (name, key) != (
                "reward",
                "ln_f.bias",
            ):  # it moves all scores alike, and only differences are learned
                assert not torch.equal(state[f"gpt.{key}"], tensor), (name, key)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-rank", "4"], "--lora-rank needs --init"),
        (["--template", "none"], "--template needs --init"),
        (["--system", "Be kind."], "--system needs --init"),
        (["--base-dtype", "bfloat16"], "--base-dtype needs --init"),
        (["--init", "gpt2", "--load-in-4bit"], "--load-in-4bit needs --lora-rank to train"),
        (["--init", "gpt2", "--n-layer", "12"], "come with --init"),
    ],
)
def test_sft_config_rejects_flags_that_do_not_fit_init(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_cli(train_sft.SFTConfig, flags)
    assert message in capsys.readouterr().err
