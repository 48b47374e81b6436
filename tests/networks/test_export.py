"""rlhf.tools.export of models of transformers: tiny ones with random weights. Expected logits and
scores are the checkpoint's."""

import importlib.util
import json
import re
import textwrap

import pytest
import torch
from torch.testing import assert_close

import train_reward
import train_sft
from rlhf.networks import gpt2, hf, hf_tokenizer
from rlhf.networks.hf_reward import score_texts
from rlhf.run.errors import InputError
from rlhf.run.files import write_csv
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy, load_reward_model, tokenizer_of
from rlhf.tools import export
from tests.helpers import copy_some_rows, rows
from tests.networks import test_hf, test_hf_reward
from tests.networks.test_chat import ZEPHYR
from tests.networks.test_hf import SIZES, make_model, make_tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[hf]"
)
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "phi", "opt", "neox"]
QUESTION = [{"role": "user", "content": "A wet tent?"}]
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install .[hf]"
)


# ---- tiny models ----


def new_model(kind):
    if kind == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).eval()
    if kind == "neox":
        sizes = {**SIZES, "num_key_value_heads": 4}
        return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).eval()
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
        config = transformers.GPT2Config(
            vocab_size=SIZES["vocab_size"], initializer_range=0.5, **sizes
        )
        return transformers.GPT2LMHeadModel(config).eval()
    if kind == "tied":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
        ).eval()
    return make_model(kind)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return copy_some_rows(tmp_path_factory.mktemp("export") / "data")


@pytest.fixture(scope="module")
def texts(data):
    found = []
    for path in sorted(data.glob("*.csv")):
        for row in rows(path):
            found += row.values()
    return found


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    """A function: the folder of a model of some kind, with a chat template or without."""
    transformers.utils.logging.disable_progress_bar()
    made = {}

    def make(kind, template=ZEPHYR):
        if (kind, template) not in made:
            folder = tmp_path_factory.mktemp(kind)
            new_model(kind).save_pretrained(folder)
            tokenizer = make_tokenizer(
                texts, kind != "qwen2", pad="<eos>" if kind == "neox" else "<pad>"
            )
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
            made[kind, template] = folder
        return made[kind, template]

    return make


@pytest.fixture(autouse=True)
def new_process():
    """As if Python had been started anew."""
    hf.load_base.cache_clear()
    hf_tokenizer.load_tokenizer.cache_clear()


def call(module, config, *words):
    module.main(parse_cli(config, [*map(str, words)]))


def noisy_file(path, change=lambda checkpoint: None):
    """Noise on all weights of a checkpoint, as if it had been trained."""
    checkpoint = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in checkpoint["model"].items():
        if not name.endswith("scale"):
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def reward_file(data, out, *words):
    """reward.pt, after a step."""
    shared = ["--device", "cpu", "--data", data, "--out", out, "--steps", 1, "--batch-size", 4]
    call(train_reward, train_reward.RewardConfig, *shared, *words)
    return noisy_file(out / "reward.pt")


def policy_file(folder, data, out, *words, change=lambda checkpoint: None):
    """sft.pt of a model of transformers."""
    shared = ["--device", "cpu", "--data", data, "--out", out, "--steps", 0]
    call(train_sft, train_sft.SFTConfig, *shared, "--init", folder, *words)
    return noisy_file(out / "sft.pt", change)


def exported(path, out, *words):
    call(export, export.ExportConfig, "--checkpoint", path, "--out", out, *words)
    return out


def ids_of(tokenizer):
    return tokenizer.prompt_ids(QUESTION) + tokenizer.response_ids("Put it up, and let it dry.")


@torch.no_grad()
def greedy(gpt, ids, count, ends):
    """The most probable tokens after these, one at a time."""
    new = []
    while len(new) < count and (not new or new[-1] not in ends):
        new.append(gpt(torch.tensor([ids + new]))[0, -1].argmax().item())
    return new


@torch.no_grad()
def check_policy(path, out, model=None):
    """The logits, the greedy response, and the pipeline's on messages are the checkpoint's."""
    gpt, checkpoint = load_policy(path, checkpoint_kind(path))
    tokenizer = tokenizer_of(path, checkpoint, checkpoint["config"]["data"])
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    model = model or transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = ids_of(tokenizer)
    expected = gpt(torch.tensor([ids]))
    assert_close(model(torch.tensor([ids])).logits, expected, atol=1e-4, rtol=0)
    prompt = tokenizer.prompt_ids(QUESTION)
    assert theirs.apply_chat_template(QUESTION, add_generation_prompt=True).input_ids == prompt
    new = greedy(gpt, prompt, 8, tokenizer.stop_ids)
    generate = transformers.pipeline("text-generation", model=model, tokenizer=theirs)
    answer = generate(QUESTION, max_new_tokens=8, do_sample=False, return_full_text=False)
    said = tokenizer.decode([i for i in new if i not in tokenizer.stop_ids])
    special = theirs.decode(theirs(said)["input_ids"], skip_special_tokens=True)
    assert answer[0]["generated_text"] in (said, special)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == list(tokenizer.stop_ids)
    return expected


def checkpoint_kind(path):
    return torch.load(path, weights_only=True)["kind"]


# ---- policies ----


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_is_the_checkpoints(base, data, tmp_path, capsys, monkeypatch, kind, rank):
    monkeypatch.setattr(gpt2, "is_gpt2", lambda init: False)  # read by transformers
    path = policy_file(base(kind), data, tmp_path, "--lora-rank", rank)
    out = exported(path, tmp_path / "out")
    check_policy(path, out)
    assert "differ from the checkpoint's by" in capsys.readouterr().out


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_on_its_base_is_the_checkpoints_policy(base, data, tmp_path, monkeypatch, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install .[hf]")
    monkeypatch.setattr(gpt2, "is_gpt2", lambda init: False)
    path = policy_file(base(kind), data, tmp_path, "--lora-rank", 2, "--lora-alpha", 3)
    out = exported(path, tmp_path / "out", "--adapter")
    assert not (out / "model.safetensors").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(base(kind))
    check_policy(path, out, peft.PeftModel.from_pretrained(model, out).eval())


@pytest.mark.parametrize("kind", ["llama", "tied", "phi"])  # phi's output matrix has a bias
@torch.no_grad()
def test_temperature_is_part_of_the_weights(base, data, tmp_path, kind):
    """The logits of a policy trained at temperature 1/2 are twice those of its weights."""

    def change(checkpoint):
        checkpoint["config"]["temperature"] = 0.5

    path = policy_file(base(kind), data, tmp_path, change=change)
    out = exported(path, tmp_path / "out")
    check_policy(path, out)
    assert not transformers.AutoConfig.from_pretrained(out).tie_word_embeddings


@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_a_cut_vocabulary_goes_back_into_the_whole(base, data, tmp_path, capsys, rank):
    """Kept tokens have the checkpoint's rows, the others the base's."""
    few = copy_some_rows(tmp_path / "few")
    for path in few.glob("*.csv"):
        write_csv(path, rows(path)[:3])
    path = policy_file(base("llama"), few, tmp_path, "--lora-rank", rank, "--cut-vocab")
    out = exported(path, tmp_path / "out")
    assert "tokens were trained (--cut-vocab)" in capsys.readouterr().out
    gpt, checkpoint = load_policy(path, "sft")
    kept = list(checkpoint["model_config"]["kept"])
    assert 256 < len(kept) < 340
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([ids_of(tokenizer_of(path, checkpoint, ""))])
    logits = model(torch.tensor(kept)[ids]).logits
    assert_close(logits[..., kept], gpt(ids), atol=1e-4, rtol=0)
    original = transformers.AutoModelForCausalLM.from_pretrained(base("llama"))
    others = [i for i in range(SIZES["vocab_size"]) if i not in kept]
    rows_of = lambda network: network.get_input_embeddings().weight[others]  # noqa: E731
    assert torch.equal(rows_of(model), rows_of(original))


@pytest.mark.parametrize(
    "words", [("--lora-rank", 2), ("--lora-rank", 0), ("--lora-rank", 2, "--cut-vocab")]
)
def test_4_bits_become_the_numbers_that_they_stand_for(base, data, tmp_path, capsys, words):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[hf]")
    path = policy_file(base("wide"), data, tmp_path, "--load-in-4bit", *words)
    out = exported(path, tmp_path / "out")
    assert "The base was in 4 bits" in capsys.readouterr().out
    if "--cut-vocab" not in words:
        check_policy(path, out)


@needs_peft
def test_adapter_trained_on_4_bits_is_loaded_on_4_bits(base, data, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[hf]")
    path = policy_file(base("wide"), data, tmp_path, "--load-in-4bit", "--lora-rank", 2)
    out = exported(path, tmp_path / "out", "--adapter")
    card = (out / "README.md").read_text()
    names = {}  # as a reader of the card does
    code = card.partition("## How to load it")[2].partition("##")[0]
    option = re.search(r"quantization_config=BitsAndBytesConfig\(.*?\)", card)[0]
    code = code.replace(f'"{out}")\n    tok', f'"{out}", {option})\n    tok')
    code = "from transformers import BitsAndBytesConfig\n" + textwrap.dedent(code)
    exec(code, names)
    check_policy(path, out, names["model"].eval())


def test_a_gguf_file_becomes_a_folder(base, data, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(base("wide"))
    file = tmp_path / "tiny.gguf"
    test_hf.write_gguf(test_hf.Base(base("wide"), model), file)
    path = policy_file(file, data, tmp_path, "--lora-rank", 2)
    with pytest.raises(InputError, match="GGUF file; leave out --adapter"):
        exported(path, tmp_path / "adapter", "--adapter")
    gpt, checkpoint = load_policy(path, "sft")
    ids = torch.tensor([ids_of(tokenizer_of(path, checkpoint, ""))])
    out = exported(path, tmp_path / "out")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert_close(again(ids).logits, gpt(ids), atol=1e-4, rtol=0)


def test_bfloat16_is_kept(base, data, tmp_path):
    path = policy_file(base("wide"), data, tmp_path, "--lora-rank", 2, "--base-dtype", "bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "out"))
    assert model.dtype == torch.bfloat16


def test_system_message_becomes_part_of_the_template(base, data, tmp_path):
    path = policy_file(base("llama"), data, tmp_path, "--system", 'Say "tent" {{ or }} \\ ü.')
    check_policy(path, exported(path, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_without_a_template_messages_become_the_text_of_training(base, data, tmp_path, kind):
    path = policy_file(base(kind), data, tmp_path, "--template", "none")
    check_policy(path, exported(path, tmp_path / "out"))


# ---- reward models ----


def scores_of(out, texts):
    """transformers' scores of pairs of prompt and response, in one padded batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    dialogues = []
    for prompt, response in texts:
        dialogues.append([*prompt, {"role": "assistant", "content": response}])
    tokens = tokenizer.apply_chat_template(
        dialogues, return_tensors="pt", padding=tokenizer.pad_token is not None
    )
    with torch.no_grad():
        return model(**tokens).logits[:, 0]


TEXTS = [(QUESTION, "Put it up, and let it dry."), (QUESTION, "No.")]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox", "gemma3"])
def test_reward_model_on_sft_scores_as_the_checkpoint(
    base, data, tmp_path, capsys, monkeypatch, kind
):
    """Up to a constant, which is printed and stands in the card."""
    monkeypatch.setattr(gpt2, "is_gpt2", lambda init: False)
    policy_file(base(kind), data, tmp_path, "--lora-rank", 2)
    path = reward_file(data, tmp_path, "--lora-rank", 2)
    capsys.readouterr()
    out = exported(path, tmp_path / "out")
    printed = capsys.readouterr().out
    constant = float(printed.partition("these plus ")[2].split()[0].rstrip("."))
    assert f"these plus {constant:.6g}" in (out / "README.md").read_text()
    model, checkpoint = load_reward_model(path)
    tokenizer = tokenizer_of(path, checkpoint, "")
    expected = []
    for prompt, response in TEXTS:
        ids = tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response)
        with torch.no_grad():
            expected.append(model(torch.tensor([ids]), torch.tensor([len(ids)])).item())
    assert abs(expected[0] - expected[1]) > 1e-2
    got = scores_of(out, TEXTS) + constant
    assert_close(got, torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def family(texts, tmp_path_factory):
    """A function: the folder of an encoder or decoder to start a reward model from."""

    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        tokenizer = test_hf_reward.make_tokenizer(kind, texts)
        model = test_hf_reward.make_model(kind, len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("kind", ["roberta", "bert", "llama", "gpt2"])
def test_reward_model_of_another_family_scores_as_the_checkpoint(
    family, data, tmp_path, capsys, kind
):
    """An encoder's class has a place for the constant."""
    rank = 2 if kind == "llama" else 0
    path = reward_file(data, tmp_path, "--init", family(kind), "--lora-rank", rank)
    capsys.readouterr()
    out = exported(path, tmp_path / "out")
    printed = capsys.readouterr().out
    constant = 0.0
    if kind in ("llama", "gpt2"):
        constant = float(printed.partition("these plus ")[2].split()[0].rstrip("."))
    else:
        assert "these plus" not in printed
    model, checkpoint = load_reward_model(path)
    tokenizer = tokenizer_of(path, checkpoint, "")
    prompts = [prompt for prompt, _ in TEXTS]
    expected = score_texts(model, tokenizer, prompts, [response for _, response in TEXTS])
    assert abs(expected[0] - expected[1]) > 1e-2
    got = torch.cat([scores_of(out, [pair]) for pair in TEXTS]) + constant
    assert_close(got, torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["distilbert", "electra"])
def test_reward_model_without_a_class_that_fits_is_refused(family, data, tmp_path, kind):
    """Their classes have a ReLU and a GELU before the head."""
    path = reward_file(data, tmp_path, "--init", family(kind))
    with pytest.raises(
        InputError, match=r"nothing was written\. .*SequenceClassification does not"
    ):
        exported(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))


# ---- what is refused ----


def test_adapter_is_refused_where_there_is_none(base, data, tmp_path):
    path = policy_file(base("llama"), data, tmp_path)
    with pytest.raises(InputError, match=r"--adapter: .*sft.pt is no policy of --temperature 1"):
        exported(path, tmp_path / "out", "--adapter")


def test_the_base_is_not_replaced(base, data, tmp_path):
    """Also if it is an earlier export."""
    made = exported(policy_file(base("llama"), data, tmp_path / "a"), tmp_path / "made")
    path = policy_file(made, data, tmp_path / "b")
    before = {file: file.read_bytes() for file in made.iterdir()}
    with pytest.raises(InputError, match="holds the base; give another folder"):
        exported(path, made, "--overwrite")
    assert {file: file.read_bytes() for file in made.iterdir()} == before


def test_a_difference_is_an_error_and_the_old_export_stays(base, data, tmp_path, monkeypatch):
    path = policy_file(base("llama"), data, tmp_path)
    out = exported(path, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    exact = export.exported_policy

    def spoiled(gpt):
        model = exact(gpt)
        model.model.layers[0].mlp.up_proj.weight.data[0] += 1
        return model

    monkeypatch.setattr(export, "exported_policy", spoiled)
    with pytest.raises(InputError, match="nothing was written. Loaded again, its logits or scores"):
        exported(path, out, "--overwrite")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out"]
