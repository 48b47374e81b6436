"""The tokens of chat models. Expected ids come from transformers' own tokenizers, which are trained
here on a few sentences: one for each way in which a family of models spells a dialogue."""

import contextlib
import io
import json
import math
import shutil
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_ppo
import train_reward
import train_sft
from data import label_pairs, label_terminal, responses
from data.formats import as_cell
from rlhf import evaluate
from rlhf.data import Prompt, batch_indices
from rlhf.evaluate import Response
from rlhf.networks import hf, hf_tokenizer
from rlhf.networks.hf_reward import score_texts
from rlhf.rollout import decode_responses
from rlhf.run.errors import InputError, printable
from rlhf.run.files import write_csv
from rlhf.run.flags import parse_cli
from rlhf.run.loading import load_policy, load_reward_model, tokenizer_of
from rlhf.run.messages import as_text, last_turn, read_prompt
from rlhf.sampling import generate, has_ended
from rlhf.tools import sample
from tests.helpers import TINY, copy_some_rows, rows

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install .[hf]"
)
tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: pip install .[hf]"
)
SENTENCES = [
    "You are a helpful assistant. Answer: the tent is wet, isn't it?\n\nHuman: Hi!",
    "user\nassistant\nsystem\nmodel\nPut it up, and let it dry.  Two spaces.\n\n### Response:\n",
    "User: What is 12 + 34? Assistant: It is 46. 漢字 naïve",
] * 5
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ---- templates: how families spell a dialogue ----

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
CHATML = (
    LOOP
    + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
THINKING = CHATML.replace(  # Qwen 3 puts an empty thought before its last response
    "m['content']",
    "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '') + m['content']",
)
LLAMA3 = (
    "{{ bos_token }}"
    + LOOP
    + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    + " + '<|eot_id|>' }}"
    + END
    + "{% if add_generation_prompt %}"
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    + " + m['content'] | trim + '<end_of_turn>\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}"
    + LOOP
    + "{% if m['role'] == 'system' %}{{ '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' }}"
    + "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m['content'] + SPACE + eos_token }}{% endif %}"
    + END
)
PHI3 = (
    LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ALPACA = (
    LOOP
    + "{{ {'system': '', 'user': '### Instruction:\n', 'assistant': '### Response:\n'}[m['role']]"
    + " + m['content'] + '\n\n' }}"
    + END
    + "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
COLONS = (
    LOOP
    + "{{ m['role'] | capitalize + ': ' + m['content'] + (eos_token if m['role'] == 'assistant'"
    + " else '\n') }}"
    + END
    + "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# ---- tokenizers ----


def byte_level(special, pattern=None):
    """As GPT-2's or, with a pattern, Qwen's and Llama 3's."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = byte
    if pattern:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def sentencepiece(special, space="legacy", unigram=False):
    """As SentencePiece makes them, with the bytes of what has no token.

    space: put before each text and after each special token ("legacy": Llama 2), before a text only
    ("first": Mistral), or never ("": Gemma).
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    if unigram:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    # Trained with spaces before words.
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    names = ["<unk>", *special, *BYTES]
    sizes = {"vocab_size": 480, "show_progress": False, "special_tokens": names}
    if unigram:
        trainer = tokenizers.trainers.UnigramTrainer(unk_token="<unk>", **sizes)
    else:
        trainer = tokenizers.trainers.BpeTrainer(**sizes)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    # The bytes are no special tokens, so the model is taken out of the trained tokenizer.
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in BYTES]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = None
    steps = [tokenizers.normalizers.Replace(" ", "▁")]
    if space == "legacy":
        steps.insert(0, tokenizers.normalizers.Prepend("▁"))
    if space == "first":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False
        )
        steps = []
    if steps:
        tokenizer.normalizer = tokenizers.normalizers.Sequence(steps)
    strip = [tokenizers.decoders.Strip(" ", 1, 0)] if space else []
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            *strip,
        ]
    )
    return tokenizer


@dataclass
class Family:
    template: str
    tokenizer: object  # a function that trains it
    eos: str  # the tokenizer's
    end: str  # what ends a turn
    bos: str = ""  # put before each text
    added: list = field(default_factory=list)
    system: bool = True  # the template takes a system message


IM = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ROLES = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
FAMILIES = {
    "qwen2": Family(
        DEFAULT_SYSTEM,
        lambda: byte_level(["<|endoftext|>", *IM], QWEN),
        "<|im_end|>",
        "<|im_end|>",
    ),
    "qwen3": Family(
        THINKING,
        lambda: byte_level(["<|endoftext|>", *IM], QWEN),
        "<|endoftext|>",
        "<|im_end|>",
        added=["<think>", "</think>"],
    ),
    "llama3": Family(
        LLAMA3,
        lambda: byte_level(["<bos>", "<eos>", *HEADER], QWEN),
        "<eos>",
        "<|eot_id|>",
        bos="<bos>",
    ),
    "smollm2": Family(
        CHATML, lambda: byte_level(["<|endoftext|>", *IM]), "<|im_end|>", "<|im_end|>"
    ),
    "gemma": Family(
        GEMMA,
        lambda: sentencepiece(["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ""),
        "<eos>",
        "<end_of_turn>",
        bos="<bos>",
        system=False,
    ),
    "zephyr": Family(ZEPHYR, lambda: sentencepiece(["<s>", "</s>"]), "</s>", "</s>", bos="<s>"),
    "llama2": Family(
        INST.replace("SPACE", "' '"),
        lambda: sentencepiece(["<s>", "</s>"]),
        "</s>",
        "</s>",
        bos="<s>",
    ),
    "mistral": Family(
        INST.replace("SPACE", "''"),
        lambda: sentencepiece(["<s>", "</s>", "[INST]", "[/INST]"], "first"),
        "</s>",
        "</s>",
        bos="<s>",
    ),
    "phi3": Family(
        PHI3,
        lambda: sentencepiece(["<s>", "</s>"]),
        "</s>",
        "<|end|>",
        added=[tokenizers.AddedToken(role, rstrip=True, special=True) for role in ROLES],
    ),
    "pythia": Family(
        ALPACA,
        lambda: byte_level(["<|endoftext|>"]),
        "<|endoftext|>",
        "<|endoftext|>",
        added=[tokenizers.AddedToken(" " * n, normalized=False) for n in (4, 3, 2)],
    ),
    "falcon": Family(
        COLONS, lambda: byte_level(["<|endoftext|>"]), "<|endoftext|>", "<|endoftext|>"
    ),
    "unigram": Family(
        CHATML,
        lambda: sentencepiece(["<s>", "</s>", *IM], "first", unigram=True),
        "</s>",
        "<|im_end|>",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: the folder of its tokenizer}."""
    made = {}
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer()
        if family.bos:
            bos = [(family.bos, tokenizer.token_to_id(family.bos))]
            tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=bos
            )
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=family.eos,
            bos_token=family.bos or None,
            unk_token="<unk>" if tokenizer.token_to_id("<unk>") is not None else None,
            chat_template=family.template,
        )
        theirs.add_tokens(family.added)
        made[name] = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(made[name])
    return made


@pytest.fixture(params=FAMILIES)
def family(request, folders):
    """(Family, its folder, transformers' tokenizer)."""
    folder = folders[request.param]
    return FAMILIES[request.param], folder, transformers.AutoTokenizer.from_pretrained(folder)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be kind."}
PROMPTS = {
    "text": [user("What is 12 + 34?")],
    "emoji": [user("Is it wet? 🙂 漢字 naïve")],
    "spaces": [user("  Two  spaces,\n\n\nthree lines \n")],
    "newline": [user("\n\nHi!")],
    "turns": [user("Hi!"), assistant("Hello."), user("Is the tent wet?")],
    "system": [SYSTEM, user("Hi!")],
}
RESPONSES = ["It is 46.", "It is wet. 🙂 naïve 漢字", "(No)\n\n- two  spaces\n- x", "user", "/s"]


# ---- with a template ----


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_ids_are_those_of_apply_chat_template(family, prompt):
    about, folder, theirs = family
    messages = PROMPTS[prompt]
    tokenizer = hf.HFTokenizer(str(folder))
    if prompt == "system" and not about.system:
        with pytest.raises(InputError, match=r"refuses the messages \(system, user\): System role"):
            tokenizer.prompt_ids(messages)
        return
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.prompt_ids(messages) == expected
    if len(messages) == 1:
        assert tokenizer.prompt_ids(messages[0]["content"]) == expected
    if about.bos:
        assert expected.count(theirs.bos_token_id) <= 1


@pytest.mark.parametrize("response", RESPONSES)
def test_response_ids_are_what_the_template_puts_behind_the_prompt(family, response):
    """Up to the end of the turn. A template without one gets the tokenizer's end-of-text."""
    about, folder, theirs = family
    tokenizer = hf.HFTokenizer(str(folder))
    end = theirs.convert_tokens_to_ids(about.end)
    assert tokenizer.eos_id == end
    ids = tokenizer.response_ids(response)
    assert ids[-1] == end and end not in ids[:-1]
    prompt = [user("Is the tent wet?")]
    whole = theirs.apply_chat_template([*prompt, assistant(response)], return_dict=False)
    got = tokenizer.prompt_ids(prompt) + ids
    assert got == whole[: len(got)] or (got[:-1] == whole and end not in whole)
    text = tokenizer.decode(ids[:-1]).strip()
    assert text.removeprefix("<think>\n\n</think>\n\n") == response


@pytest.mark.parametrize("place", ["alone", "inside", "two"])
def test_special_tokens_that_a_user_types_are_text(family, place):
    """They have as many control tokens as a message without them, and the text is still there."""
    about, folder, theirs = family
    tokenizer = hf.HFTokenizer(str(folder))
    word = {"alone": about.end, "inside": f"a{about.end}b", "two": f"{about.eos}{about.end}"}
    typed = word[place]
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    if isinstance(
        theirs.backend_tokenizer.model, tokenizers.models.Unigram
    ):  # finds them in any text
        with pytest.raises(InputError, match="the tokenizer produces it from plain text"):
            tokenizer.prompt_ids(f"say {typed} now")
        return
    ids = tokenizer.prompt_ids(f"say {typed} now")
    plain = tokenizer.prompt_ids("say it now")
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert f"say {typed} now" in tokenizer.decode(ids)
    response = tokenizer.response_ids(f"say {typed} now")
    assert [i for i in response if i in special] == [tokenizer.eos_id]
    assert f"say {typed} now" in tokenizer.decode(response)


def test_the_system_message_goes_before_prompts_that_have_none(folders):
    """In training rows as well: a response follows from both."""
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama3"])
    tokenizer = hf.HFTokenizer(str(folders["llama3"]), system="Be kind.")
    options = {"add_generation_prompt": True, "return_dict": False}
    expected = theirs.apply_chat_template([SYSTEM, user("Hi!")], **options)
    assert tokenizer.prompt_ids("Hi!") == tokenizer.prompt_ids([user("Hi!")]) == expected
    own = [{"role": "system", "content": "Be rude."}, user("Hi!")]
    assert tokenizer.prompt_ids(own) == theirs.apply_chat_template(own, **options)
    plain = hf.HFTokenizer(str(folders["llama3"]))
    assert tokenizer.response_ids("Hello.") == plain.response_ids("Hello.")


def test_a_system_message_that_the_template_refuses_is_an_error_at_once(folders):
    with pytest.raises(InputError, match=r"refuses the messages \(system, user\): System role"):
        hf.HFTokenizer(str(folders["gemma"]), system="Be kind.")


def test_system_needs_a_template(folders):
    with pytest.raises(InputError, match="--system needs a chat template"):
        hf.HFTokenizer(str(folders["llama3"]), "none", "Be kind.")


def test_template_of_a_file(folders, tmp_path):
    """It replaces the model's, and a checkpoint keeps its text: the file may go."""
    file = tmp_path / "own.jinja"
    file.write_text(CHATML.replace("<|im_end|>", "<eos>"))
    tokenizer = hf.HFTokenizer(str(folders["llama3"]), str(file))
    file.unlink()
    again = hf.HFTokenizer(str(folders["llama3"]), tokenizer.template)
    assert tokenizer.decode(again.prompt_ids("Hi!")) == (
        "<|im_start|>user\nHi!<eos>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer.response_ids("Hello.")) == "Hello.<eos>"
    assert again.fingerprint == tokenizer.fingerprint
    assert again.fingerprint != hf.HFTokenizer(str(folders["llama3"])).fingerprint
    with pytest.raises(InputError, match="own.jinja does not exist"):
        hf.HFTokenizer(str(folders["llama3"]), str(file))


@pytest.mark.parametrize("template", ["nonee", CHATML.replace("'<|im_start|>assistant\n'", "'?'")])
def test_template_that_does_not_hold_the_response_is_refused(folders, template):
    """A misspelt "none" is a template that says always the same. The second asks for a response in
    another way than it writes one."""
    with pytest.raises(InputError, match="does not put a response where it asks for one"):
        hf.HFTokenizer(str(folders["smollm2"]), template)


def test_a_response_after_a_prompt_that_ends_in_a_space(folders):
    """The prompt's ids stay; the response's word is read without its space."""
    template = COLONS.replace("'Assistant:'", "'Assistant: '")
    tokenizer = hf.HFTokenizer(str(folders["falcon"]), template)
    theirs = transformers.AutoTokenizer.from_pretrained(folders["falcon"])
    prompt = theirs("User: Hi!\nAssistant: ")["input_ids"]
    assert tokenizer.prompt_ids("Hi!") == prompt
    expected = theirs("It is wet.")["input_ids"]
    assert tokenizer.response_ids("It is wet.") == [*expected, tokenizer.eos_id]


# ---- without a template ----

TEXTS = ["Answer:", "Hi! 🙂 naïve", "\n\nHuman: Hi!\n\nAssistant:", "  Two  spaces", "line\n\n"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("response", ["It is wet.", "(No)\n- 漢字 🙂", "user: 12"])
def test_without_a_template_ids_are_the_tokenizers_of_prompt_space_and_response(
    family, text, response
):
    """With begin-of-text once, if the tokenizer puts it there."""
    about, folder, theirs = family
    tokenizer = hf.HFTokenizer(str(folder), "none")
    expected = theirs(f"{text} {response}")["input_ids"]
    for prompt in (text, f"{text} "):  # the response's space is not there twice
        got = tokenizer.prompt_ids(prompt) + tokenizer.response_ids(response)
        assert got == [*expected, theirs.eos_token_id]
    assert expected.count(theirs.bos_token_id) == bool(about.bos)
    assert tokenizer.eos_id == theirs.eos_token_id


def test_without_a_template_messages_are_read_as_text(folders):
    tokenizer = hf.HFTokenizer(str(folders["llama3"]), "none")
    text = as_text(PROMPTS["turns"])
    assert tokenizer.prompt_ids(PROMPTS["turns"]) == tokenizer.prompt_ids(text)


def test_a_tokenizer_without_a_template_needs_none(folders, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["zephyr"])
    theirs.chat_template = None
    theirs.save_pretrained(tmp_path)
    auto, none = hf.HFTokenizer(str(tmp_path)), hf.HFTokenizer(str(tmp_path), "none")
    assert auto.prompt_ids("Hi!") == none.prompt_ids("Hi!") == theirs("Hi!")["input_ids"]
    assert auto.fingerprint == none.fingerprint


# ---- what ends a response ----


def test_stop_ids_are_the_end_of_the_turn_then_all_end_tokens_of_the_model(folders, tmp_path):
    """Each once. The pad is not the one that is learned."""
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama3"])
    theirs.save_pretrained(tmp_path)
    end, eos, header = theirs.convert_tokens_to_ids(["<|eot_id|>", "<eos>", "<|end_header_id|>"])
    assert hf.HFTokenizer(str(tmp_path)).stop_ids == (end, eos)
    assert hf.HFTokenizer(str(tmp_path), "none").stop_ids == (eos,)
    config = transformers.GenerationConfig(eos_token_id=[eos, header])
    config.save_pretrained(tmp_path)
    tokenizer = hf.HFTokenizer(str(tmp_path))
    assert (tokenizer.stop_ids, tokenizer.eos_id) == ((end, eos, header), end)
    kept = (header, end, eos, *range(10, 300))
    cut = hf.HFTokenizer(str(tmp_path), kept=kept)
    assert (cut.stop_ids, cut.eos_id, cut.pad_id) == ((1, 2, 0), 1, 0)


# ---- the scripts ----


def write_model(folder, tokenizer, width=16):
    """A tiny Llama of the tokenizer's size, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 64, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    model = transformers.LlamaForCausalLM(config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<|eot_id|>"])
    transformers.GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    return model


def as_messages(data):
    """Replace the prompts of the bundled data set by messages."""
    for path in data.glob("*.csv"):
        table = rows(path)
        for row in table:
            row["Prompt"] = as_cell([user(last_turn(row["Prompt"]))])
        write_csv(path, table)
    return data


@pytest.fixture(scope="module")
def chat(folders, tmp_path_factory):
    """The three scripts with a chat template, a system message, adapters and a part of the
    vocabulary, in new processes as far as rlhf.networks.hf can tell."""
    folder = tmp_path_factory.mktemp("chat")
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama3"])
    model = write_model(folder / "model", theirs)
    data = as_messages(copy_some_rows(folder / "data"))
    (data / "judge.py").unlink()
    file = folder / "own.jinja"
    file.write_text(LLAMA3)
    shared = ["--data", data, "--out", folder / "out", "--lora-rank", 2, "--lora-alpha", 8]
    init = ["--init", folder / "model", "--template", file, "--system", "Be kind.", "--cut-vocab"]
    scripts = {
        "sft": (train_sft.main, train_sft.SFTConfig, [*init, "--steps", 2, "--eval-every", 2]),
        "reward": (train_reward.main, train_reward.RewardConfig, ["--steps", 2]),
        "ppo": (train_ppo.main, train_ppo.PPOConfig, TINY["ppo"].split()),
    }
    shown = {}
    for name, (main, config, flags) in scripts.items():
        hf.load_base.cache_clear()
        hf_tokenizer.load_tokenizer.cache_clear()
        words = ["--device", "cpu", *shared, "--batch-size", 8, *flags]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            main(parse_cli(config, [str(word) for word in words]))
        shown[name] = out.getvalue()
        file.unlink(missing_ok=True)  # the later scripts find it in sft.pt
    return SimpleNamespace(
        data=data, out=folder / "out", shown=shown, model=model, tokenizer=theirs
    )


def test_facts_of_the_first_step_hold_with_a_template(chat):
    table = rows(chat.out / "ppo.csv")
    assert abs(float(table[0]["kl_ref"])) < 1e-4
    assert all(float(row["first_log_ratio"]) < 1e-4 for row in table)
    assert float(rows(chat.out / "reward.csv")[0]["loss"]) == pytest.approx(math.log(2), abs=1e-5)


@torch.no_grad()
def test_first_loss_is_that_of_transformers_on_the_templates_tokens(chat):
    """Of the kept tokens: the others have no logits."""
    table = rows(chat.data / "demonstrations.csv")
    kept = list(torch.load(chat.out / "sft.pt", weights_only=True)["model_config"]["kept"])
    end = chat.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    losses = []
    for i in batch_indices(len(table), 8, step=0, seed=0):
        messages = [SYSTEM, *json.loads(table[i]["Prompt"])]
        options = {"return_dict": False, "chat_template": LLAMA3}
        prompt = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        messages.append(assistant(table[i]["Response"].strip()))
        ids = chat.tokenizer.apply_chat_template(messages, **options)
        assert ids[: len(prompt)] == prompt and ids[-1] == end
        logprobs = chat.model(torch.tensor([ids])).logits[0][:, kept].log_softmax(dim=1)
        for t in range(len(prompt), len(ids)):
            losses.append(-logprobs[t - 1, kept.index(ids[t])])
    expected = torch.stack(losses).mean().item()
    got = float(rows(chat.out / "sft.csv")[0]["loss"])
    assert got == pytest.approx(expected, abs=1e-4)


def test_checkpoints_make_the_same_tokenizer(chat):
    """Template, system message and kept tokens are in them."""
    for name in ("sft", "reward", "ppo"):
        path = chat.out / f"{name}.pt"
        checkpoint = torch.load(path, weights_only=True)
        config = checkpoint["model_config"]
        assert (config["template"], config["system"]) == (LLAMA3, "Be kind.")
        assert (config["rank"], config["alpha"]) == (2, 8)
        tokenizer = tokenizer_of(path, checkpoint, "")
        messages = [SYSTEM, user("Hi!")]
        expected = chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert [tokenizer.kept[i] for i in tokenizer.prompt_ids("Hi!")] == expected
        ends = chat.tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<eos>"])
        assert [tokenizer.kept[i] for i in tokenizer.stop_ids] == ends


def test_samples_show_what_a_user_would_see(chat):
    """The last turn of the user above each response, without the template around it."""
    lines = chat.shown["sft"].splitlines()
    questions = {
        last_turn(read_prompt(row["Prompt"]))
        for row in rows(chat.data / "demonstrations_heldout.csv")
    }
    shown = [i for i, line in enumerate(lines) if line.startswith("        -> ")]
    assert len(shown) == 3
    for i in shown:
        assert lines[i - 1].strip().removeprefix("Human: ") in questions


def test_the_sample_tool_gives_a_dialogue_to_the_template(chat, monkeypatch, capsys):
    """And reward functions get messages."""
    given = []

    def respond(gpt, prompts, *_):
        given.extend(prompts)
        return [Response("", "Fine.", 0.0, None, 0.0, 1, ended=True)]

    monkeypatch.setattr("rlhf.evaluate.respond", respond)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\n"))
    words = ["--device", "cpu", "--checkpoint", str(chat.out / "ppo.pt"), "--data", str(chat.data)]
    sample.main(parse_cli(sample.SampleConfig, [*words, "--max-new-tokens", "5"]))
    dialogue = [user("one"), assistant("Fine."), user("two")]
    assert [prompt.given for prompt in given] == [[user("one")], dialogue]
    checkpoint = torch.load(chat.out / "ppo.pt", weights_only=True)
    tokenizer = tokenizer_of(chat.out / "ppo.pt", checkpoint, "")
    assert given[1].tokens == tokenizer.prompt_ids(dialogue)


def test_system_flag_of_the_sample_tool_replaces_the_checkpoints_message(
    chat, tmp_path, monkeypatch
):
    """The tokens are those of the template. A prompt with a system message of its own keeps it.
    The file has the prompts without the flag's message."""
    read = []
    real = responses.respond

    def respond(policy, prompts, *args):
        read.extend(prompts)
        return real(policy, prompts, *args)

    monkeypatch.setattr(responses, "respond", respond)
    given = [[user("Hi!")], [SYSTEM, user("Hi!")]]
    lines = [json.dumps({"prompt": messages}) for messages in given]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    words = ["--device", "cpu", "--checkpoint", str(chat.out / "sft.pt"), "--data", str(chat.data)]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    words += ["--system", "A tent!", "--max-new-tokens", "5"]
    sample.main(parse_cli(sample.SampleConfig, words))
    expected = [[{"role": "system", "content": "A tent!"}, user("Hi!")], given[1]]
    assert [prompt.given for prompt in read] == expected
    kept = torch.load(chat.out / "sft.pt", weights_only=True)["model_config"]["kept"]
    for prompt, messages in zip(read, expected):
        ids = chat.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert [kept[i] for i in prompt.tokens] == ids
    written = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in written] == given
    assert ["score" in json.loads(line) for line in written] == [True, True]


def test_streamed_response_of_a_model_of_transformers_is_what_is_sampled(chat, capsys):
    words = ["--device", "cpu", "--checkpoint", str(chat.out / "sft.pt"), "--data", str(chat.data)]
    cfg = parse_cli(sample.SampleConfig, [*words, "--max-new-tokens", "20"])
    [policy] = sample.load_policies(cfg)
    prompt = policy.encode("Hi!", cfg)
    for seed in range(3):
        frozen = policy.frozen
        [expected] = evaluate.respond(frozen.reference, [prompt], frozen, None, seed)
        assert sample.print_response(policy, prompt, seed) == expected.text
        shown = capsys.readouterr().out.removeprefix(f"{policy.path}: ")
        assert shown.startswith(printable(expected.text)) and expected.length > 3


def test_template_needs_a_release_in_which_special_tokens_of_a_user_are_text(folders, monkeypatch):
    monkeypatch.setattr("inspect.signature", lambda function: SimpleNamespace(parameters={}))
    with pytest.raises(InputError, match="a chat template needs transformers 5.20: pip install"):
        hf_tokenizer.HFTokenizer(str(next(iter(folders.values()))))


def test_label_shows_text_and_keeps_messages(chat, monkeypatch, capsys):
    """The reward model then reads a vote's prompt as the policy read it."""
    path = chat.out / "sft.pt"
    gpt, checkpoint = load_policy(path, "sft")
    monkeypatch.setattr(label_pairs, "has_ended", lambda tokens, *_: tokens[:, 0] == tokens[:, 0])
    prompts = [Prompt([user("naïve?")], [1, 2])]
    tokenizer = tokenizer_of(path, checkpoint, "")
    pair = label_pairs.SampledPairs(gpt, prompts, tokenizer, 8, seed=0).next_pair([])
    assert pair.prompt == '[{"role": "user", "content": "naïve?"}]'
    label_terminal.show(pair, "1 done")
    assert "\nHuman: naïve?\n\nAssistant:\n" in capsys.readouterr().out


@torch.no_grad()
def test_sampling_stops_at_each_end_token(chat):
    """And metrics, scores and texts know it: a model that says only the second one has ended."""
    checkpoint = torch.load(chat.out / "sft.pt", weights_only=True)
    tokenizer = tokenizer_of(chat.out / "sft.pt", checkpoint, "")
    second = tokenizer.stop_ids[1]

    def model(tokens):
        return nn.functional.one_hot(torch.full_like(tokens, second), tokenizer.vocab_size) * 1e3

    prompt = torch.tensor([tokenizer.prompt_ids("Hi!")])
    lens = torch.tensor([prompt.size(1)])
    tokens, mask = generate(model, prompt, lens, 9, tokenizer.stop_ids, torch.Generator())
    assert mask.sum() == 1 and tokens[0, -1] == second
    assert has_ended(tokens, mask, tokenizer.stop_ids).tolist() == [True]
    assert has_ended(tokens, mask, tokenizer.eos_id).tolist() == [False]
    assert decode_responses(tokenizer, tokens, mask) == [""]


def test_a_model_as_it_is_starts_ppo(chat, tmp_path):
    """train_sft.py --steps 0 needs no demonstrations, and its weights are the model's."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(chat.data / "prompts.csv", data)
    (tmp_path / "reward.py").write_text(
        "def score(prompts, responses):\n    return [len(prompts[i][-1]['content']) + len(text) "
        "for i, text in enumerate(responses)]\n"
    )
    shared = ["--device", "cpu", "--data", str(data), "--out", str(tmp_path / "out")]
    init = ["--init", str(chat.out.parent / "model"), "--steps", "0"]
    train_sft.main(parse_cli(train_sft.SFTConfig, [*shared, *init]))
    saved = torch.load(tmp_path / "out" / "sft.pt", weights_only=True)
    for name, weight in chat.model.model.state_dict().items():
        assert torch.equal(saved["model"][f"trunk.{name}"], weight)
    assert (saved["step"], "optimizer" in saved) == (0, False)
    assert not (tmp_path / "out" / "sft.csv").exists()
    flags = ["--reward", str(tmp_path / "reward.py"), *TINY["ppo"].split()]
    train_ppo.main(parse_cli(train_ppo.PPOConfig, [*shared, *flags]))
    assert len(rows(tmp_path / "out" / "ppo.csv")) == 4


def test_a_chat_model_in_4_bits_with_an_encoder_as_reward_model(folders, tmp_path):
    """The commands of docs/models.md, with tiny models. PPO's scores are the encoder's of the text
    of the dialogue."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[hf]")
    theirs = transformers.AutoTokenizer.from_pretrained(folders["qwen2"])
    write_model(tmp_path / "model", theirs, width=64)
    words = ["[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {f"##{word}": len(words) + number for number, word in enumerate(words[3:])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(tmp_path / "encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["initializer_range"] = 0.5
    config = transformers.BertConfig(vocab_size=len(vocabulary), intermediate_size=16, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "encoder")
    data = as_messages(copy_some_rows(tmp_path / "data"))
    (data / "judge.py").unlink()

    def run(main, config, flags):
        words = ["--device", "cpu", "--data", str(data), "--out", str(tmp_path), *flags.split()]
        main(parse_cli(config, words))

    adapters = "--lora-rank 2 --lora-alpha 4"
    init = f"--init {tmp_path / 'model'} --load-in-4bit {adapters} --steps 0"
    run(train_sft.main, train_sft.SFTConfig, init)
    encoder = f"--init {tmp_path / 'encoder'} --steps 3 --batch-size 8 --lr 0.01"
    run(train_reward.main, train_reward.RewardConfig, encoder)
    ppo = f"{TINY['ppo']} --value-network shared --missing-eos-score none"  # adapters: sft.pt's
    run(train_ppo.main, train_ppo.PPOConfig, ppo)

    table = rows(tmp_path / "ppo.csv")
    assert abs(float(table[0]["kl_ref"])) < 1e-4
    assert all(float(row["first_log_ratio"]) < 1e-4 for row in table)
    reward_model, checkpoint = load_reward_model(tmp_path / "reward.pt")
    tokenizer = tokenizer_of(tmp_path / "reward.pt", checkpoint, "")
    samples = rows(tmp_path / "ppo_samples.csv")
    prompts = [row["Prompt"] for row in samples]
    scores = score_texts(reward_model, tokenizer, prompts, [row["After"] for row in samples])
    expected = [pytest.approx(score, abs=1e-3) for score in scores]
    assert [float(row["score_after"]) for row in samples] == expected
