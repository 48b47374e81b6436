"""rlhf.tools.export of the own GPT, and what the program does with folders. Models of transformers
are in tests/networks/test_export.py."""

import random

import pytest
import torch
from torch.testing import assert_close

from rlhf.networks.export_tokenizer import exported_tokenizer
from rlhf.networks.gpt2 import load_gpt2
from rlhf.run.errors import InputError
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy, load_reward_model, tokenizer_of
from rlhf.tokenizer import load_tokenizer
from rlhf.tools import export
from tests.helpers import BUNDLED

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[hf]"
)
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What should I do about a sting?"},
]


def exported(path, *words):
    export.main(parse_cli(export.ExportConfig, ["--checkpoint", str(path), *map(str, words)]))


def noisy_copy(path, folder):
    """The checkpoint with noise on its weights, so that no head is 0. PPO's temperature is 1/2."""
    checkpoint = torch.load(path, weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for tensor in checkpoint["model"].values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    if path.name == "ppo.pt":
        checkpoint["config"]["temperature"] = 0.5
    torch.save(checkpoint, folder / path.name)
    return folder / path.name


# ---- the own GPT ----


@torch.no_grad()
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_policy_is_the_checkpoints(trained, tmp_path, capsys, name):
    """Its logits, its greedy response, and the pipeline's on messages."""
    path = noisy_copy(trained[1] / f"{name}.pt", tmp_path)
    exported(path, "--out", tmp_path / name)
    out = tmp_path / name
    gpt, checkpoint = load_policy(path, name)
    tokenizer = tokenizer_of(path, checkpoint, checkpoint["config"]["data"])
    prompt = tokenizer.prompt_ids(MESSAGES)
    ids = prompt
    for _ in range(6):
        ids = [*ids, gpt(torch.tensor([ids]))[0, -1].argmax().item()]
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.tensor([ids])
    assert_close(model(tokens).logits, gpt(tokens), atol=1e-4, rtol=0)
    assert_close(load_gpt2(str(out))(tokens), gpt(tokens), atol=1e-5, rtol=0)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert theirs.apply_chat_template(MESSAGES, add_generation_prompt=True).input_ids == prompt
    generate = transformers.pipeline("text-generation", model=str(out))
    answer = generate(MESSAGES, max_new_tokens=6, do_sample=False, return_full_text=False)
    said = [i for i in ids[len(prompt) :] if i < tokenizer.eos_id]
    assert answer[0]["generated_text"] == tokenizer.decode(said)
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [tokenizer.eos_id]
    assert f"wrote {out}\nLoaded again, its logits or scores differ" in capsys.readouterr().out
    assert {"README.md", "chat_template.jinja"} < {file.name for file in out.iterdir()}


@torch.no_grad()
def test_reward_model_scores_as_the_checkpoint_up_to_the_constant_that_is_printed(
    trained, tmp_path, capsys
):
    path = noisy_copy(trained[1] / "reward.pt", tmp_path)
    exported(path, "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    constant = float(printed.partition("these plus ")[2].split()[0].rstrip("."))
    reward_model, checkpoint = load_reward_model(path)
    tokenizer = tokenizer_of(path, checkpoint, checkpoint["config"]["data"])
    dialogues, expected = [], []
    for response in ("Cool it with water.", "No."):
        ids = tokenizer.prompt_ids(MESSAGES) + tokenizer.response_ids(response)
        expected.append(reward_model(torch.tensor([ids]), torch.tensor([len(ids)])).item())
        dialogues.append([*MESSAGES, {"role": "assistant", "content": response}])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens = theirs.apply_chat_template(dialogues, padding=True, return_tensors="pt")
    assert abs(expected[0] - expected[1]) > 1e-3
    assert abs(constant) > 1e-3
    got = model(**tokens).logits[:, 0] + constant
    assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"The checkpoint's scores are these plus {constant:.6g}." in text


@pytest.mark.parametrize("name", [str(BUNDLED / "tokenizer.tiktoken"), "gpt2"])
def test_tokenizer_gives_the_same_ids_on_any_text(gpt2_ranks, name):
    tokenizer = load_tokenizer(name)
    theirs = exported_tokenizer(tokenizer)
    rng = random.Random(0)
    pieces = [tokenizer.decode([i]) for i in range(700)]  # some end within a character
    kinds = [
        lambda: chr(rng.randrange(32, 127)),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice(" \n\r\t\x85\xa0\u2028\u3000'"),
        lambda: rng.choice(pieces),
        lambda: rng.choice("ab") * rng.randrange(20),
    ]
    for _ in range(1000):
        text = "".join(rng.choice(kinds)() for _ in range(rng.randrange(30))) + "<|endoftext|>"
        ids = theirs(text, split_special_tokens=True)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert theirs("a<|endoftext|>")["input_ids"] == [*tokenizer.encode("a"), tokenizer.eos_id]


def test_card_says_what_it_is(trained, tmp_path):
    out = tmp_path / "my_model"
    exported(trained[1] / "ppo.pt", "--out", out)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"---\ntags: [rlhf]\n---\n# {out}\n")
    for part in (
        "Made by `train_ppo.py`",
        "Trained from: scratch.",
        f"Data: {trained[0]}",
        f'AutoModelForCausalLM.from_pretrained("{out}")',
        '"batch_size": 8,',
        '"kl_ref":',
    ):
        assert part in text


# ---- the folder ----


def test_export_replaces_an_earlier_one_if_asked(trained, tmp_path):
    """None of its files stays: an adapter's would be read along with the new weights."""
    path = trained[1] / "sft.pt"
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    exported(path, "--out", out)
    (out / "adapter_config.json").write_text("of an earlier export")
    with pytest.raises(InputError, match="is not empty; give another folder, or --overwrite"):
        exported(path, "--out", out)
    assert (out / "adapter_config.json").is_file()
    exported(path, "--out", out, "--overwrite")
    assert not (out / "adapter_config.json").exists()
    assert transformers.AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 800
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("words", [(), ("--overwrite",)])
def test_export_never_replaces_other_files(trained, tmp_path, words):
    (tmp_path / "README.md").write_text("My notes.")
    with pytest.raises(InputError, match="is not empty; give another folder, or --overwrite"):
        exported(trained[1] / "sft.pt", "--out", tmp_path, *words)
    assert {file.read_text() for file in tmp_path.iterdir()} == {"My notes."}


def test_adapters_of_the_own_gpt_are_merged_already(trained, tmp_path):
    with pytest.raises(InputError, match="--adapter: .* is no policy of --temperature 1 with adap"):
        exported(trained[1] / "sft.pt", "--out", tmp_path / "out", "--adapter")
