"""Write a checkpoint in the format of GPT-2's published files, for Hugging Face's transformers.

    python -m rlhf.tools.export --checkpoint runs/ppo.pt --out my_model        # sft.pt or ppo.pt

    my_model/config.json, my_model/pytorch_model.bin
    then: transformers.GPT2LMHeadModel.from_pretrained("my_model"), or train_sft.py --init my_model

The logits are the same. The tokenizer is not part of it: with GPT-2's, use GPT-2's; the data set's
own is in tokenizer.tiktoken, which transformers does not read.
"""

from dataclasses import dataclass
from pathlib import Path

from rlhf.networks.export import save_gpt2
from rlhf.run.errors import InputError
from rlhf.run.flags import arg
from rlhf.run.loading import load_policy, tokenizer_of
from rlhf.run.program import lock_of_run, run


@dataclass(frozen=True)
class ExportConfig:
    """Write sft.pt or ppo.pt as a folder that transformers reads."""

    checkpoint: str = arg("runs/ppo.pt", "sft.pt or ppo.pt")
    out: str = arg("runs/exported", "folder to write to")
    data: str = arg("", "data set folder (empty: the one it was trained on)")
    overwrite: bool = arg(False, "replace an earlier export in --out")

    def lock_file(self) -> Path | None:
        return lock_of_run(Path(self.out))


def main(cfg: ExportConfig) -> None:
    if any(Path(cfg.out).glob("*")) and not cfg.overwrite:
        raise InputError(f"--out {cfg.out} is not empty; give another folder, or --overwrite")
    path = Path(cfg.checkpoint)
    gpt, checkpoint = load_policy(path, "sft", "ppo")
    if "init" in checkpoint["model_config"]:
        raise InputError(f"{path} is no GPT-2: this program writes GPT-2's format only")
    tokenizer = tokenizer_of(path, checkpoint, cfg.data or checkpoint["config"]["data"])
    save_gpt2(gpt, Path(cfg.out), tokenizer.eos_id)
    parameters = sum(parameter.numel() for parameter in gpt.parameters())
    print(f"wrote {cfg.out}/config.json and {cfg.out}/pytorch_model.bin: {parameters:,} parameters")


if __name__ == "__main__":
    run(main, ExportConfig)
