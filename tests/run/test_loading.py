"""The network, the tokenizer and the judge that a checkpoint names."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from rlhf.model import GPT, PolicyWithoutValue, PolicyWithValue, RewardModel
from rlhf.run.errors import InputError
from rlhf.run.files import digests
from rlhf.run.flags import TrainConfig
from rlhf.run.loading import (
    find_tokenizer,
    frozen_copy,
    judge_of,
    load_policy,
    load_reward_model,
    load_stages,
    new_network,
    tokenizer_of,
    with_adapters,
)
from rlhf.run.reward_functions import Rewards
from rlhf.tokenizer import load_tokenizer
from tests.helpers import BUNDLED, ROOT, lora, noisy
from tests.run.small_run import (
    SHAPE,
    TOKENS,
    Config,
    DPOConfig,
    PPOConfig,
    RewardConfig,
    finished,
    saved,
    small_run,
)

# ---- networks ----


def test_new_network_of_a_gpts_config_is_a_gpt():
    gpt = new_network(dataclasses.asdict(SHAPE))
    assert type(gpt) is GPT and gpt.config == SHAPE


def test_with_adapters_of_rank_0_changes_nothing():
    gpt = GPT(SHAPE)
    before = list(gpt.state_dict())
    assert with_adapters(gpt, lora(0), torch.Generator()) is gpt
    assert list(gpt.state_dict()) == before
    assert all(parameter.requires_grad for parameter in gpt.parameters())


def test_frozen_copy_stays_as_it_is_while_the_original_trains():
    gpt = noisy(GPT(SHAPE))
    before = gpt(TOKENS)
    frozen = frozen_copy(gpt)
    noisy(gpt, seed=1)
    assert torch.equal(frozen(TOKENS), before) and not torch.equal(gpt(TOKENS), before)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert all(parameter.requires_grad for parameter in gpt.parameters())


def test_frozen_copy_shares_what_is_not_trained():
    """As the weights under adapters, which are held once."""
    gpt = GPT(SHAPE)
    gpt.wte.requires_grad_(False)
    frozen = frozen_copy(gpt)
    assert frozen.wte.weight is gpt.wte.weight
    assert frozen.wpe.weight is not gpt.wpe.weight


# ---- checkpoints ----


def test_load_policy_rejects_weights_of_another_config(run):
    content = torch.load(saved(run, 9), weights_only=True)
    torch.save({**content, "model_config": {**content["model_config"], "n_layer": 2}}, run.path)
    with pytest.raises(InputError, match="sft.pt does not fit its own settings"):
        load_policy(run.path, "sft")


def test_load_policy_of_sft_is_the_gpt(tmp_path):
    gpt = noisy(GPT(SHAPE))
    got, checkpoint = load_policy(finished(tmp_path, gpt, Config), "sft", "ppo")
    assert torch.equal(got(TOKENS), gpt(TOKENS)) and checkpoint["kind"] == "sft"


def test_load_policy_of_ppo_is_the_policy_at_its_temperature(tmp_path):
    """The value network is left out. A policy trained at temperature 1/2 has twice the logits."""
    policy = noisy(PolicyWithValue(GPT(SHAPE), GPT(SHAPE)))
    got, checkpoint = load_policy(finished(tmp_path, policy, PPOConfig), "ppo")
    assert checkpoint["config"]["temperature"] == 0.5
    assert_close(got(TOKENS), 2 * policy.gpt(TOKENS))


def test_load_policy_takes_dpo_wherever_it_takes_ppo(tmp_path):
    policy = PolicyWithoutValue(noisy(GPT(SHAPE)))
    path = finished(tmp_path, policy, DPOConfig)
    got, checkpoint = load_policy(path, "sft", "ppo")
    assert torch.equal(got(TOKENS), policy.gpt(TOKENS)) and checkpoint["kind"] == "dpo"
    message = "docs.experiments.train_dpo`; a checkpoint of `python train_sft.py` is needed here"
    with pytest.raises(InputError, match=message):
        load_policy(path, "sft")


def test_load_reward_model_has_head_shift_and_scale(tmp_path):
    model = noisy(RewardModel(GPT(SHAPE)))
    model.mean.fill_(2.0)
    model.scale.fill_(4.0)
    got, _ = load_reward_model(finished(tmp_path, model, RewardConfig))
    lengths = torch.tensor([3])
    assert torch.equal(got(TOKENS, lengths), model(TOKENS, lengths))


# ---- --sft and --reward ----


@pytest.fixture
def stages(tmp_path, small_data):
    """A folder with sft.pt and a reward.pt that was made from it; cfg names both."""
    tokenizer = find_tokenizer(str(small_data))
    gpt = noisy(GPT(SHAPE))
    sft = saved(small_run(tmp_path, gpt, Config, tokenizer), 9)
    model = noisy(RewardModel(GPT(SHAPE)), seed=1)
    saved(small_run(tmp_path, model, RewardConfig, tokenizer, digests(sft=sft)), 9)
    cfg = PPOConfig(data=str(small_data), out=str(tmp_path))
    rewards = Rewards(tmp_path / "reward.pt", (), (1.0,))
    return SimpleNamespace(cfg=cfg, rewards=rewards, gpt=gpt, model=model, tokenizer=tokenizer)


def test_load_stages_gives_the_networks_their_tokenizer_and_digests(stages, tmp_path):
    gpt, model, functions, tokenizer, inputs = load_stages(
        stages.cfg, stages.rewards, torch.device("cpu")
    )
    assert torch.equal(gpt(TOKENS), stages.gpt(TOKENS))
    lengths = torch.tensor([3])
    assert torch.equal(model(TOKENS, lengths), stages.model(TOKENS, lengths))
    assert tokenizer.fingerprint == stages.tokenizer.fingerprint
    assert functions == ()
    assert inputs == digests(sft=tmp_path / "sft.pt", reward=tmp_path / "reward.pt")


def test_load_stages_rejects_a_reward_model_of_another_sft(stages, tmp_path):
    small = small_run(tmp_path, noisy(GPT(SHAPE), 5), Config, stages.tokenizer, overwrite=True)
    saved(small, 9)
    with pytest.raises(InputError, match="reward.pt was made from another sft file than .*sft.pt"):
        load_stages(stages.cfg, stages.rewards, torch.device("cpu"))


def test_load_stages_rejects_a_reward_model_of_another_tokenizer(stages, tmp_path):
    inputs = digests(sft=tmp_path / "sft.pt")
    run = small_run(tmp_path, stages.model, RewardConfig, inputs=inputs, overwrite=True)
    saved(run, 9)  # with the tokenizer Digits
    with pytest.raises(InputError, match="reward.pt was trained with another tokenizer"):
        load_stages(stages.cfg, stages.rewards, torch.device("cpu"))


# ---- tokenizers ----


@pytest.fixture
def two_tokenizers(tmp_path, small_data):
    """The tokenizer of the small data set and another outside of it, with 44 merges."""
    own = small_data / "tokenizer.tiktoken"
    short = tmp_path / "short.tiktoken"
    short.write_text("".join(own.read_text().splitlines(keepends=True)[:300]))
    return SimpleNamespace(
        folder=str(small_data), own=load_tokenizer(str(own)), other=load_tokenizer(str(short))
    )


def trained_with(tokenizer):
    """What a checkpoint says of its tokenizer."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "tokenizer_name": tokenizer.name,
        "model_config": {},
    }


@pytest.mark.parametrize("name", ["own", "other"])
def test_tokenizer_of_is_the_one_of_the_checkpoint(tmp_path, two_tokenizers, name):
    """The data set's own or, if the checkpoint was trained with another, the one that it names."""
    expected = getattr(two_tokenizers, name)
    got = tokenizer_of(tmp_path / "sft.pt", trained_with(expected), two_tokenizers.folder)
    assert got.fingerprint == expected.fingerprint


def test_tokenizer_of_rejects_a_tokenizer_file_that_has_changed(tmp_path, two_tokenizers):
    checkpoint = trained_with(two_tokenizers.other)
    changed = (tmp_path / "data" / "tokenizer.tiktoken").read_bytes()
    (tmp_path / "short.tiktoken").write_bytes(changed)
    with pytest.raises(InputError, match="another tokenizer"):
        tokenizer_of(tmp_path / "sft.pt", checkpoint, two_tokenizers.folder)


def test_tokenizer_of_names_a_data_folder_that_is_missing(tmp_path, two_tokenizers):
    checkpoint = trained_with(two_tokenizers.other)
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        tokenizer_of(tmp_path / "sft.pt", checkpoint, str(tmp_path / "nowhere"))


def test_tokenizer_of_quotes_nothing_of_a_file_that_only_the_checkpoint_names(tmp_path, small_data):
    secret = tmp_path / "secret"
    secret.write_text("password: hunter2\n")
    checkpoint = {"tokenizer": "abc", "tokenizer_name": str(secret), "model_config": {}}
    with pytest.raises(InputError, match="secret, line 1: expected `base64-token rank`$") as raised:
        tokenizer_of(tmp_path / "sft.pt", checkpoint, str(small_data))
    assert "hunter2" not in str(raised.value) and raised.value.__suppress_context__


# ---- judges ----


def marked_judge(folder):
    """A judge.py that leaves a file beside it if it is run."""
    folder.mkdir()
    (folder / "judge.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
        "def score(prompts, responses):\n    return [0.0] * len(responses)\n"
    )
    return folder


def test_judge_of_a_folder_that_only_the_checkpoint_names_does_not_run(tmp_path):
    folder = marked_judge(tmp_path / "named")
    message = f"judge.py is code that only the checkpoint names; give --data {folder}"
    with pytest.raises(InputError, match=message):
        judge_of("", str(folder))
    assert not (folder / "ran").exists()
    assert judge_of(str(folder), "elsewhere").score([], ["a"]) == [0.0]
    assert (folder / "ran").exists()


@pytest.mark.parametrize(
    "spelled", [BUNDLED, BUNDLED.relative_to(ROOT), BUNDLED / ".." / "tiny_assistant"]
)
def test_judge_of_the_bundled_data_set_runs_without_a_flag(spelled, monkeypatch):
    monkeypatch.chdir(ROOT)
    judge = judge_of("", str(spelled))
    assert judge.score(["\n\nHuman: Hi.\n\nAssistant:"], ["Shame on you."])[0] < 0


def test_judge_and_tokenizer_of_the_bundled_data_set_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = TrainConfig().data
    assert Path(judge_of("", name).__file__) == BUNDLED / "judge.py"
    tokenizer = find_tokenizer(name)
    assert tokenizer.fingerprint == load_tokenizer(str(BUNDLED / "tokenizer.tiktoken")).fingerprint
    named = {"tokenizer": tokenizer.fingerprint, "tokenizer_name": "gone", "model_config": {}}
    assert tokenizer_of(tmp_path / "sft.pt", named, name).fingerprint == tokenizer.fingerprint


def test_judge_of_a_folder_named_as_the_bundled_one_does_not_run(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    marked_judge(tmp_path / "data" / "tiny_assistant")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="only the checkpoint names"):
        judge_of("", "data/tiny_assistant")


def test_judge_of_a_folder_without_a_judge_is_none(tmp_path):
    assert judge_of("", str(tmp_path)) is None
