"""The model card of an export: README.md, in the form of the Hugging Face hub."""

import json
import re
from pathlib import Path

STAGES = {
    "sft": "The policy after supervised fine-tuning (`train_sft.py`).",
    "reward": "A reward model (`train_reward.py`).",
    "ppo": "The policy after PPO (`train_ppo.py`).",
    "dpo": "The policy after DPO (`train_dpo.py`).",
}
# How it is loaded. FOLDER, BASE and OPTIONS are replaced.
CHAT = """
    from transformers import pipeline

    generate = pipeline("text-generation", model="FOLDER")
    generate([{"role": "user", "content": "Hi!"}], max_new_tokens=100)
"""
TEXT = CHAT.replace('[{"role": "user", "content": "Hi!"}]', '"Once"')
SCORE = """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("FOLDER")
    model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
"""
SCORE_CHAT = """\
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
    tokens = tokenizer.apply_chat_template(messages, return_tensors="pt")
    score = model(**tokens).logits
"""
SCORE_TEXT = """\
    tokens = tokenizer("Hi! Hello." + tokenizer.eos_token, return_tensors="pt")
    score = model(**tokens).logits
"""
ADAPTER = """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base = AutoModelForCausalLM.from_pretrained("BASE", OPTIONS)
    model = PeftModel.from_pretrained(base, "FOLDER")
    tokenizer = AutoTokenizer.from_pretrained("FOLDER")
"""


CARD = """\
---
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

## Metrics, the last of each

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
    base = checkpoint["model_config"].get("init") or config.get("init", "")
    licence = licence_of(base)
    header = ["tags: [rlhf]"]
    if licence:
        header.append(f"license: {licence}")
    else:
        notes = [*notes, "The licence is not known: see those of the base and of the data."]
    if base and not Path(base).exists():  # a name on the hub
        header.append(f"base_model: {base}")
    metrics = {}
    for row in checkpoint["metrics"]:
        metrics |= {name: value for name, value in row.items() if value is not None}
    return CARD.format(
        header="\n".join(header),
        name=Path(folder).name,
        stage=STAGES[checkpoint["kind"]],
        base=base or "a GPT of this project, trained from scratch",
        data=config["data"],
        notes="\n".join(f"- {note}" for note in notes),
        usage=usage.replace("FOLDER", folder),
        flags=json.dumps(config, indent=2),
        metrics=json.dumps(metrics, indent=2),
    )


def licence_of(base: str) -> str:
    """The licence in the model card of a base that lies in a folder; "" if it says none."""
    card = Path(base) / "README.md"
    if not base or not card.is_file():
        return ""
    found = re.search(r"^license: *(.+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""
