"""Reward models of another family: tiny encoders and a decoder of transformers, random weights."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import train_ppo
import train_reward
import train_sft
from rlhf.networks import hf, hf_tokenizer
from rlhf.networks.hf_reward import score_texts
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_reward_model, tokenizer_of
from rlhf.tools import optimality, sample
from tests.helpers import TINY, copy_some_rows, rows

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[hf]"
)
tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: pip install .[hf]"
)
KINDS = ["roberta", "bert", "distilbert", "electra", "llama", "gpt2"]
LONGEST = 160  # tokens that each model reads
SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    initializer_range=0.5,
    max_position_embeddings=LONGEST,
)
PROMPTS = ["\n\nHuman: A tent?\n\nAssistant:", [{"role": "user", "content": "Hi!"}]]
SIDES = ("layers", "attention_heads", "ffn_dim")
RESPONSES = ["Put it up, and let it dry.", "Hello."]


def make_model(kind, vocab):
    T = transformers
    torch.manual_seed(0)
    if kind == "roberta":
        # Its positions begin after the pad's, at 2.
        sizes = {**SIZES, "max_position_embeddings": LONGEST + 2}
        model = T.RobertaModel(T.RobertaConfig(**sizes, vocab_size=vocab, pad_token_id=1))
    elif kind == "bert":
        model = T.BertModel(T.BertConfig(**SIZES, vocab_size=vocab))
    elif kind == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
        more = {"max_position_embeddings": LONGEST, "initializer_range": 0.5}
        model = T.DistilBertModel(T.DistilBertConfig(**sizes, **more, vocab_size=vocab))
    elif kind == "electra":
        model = T.ElectraModel(T.ElectraConfig(**SIZES, embedding_size=8, vocab_size=vocab))
    elif kind == "llama":
        model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES, vocab_size=vocab))
    else:
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": LONGEST}
        model = T.GPT2LMHeadModel(T.GPT2Config(**sizes, vocab_size=vocab, initializer_range=0.5))
    return model.eval()


def make_tokenizer(kind, texts):
    """WordPiece of lower-case letters as BERT's, or byte-level as RoBERTa's and GPT-2's."""
    if kind in ("bert", "distilbert", "electra"):
        begin, end = "[CLS]", "[SEP]"
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        names = ["[PAD]", "[UNK]", begin, end, "[MASK]"]
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=400, special_tokens=names, show_progress=False
        )
        special = {"cls_token": begin, "sep_token": end, "unk_token": "[UNK]"}
    else:
        begin, end = "<s>", "</s>"
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=[begin, "<pad>", end],
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        special = {"bos_token": begin, "eos_token": end}
    tokenizer.train_from_iterator(texts, trainer)
    around = {"roberta": f"{begin} $A {end}", "llama": f"{begin} $A", "gpt2": "$A"}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=around.get(kind, f"{begin} $A {end}"),
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (begin, end)],
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_some_rows(tmp_path_factory.mktemp("hf_reward") / "data")


@pytest.fixture(scope="module")
def bases(data, tmp_path_factory):
    """{kind: (folder, model, tokenizer) of transformers}."""
    texts = []
    for path in sorted(data.glob("*.csv")):
        for row in rows(path):
            texts += row.values()
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = make_tokenizer(kind, texts)
        model = make_model(kind, len(tokenizer))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        made[kind] = (folder, model, tokenizer)
    return made


@pytest.fixture(autouse=True)
def new_process():
    """As if Python had been started anew."""
    hf.load_base.cache_clear()
    hf_tokenizer.load_tokenizer.cache_clear()


def call(module, config, *words):
    module.main(parse_cli(config, ["--device", "cpu", *map(str, words)]))


def train(data, out, folder, *words):
    """reward.pt of a model of transformers, after three steps."""
    shared = ["--data", data, "--out", out, "--batch-size", 8, "--steps", 3, "--lr", 0.01]
    call(train_reward, train_reward.RewardConfig, *shared, "--init", folder, *words)
    return out / "reward.pt"


@pytest.fixture(params=KINDS)
def trained(request, bases, data, tmp_path):
    folder, model, tokenizer = bases[request.param]
    adapters = ["--lora-rank", 2] if request.param == "llama" else []
    path = train(data, tmp_path, folder, *adapters)
    return SimpleNamespace(kind=request.param, path=path, model=model, tokenizer=tokenizer)


# ---- the model ----


@torch.no_grad()
def test_scores_are_those_of_one_unpadded_row(trained):
    """Of transformers' hidden states: an encoder's at the first token, a decoder's at the last.
    Adapters start at zero, so the base's weights are put back, and the head's are kept."""
    model, checkpoint = load_reward_model(trained.path)
    tokenizer = tokenizer_of(trained.path, checkpoint, "")
    theirs = trained.model.base_model
    own = dict(model.gpt.trunk.named_parameters())
    for name, x in theirs.named_parameters():
        name = name if name in own else name.replace(".weight", ".linear.weight")
        is_conv1d = trained.kind == "gpt2" and ".c_" in name and x.dim() == 2  # (in, out)
        own[name].copy_(x.t() if is_conv1d else x)
    for name, x in own.items():
        if name.endswith(".B"):
            x.zero_()
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        ids = tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response)
        hidden = theirs(torch.tensor([ids])).last_hidden_state[0]  # (T, C)
        at = -1 if trained.kind in ("llama", "gpt2") else 0
        raw = hidden[at] @ model.head.weight[0] + model.head.bias[0]
        expected.append(((raw - model.mean) / model.scale).item())
    assert abs(expected[0] - expected[1]) > 1e-3
    got = score_texts(model, tokenizer, PROMPTS, RESPONSES)  # in one padded batch
    assert got == pytest.approx(expected, abs=1e-4)


def test_tokens_are_the_models_own(trained):
    checkpoint = torch.load(trained.path, weights_only=True)
    tokenizer = tokenizer_of(trained.path, checkpoint, "")
    text = PROMPTS[0] + " " + RESPONSES[0]
    ids = tokenizer.prompt_ids(PROMPTS[0]) + tokenizer.response_ids(RESPONSES[0])
    expected = trained.tokenizer(text)["input_ids"]
    end = trained.tokenizer.eos_token_id or trained.tokenizer.sep_token_id
    if trained.kind in ("llama", "gpt2"):
        expected = [*expected, end]
    assert ids == expected and ids[-1] == end
    config = checkpoint["model_config"]
    assert config["pooled"] == ("last" if trained.kind in ("llama", "gpt2") else "first")
    assert config["n_embd"] == 16


def test_first_loss_is_ln_2_and_the_model_learns(trained):
    table = rows(trained.path.with_name("reward.csv"))
    assert float(table[0]["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    before = torch.load(trained.path, weights_only=True)["model"]["head.weight"]
    assert before.abs().max() > 0
    evaluation = rows(trained.path.with_name("reward_evaluation.csv"))[0]
    assert 0 <= float(evaluation["accuracy"]) <= 1
    # The judge reads the file's text, not what a tokenizer of lower-case letters makes of it.
    assert float(evaluation["judge_accuracy"]) > 0.7


def test_a_long_prompt_loses_its_beginning(bases, data, tmp_path):
    """In training, too."""
    long_data = tmp_path / "data"
    shutil.copytree(data, long_data)
    table = rows(data / "comparisons.csv")
    table[0]["Prompt"] = "\n\nHuman: " + "zebra " * 99 + "\n\nAssistant:"
    write_csv(long_data / "comparisons.csv", table)
    path = train(long_data, tmp_path, bases["roberta"][0])
    model, checkpoint = load_reward_model(path)
    assert model.longest == LONGEST
    tokenizer = tokenizer_of(path, checkpoint, "")
    long = "\n\nHuman: " + "zebra xylophone " * 99 + "A tent?\n\nAssistant:"
    ids = tokenizer.prompt_ids(long) + tokenizer.response_ids("Dry.")
    kept = torch.tensor([[ids[0], *ids[1 - LONGEST :]]])
    assert len(ids) > LONGEST == kept.size(1)
    with torch.no_grad():
        expected = model(kept, torch.tensor([LONGEST])).item()
    assert score_texts(model, tokenizer, [long], ["Dry."]) == pytest.approx([expected], abs=1e-6)


# ---- in PPO ----


def test_ppo_scores_text_with_an_encoder_beside_a_function(bases, data, tmp_path, capsys):
    """The policy is the own GPT. Each response is decoded for the reward model, a function is
    added, and the tools score as the run did."""
    shared = ["--data", data, "--out", tmp_path]
    call(train_sft, train_sft.SFTConfig, *shared, *TINY["sft"].split())
    path = train(data, tmp_path, bases["bert"][0])
    (tmp_path / "brief.py").write_text(
        "def score(prompts, responses):\n    return [-float(len(text)) for text in responses]\n"
    )
    rewards = ["--reward", path, tmp_path / "brief.py", "--reward-weights", 1, 0.5]
    words = [*shared, *TINY["ppo"].split(), *rewards, "--missing-eos-score", "none"]
    call(train_ppo, train_ppo.PPOConfig, *words)
    for row in rows(tmp_path / "ppo.csv"):
        assert float(row["score"]) == pytest.approx(
            float(row["score_model"]) + 0.5 * float(row["score_brief"]), abs=1e-4
        )
    model, checkpoint = load_reward_model(path)
    tokenizer = tokenizer_of(path, checkpoint, "")
    table = rows(tmp_path / "ppo_samples.csv")
    texts = [row["After"] for row in table]
    scores = score_texts(model, tokenizer, [row["Prompt"] for row in table], texts)
    expected = [score - 0.5 * len(text) for score, text in zip(scores, texts)]
    assert [float(row["score_after"]) for row in table] == pytest.approx(expected, abs=1e-3)
    capsys.readouterr()

    words = ["--checkpoint", tmp_path / "ppo.pt", "--data", data, *rewards[:3]]
    call(optimality, optimality.OptimalityConfig, *words, "--prompts", 2, "--samples", 4)
    assert rows(tmp_path / "evaluation.csv")[0]["policy"] == "sft"
    words = ["--checkpoint", tmp_path / "ppo.pt", "--prompt", "A tent?", "--max-new-tokens", 5]
    call(sample, sample.SampleConfig, *words)  # finds reward.pt beside the checkpoint
    assert "score" in capsys.readouterr().out


def test_resume_refuses_another_reward_model(bases, data, tmp_path):
    shared = ["--data", data, "--out", tmp_path]
    call(train_sft, train_sft.SFTConfig, *shared, *TINY["sft"].split())
    path = train(data, tmp_path, bases["bert"][0])
    words = [*shared, *TINY["ppo"].split()]
    call(train_ppo, train_ppo.PPOConfig, *words)
    path.unlink()
    for file in ("reward.csv", "reward.json", "reward_evaluation.csv"):
        (tmp_path / file).unlink()
    train(data, tmp_path, bases["bert"][0], "--seed", 1)
    with pytest.raises(InputError, match="was begun with another reward"):
        call(train_ppo, train_ppo.PPOConfig, *words, "--resume")


# ---- what cannot be used ----


def test_a_model_of_encoder_and_decoder_is_refused(bases, data, tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    tokenizer = bases["roberta"][2]
    folder = tmp_path / "t5"
    config = transformers.T5Config(
        **sizes, vocab_size=len(tokenizer), pad_token_id=1, decoder_start_token_id=1
    )
    transformers.T5Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="cannot use this T5Model; needed: a decoder"):
        train(data, tmp_path / "out", folder)


@pytest.mark.parametrize("kind", ["bart", "bloom"])
def test_a_model_of_another_kind_is_refused(bases, data, tmp_path, kind):
    """One of encoder and decoder, and one that does not say how many tokens it reads."""
    tokenizer = bases["roberta"][2]
    folder = tmp_path / kind
    if kind == "bart":
        sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in SIDES}
        config = transformers.BartConfig(vocab_size=len(tokenizer), d_model=16, **sizes)
        transformers.BartModel(config).save_pretrained(folder)
    else:
        config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_head=2)
        transformers.BloomModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="needed: a decoder or an encoder that says how many"):
        train(data, tmp_path / "out", folder)


def test_two_models_to_start_from_are_refused():
    with pytest.raises(ValueError, match="--sft and --init are two models"):
        train_reward.RewardConfig(init="a", sft="b.pt")


def test_options_of_init_need_it():
    with pytest.raises(ValueError, match="--template needs --init"):
        train_reward.RewardConfig(template="none")
