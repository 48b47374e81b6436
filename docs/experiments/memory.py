"""Peak memory of loading a pretrained model, and of a PPO step with it.

    python docs/experiments/memory.py --init MODEL --lora-rank 16 --cut-vocab [--load-in-4bit]

Takes the flags of train_sft.py, which writes the model as it is. The PPO step has 8 prompts of the
data set, responses of at most 8 tokens, micro-batches of 4 rows, and a shared value network.
Prints MB above what Python, its packages and the tokenizer take. Memory is anonymous (RssAnon):
pages of a file that is mapped do not count, as the system may drop them. glibc keeps much of what
is freed unless MALLOC_MMAP_THRESHOLD_=1000000 is set. Linux only.
"""

import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import train_ppo
import train_sft
from rlhf.networks.hf_tokenizer import load_tokenizer
from rlhf.networks.pretrained import package
from rlhf.run import loading, program
from rlhf.run.flags import parse_cli

REWARD = "def score(prompts, responses):\n    return [len(text) / 100 for text in responses]\n"
PPO = (
    "--steps 1 --batch-size 8 --minibatch-size 8 --micro-batch-size 4 --max-new-tokens 8 "
    "--inner-epochs 1 --eval-prompts 2 --value-network shared"
)


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no RssAnon in /proc/self/status")


class Peak:
    """The largest anonymous memory inside a `with`, looked at every 2 ms."""

    def __enter__(self):
        self.mb = anonymous_mb()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.over.wait(0.002):
            self.mb = max(self.mb, anonymous_mb())

    def __exit__(self, *error) -> None:
        self.over.set()
        self.thread.join()


def main(cfg: train_sft.SFTConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(cfg, steps=0, out=folder)
        load_tokenizer(cfg.init)
        package("bitsandbytes")
        before = anonymous_mb()
        with Peak() as peak:
            network = loading.start_from(cfg)
        lines = [f"loading: {peak.mb - before:,.0f} MB at most"]
        lines.append(f"loaded: {anonymous_mb() - before:,.0f} MB")
        del network
        train_sft.main(cfg)
        reward = Path(folder) / "reward.py"
        reward.write_text(REWARD)
        flags = [*PPO.split(), "--data", cfg.data, "--out", folder, "--reward", str(reward)]
        flags += ["--lora-rank", str(cfg.lora_rank)]
        with Peak() as peak:
            train_ppo.main(parse_cli(train_ppo.PPOConfig, flags))
        lines.append(f"PPO step: {peak.mb - before:,.0f} MB at most")
    print("", *sys.argv, *lines, sep="\n")


if __name__ == "__main__":
    program.run(main, train_sft.SFTConfig)
