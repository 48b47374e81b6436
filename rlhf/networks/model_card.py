"""The model card of an export: README.md, in the form of the Hugging Face hub."""

import json
from pathlib import Path

STAGES = {
    "sft": "The policy after supervised fine-tuning (`train_sft.py`).",
    "reward": "A reward model (`train_reward.py`).",
    "ppo": "The policy after PPO (`train_ppo.py`).",
    "dpo": "The policy after DPO (`train_dpo.py`).",
}
# How it is loaded. FOLDER and DTYPE are replaced.
POLICY = """
    from transformers import pipeline

    generate = pipeline("text-generation", model="FOLDER")
    generate([{"role": "user", "content": "Hi!"}], max_new_tokens=100)
"""
POLICY_OF_TEXT = POLICY.replace('[{"role": "user", "content": "Hi!"}]', '"Once"')
REWARD_MODEL = """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("FOLDER")
    model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    score = model(**tokenizer.apply_chat_template(messages, return_tensors="pt")).logits
"""
ADAPTER = """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="DTYPE")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
ADAPTER_ON_4_BITS = """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="DTYPE",
    )
    model = AutoModelForCausalLM.from_pretrained(
        "FOLDER", dtype="DTYPE", quantization_config=four_bits
    )
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""
CARD = """\
---
tags: [rlhf]
{header}
---
# {name}

{stage}

- Base: {base}.
- Data: {data}.
{notes}

## How to load it
{usage}
## Flags

```json
{flags}
```

## Last metrics

```json
{metrics}
```

Written by `python -m rlhf.tools.export`.
"""


def model_card(folder: str, checkpoint: dict, usage: str, notes: list[str]) -> str:
    """README.md: what was trained from what, how to load it, and how it was trained.

    Args: folder: where it will lie; usage: one of the texts above; notes: sentences about it.
    """
    config = checkpoint["config"]
    base = checkpoint["model_config"].get("init") or config.get("init")
    header = f"base_model: {base}\nlicense: {licence_of(base)}" if base else "license: unknown"
    return CARD.format(
        header=header,
        name=Path(folder).name,
        stage=STAGES[checkpoint["kind"]],
        base=base or "a GPT of this project, trained from scratch",
        data=config["data"],
        notes="\n".join(f"- {note}" for note in notes),
        usage=usage.replace("FOLDER", folder),
        flags=json.dumps(config, indent=2),
        metrics=json.dumps(checkpoint["metrics"][-1:], indent=2),
    )


def licence_of(base: str) -> str:
    """The licence in the model card of a base that lies in a folder, else "unknown"."""
    card = Path(base) / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8").splitlines():
            if line.startswith("license:"):
                return line.removeprefix("license:").strip()
    return "unknown"
