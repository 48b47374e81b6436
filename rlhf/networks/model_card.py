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
# How it is loaded. The words in capitals are replaced.
POLICY = """
    from transformers import pipeline

    generate = pipeline("text-generation", model="FOLDER")
    generate(PROMPT, max_new_tokens=100)
"""
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
license: {licence}
---
# {name}

{stage}

- Base: {base}.
- Data: {data}.
- {notes}

## How to load it
{usage}
## Flags and last metrics

```json
{run}
```

Written by `python -m rlhf.tools.export`.
"""


def model_card(folder: Path, checkpoint: dict, usage: str, notes: list[str]) -> str:
    """README.md: what was trained from what, how to load it, and how it was trained.

    Args: folder: where it will lie; usage: one of the texts above; notes: sentences about it.
    """
    flags = checkpoint["config"]
    base = checkpoint["model_config"].get("init") or flags.get("init")
    run = {"flags": flags, "metrics": checkpoint["metrics"][-1:]}
    values = {
        "name": folder.name,
        "stage": STAGES[checkpoint["kind"]],
        "base": base or "none, trained from scratch",
        "licence": licence_of(base),
        "data": flags["data"],
        "notes": "\n- ".join(notes),
        "usage": usage.replace("FOLDER", str(folder)),
        "run": json.dumps(run, indent=2),
    }
    return CARD.format(**values)


def licence_of(base: str | None) -> str:
    """The licence in the model card of a base that lies in a folder, else "unknown"."""
    card = Path(base or "", "README.md")
    if not base or not card.is_file():
        return "unknown"
    found = re.search("^license: *(.+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"
