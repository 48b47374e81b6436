"""LoRA: the adapter's arithmetic, what is trained, and the three scripts with it."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import train_ppo
import train_reward
import train_sft
from rlhf.checkpoints import load_policy, load_reward_model
from rlhf.cli import parse_cli
from rlhf.common import InputError, load_trained_state, trained_state
from rlhf.export import save_pretrained
from rlhf.lora import ALPHA, LoRALinear, WithoutAdapters, add_adapters, merge_adapters, memory_table, trained_and_frozen
from rlhf.model import GPT, PRETRAINED, GPTConfig
from rlhf.rollout import generate
from tests.conftest import TINY, noisy, rows

TOKENS = torch.randint(11, (3, 10), generator=torch.Generator().manual_seed(0))


def generator():
    return torch.Generator().manual_seed(5)


def adapted(gpt, rank=2):
    """The GPT with adapters that do something: B is no longer zero."""
    add_adapters(gpt, rank, generator()).double()
    for name, parameter in gpt.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3, generator=generator())
    return gpt


def test_adapter_by_hand():
    """W = [[1, 2], [0, 1], [3, 0]], b = (0, 1, 0); rank 1, A = [1, -1], B = (1, 0, 1/2), x = (2, 5).

    W x + b = (12, 6, 6); A x = -3; B A x = (-3, 0, -3/2); scale 16. Sum: (12 - 48, 6, 6 - 24) = (-36, 6, -18).
    """
    linear = nn.Linear(2, 3).double()
    layer = LoRALinear(linear, 1, generator()).double()
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1, 2], [0, 1], [3, 0]]))
        linear.bias.copy_(torch.tensor([0, 1, 0]))
        layer.A.copy_(torch.tensor([[1, -1]]))
        layer.B.copy_(torch.tensor([[1], [0], [float(Fraction(1, 2))]]))
    x = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    assert ALPHA == 16
    assert layer(x).tolist() == [[-36, 6, -18]]
    assert layer.merged().weight.tolist() == [[17, -14], [0, 1], [11, -8]]  # W + 16 B A
    assert linear(x).tolist() == [[-36, 6, -18]]


def test_scale_is_alpha_over_rank():
    assert [LoRALinear(nn.Linear(4, 4), rank, generator()).scale for rank in (1, 2, 8)] == [16, 8, 2]


def test_it_starts_at_the_frozen_network(gpt):
    before = gpt(TOKENS)
    assert torch.equal(add_adapters(gpt, 3, generator()).double()(TOKENS), before)


def test_merged_is_the_same_and_plain(gpt):
    names = list(gpt.state_dict())
    expected = adapted(gpt)(TOKENS)
    assert_close(merge_adapters(gpt)(TOKENS), expected, atol=1e-12, rtol=0)
    assert list(gpt.state_dict()) == names and all(p.requires_grad for p in gpt.parameters())


def test_only_adapters_get_a_gradient(gpt):
    """Four linear layers a block, C -> 3C, C -> C, C -> 4C, 4C -> C; two blocks, C = 8, rank 2:
    2 * 2 * ((8 + 24) + (8 + 8) + (8 + 32) + (32 + 8)) = 512 numbers."""
    adapted(gpt)(TOKENS).square().mean().backward()
    trained = {name for name, p in gpt.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert all(name.endswith((".A", ".B")) for name in trained)
    assert sum(p.numel() for p in gpt.parameters() if p.requires_grad) == 512


def test_the_reference_is_the_network_without_adapters(gpt):
    """Same logits as before the adapters, bit for bit, also in sampling with a cache; and they are on again after."""
    before = gpt(TOKENS)
    prompts, lens = TOKENS[:, :3], torch.tensor([3, 3, 3])
    sampled = generate(gpt, prompts, lens, 6, 10, generator())
    reference = WithoutAdapters(adapted(gpt))
    changed = gpt(TOKENS)
    assert not torch.allclose(changed, before)
    assert torch.equal(reference(TOKENS), before)
    assert all(map(torch.equal, generate(reference, prompts, lens, 6, 10, generator()), sampled))
    assert torch.equal(gpt(TOKENS), changed)
    assert not generate(gpt, prompts, lens, 6, 10, generator())[0].equal(sampled[0])


def test_adapters_are_on_again_after_an_error(gpt):
    changed = adapted(gpt)(TOKENS)
    with pytest.raises(ValueError, match="block_size"):
        WithoutAdapters(gpt).hidden(TOKENS.repeat(1, 9))
    assert torch.equal(gpt(TOKENS), changed)


def test_a_second_copy_only_without_adapters(gpt):
    trained, frozen = trained_and_frozen(gpt, 0, generator())
    assert trained is gpt and frozen.wte.weight.data_ptr() != gpt.wte.weight.data_ptr()
    assert not any(p.requires_grad for p in frozen.parameters()) and gpt.wte.weight.requires_grad
    trained, frozen = trained_and_frozen(gpt, 2, generator())
    assert trained is gpt and frozen.gpt is gpt


def test_a_checkpoint_keeps_what_was_trained(gpt):
    assert trained_state(gpt).keys() == gpt.state_dict().keys()
    state = trained_state(adapted(gpt))
    assert all(name.endswith((".A", ".B")) for name in state) and len(state) == 2 * 4 * 2
    load_trained_state(gpt, {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert not any(tensor.any() for tensor in trained_state(gpt).values())
    name = next(iter(state))
    for wrong in ({k: v for k, v in state.items() if k != name}, {**state, "other": torch.zeros(1)}):
        with pytest.raises(RuntimeError, match="weights missing"):
            load_trained_state(gpt, wrong)


def test_counts_on_paper():
    """GPT-2, rank 8: 12 blocks of 8 * ((C + 3C) + (C + C) + (C + 4C) + (4C + C)) = 128 C, C = 768, make 1,179,648."""
    row, *others = memory_table(8)
    assert (row["model"], row["parameters"], row["rank 8"]) == ("gpt2", 124_439_808, 1_179_648)
    assert row["trained"] == pytest.approx(1_179_648 / 124_439_808)
    assert row["PPO, all weights"] == pytest.approx(4.97759232)  # 10 N * 4 bytes
    assert row["PPO, adapters"] == pytest.approx(1.0332672)  # (2 * 124,439,808 + 8 * 1,179,648) * 4 bytes
    # V C + 1024 C for the embeddings, 12 C^2 + 13 C a block, 2 C for the last LayerNorm; heads are 64 wide.
    assert [(other["model"], other["parameters"]) for other in others] == [
        ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576)]
    assert all(n_embd == 64 * n_head for _, n_head, n_embd in PRETRAINED.values())


# ---- the scripts ----


def train(module, config, name, *flags):
    tiny = "--steps" + TINY[name].split("--steps")[1]  # without the sizes, which come with --init
    module.main(parse_cli(config, ["--device", "cpu", *tiny.split(), "--lora-rank", "2", *map(str, flags)]))


@pytest.fixture(scope="module")
def with_adapters(trained, tmp_path_factory):
    """Reward model and policy trained as adapters on the sft.pt of `trained`."""
    data, out, _ = trained
    ours = tmp_path_factory.mktemp("lora")
    (ours / "sft.pt").write_bytes((out / "sft.pt").read_bytes())
    train(train_reward, train_reward.RewardConfig, "reward", "--data", data, "--out", ours)
    train(train_ppo, train_ppo.PPOConfig, "ppo", "--data", data, "--out", ours)
    return data, ours


def test_scripts_train_and_save_adapters_alone(with_adapters):
    """The facts of the first step hold, files are small, and what is loaded is a plain network that has learned."""
    data, ours = with_adapters
    assert float(rows(ours / "reward.csv")[0]["loss"]) == pytest.approx(0.693147, abs=1e-5)
    ppo = rows(ours / "ppo.csv")
    assert abs(float(ppo[0]["kl_ref"])) < 1e-5 and all(float(row["first_log_ratio"]) < 1e-5 for row in ppo)
    for name in ("reward", "ppo"):
        state = torch.load(ours / f"{name}.pt", weights_only=True)["model"]
        assert all(key.endswith((".A", ".B")) or "head" in key or key in ("mean", "scale") for key in state)
    (sft, _), (policy, _) = load_policy(ours / "sft.pt", "sft"), load_policy(ours / "ppo.pt", "ppo")
    assert policy.state_dict().keys() == sft.state_dict().keys()
    assert not torch.equal(policy.blocks[0].attn.c_attn.weight, sft.blocks[0].attn.c_attn.weight)
    assert torch.equal(policy.wte.weight, sft.wte.weight)
    model, _ = load_reward_model(ours / "reward.pt")
    assert model(TOKENS, torch.tensor([10, 10, 10])).std() > 0


def test_a_resumed_run_with_adapters_is_the_uninterrupted_one(with_adapters, tmp_path, monkeypatch):
    data, ours = with_adapters
    save, inputs = train_ppo.save_checkpoint, ["--data", data, "--out", tmp_path, "--sft", ours / "sft.pt",
                                               "--reward", ours / "reward.pt"]

    def save_and_stop(*args, **state):
        save(*args, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_ppo, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(train_ppo, train_ppo.PPOConfig, "ppo", *inputs)
    monkeypatch.setattr(train_ppo, "save_checkpoint", save)
    train(train_ppo, train_ppo.PPOConfig, "ppo", *inputs, "--resume")
    whole, resumed = (torch.load(folder / "ppo.pt", weights_only=True)["model"] for folder in (ours, tmp_path))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_adapters_on_another_network_are_refused(with_adapters, tmp_path):
    data, ours = with_adapters
    for name in ("ppo.pt", "reward.pt"):
        (tmp_path / name).write_bytes((ours / name).read_bytes())
    checkpoint = torch.load(ours / "ppo.pt", weights_only=True)
    checkpoint["config"]["out"] = "gone"
    torch.save(checkpoint, tmp_path / "ppo.pt")
    with pytest.raises(InputError, match="is the sft.pt that they were trained on"):
        load_policy(tmp_path / "ppo.pt", "ppo")
    (tmp_path / "sft.pt").write_bytes((ours / "sft.pt").read_bytes())  # found beside it
    load_policy(tmp_path / "ppo.pt", "ppo")
    other = torch.load(ours / "sft.pt", weights_only=True)
    other["model"]["wte.weight"][0, 0] += 1
    torch.save(other, tmp_path / "sft.pt")
    with pytest.raises(InputError, match="is the sft.pt that they were trained on"):
        load_policy(tmp_path / "ppo.pt", "ppo")


def test_fine_tuning_from_a_folder(trained, tmp_path):
    """--init with and without adapters: the loss begins where the weights are, and not at ln V."""
    data, out, _ = trained
    gpt, _ = load_policy(out / "sft.pt", "sft")
    save_pretrained(gpt, tmp_path / "base", eos_id=798)
    for name, flags in (("full", ["--lora-rank", "0"]), ("adapters", [])):
        train(train_sft, train_sft.SFTConfig, "sft", "--data", data, "--out", tmp_path / name, "--init",
              tmp_path / "base", "--lr", "1e-4", *flags)
        first, last = rows(tmp_path / name / "sft.csv")[0], rows(out / "sft.csv")[-1]
        assert float(first["valid"]) == pytest.approx(float(last["valid"]), abs=0.05)
    full, adapters = (load_policy(tmp_path / name / "sft.pt", "sft")[0] for name in ("full", "adapters"))
    assert torch.equal(adapters.wte.weight, gpt.wte.weight) and not torch.equal(full.wte.weight, gpt.wte.weight)
    save_pretrained(noisy(gpt), tmp_path / "base", eos_id=798)
    with pytest.raises(InputError, match="have changed since"):
        load_policy(tmp_path / "adapters" / "sft.pt", "sft")
    save_pretrained(GPT(GPTConfig(vocab_size=19, block_size=80, n_layer=1, n_head=1, n_embd=4)), tmp_path / "base", 18)
    with pytest.raises(InputError, match="knows 19 tokens and the tokenizer 800"):
        train(train_sft, train_sft.SFTConfig, "sft", "--data", data, "--out", tmp_path, "--init", tmp_path / "base")


def test_all_weights_are_trained_on_top_of_merged_adapters(trained, tmp_path):
    """Fine-tuning with adapters, then reward model and PPO without: every weight of theirs is trained and saved."""
    data, out, _ = trained
    save_pretrained(load_policy(out / "sft.pt", "sft")[0], tmp_path / "base", eos_id=798)
    train(train_sft, train_sft.SFTConfig, "sft", "--data", data, "--out", tmp_path, "--init", tmp_path / "base")
    sft, _ = load_policy(tmp_path / "sft.pt", "sft")
    assert all(p.requires_grad for p in sft.parameters())
    for module, config, name in ((train_reward, train_reward.RewardConfig, "reward"),
                                 (train_ppo, train_ppo.PPOConfig, "ppo")):
        train(module, config, name, "--data", data, "--out", tmp_path, "--lora-rank", 0)
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)["model"]
        for key, tensor in sft.state_dict().items():
            if (name, key) != ("reward", "ln_f.bias"):  # it moves all scores alike, and only differences are learned
                assert not torch.equal(state[f"gpt.{key}"], tensor), (name, key)


@pytest.mark.parametrize(("flags", "message"), [(["--lora-rank", "4"], "needs --init"),
                                                (["--init", "gpt2", "--n-layer", "12"], "come with --init")])
def test_flags_that_do_not_go_together(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_cli(train_sft.SFTConfig, flags)
    assert message in capsys.readouterr().err
