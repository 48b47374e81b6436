"""A training run: begin or resume it, log its metrics, save its checkpoints.

All training programs use it in the same way:

    run = Training(cfg, model, optimizer, compute, tokenizer, inputs)  # --resume loads the state
    run.announce("12,000 comparisons")
    for step in range(run.step, cfg.steps):
        ...                                                            # one step
        run.log(step + 1, metrics, show=("loss", ...))
        run.save(step + 1)                                             # every --eval-every steps
"""

import dataclasses
import json
from collections.abc import Sequence

import torch
from torch import nn

from rlhf.run.checkpoints import (
    FORMAT,
    check_tokenizer,
    fitting,
    load_checkpoint,
    load_optimizer,
)
from rlhf.run.commands import next_command
from rlhf.run.device import Compute
from rlhf.run.errors import InputError
from rlhf.run.files import append_csv, check_file, replacing, write_csv
from rlhf.run.flags import TrainConfig, to_json
from rlhf.run.messages import last_turn
from rlhf.run.optimizer import check_trained
from rlhf.run.processes import is_first
from rlhf.run.progress import Progress, print_adapters, print_responses, print_table, sample_rows
from rlhf.run.warnings import Warnings, of_policy
from rlhf.tokenizer import Tokenizer

# What lies beside the checkpoint of each kind: its metrics, its settings, and what the finished
# policy gives.
RESULTS = {
    "sft": ("sft.csv", "sft.json", "sft.warnings.txt"),
    "reward": (
        "reward.csv",
        "reward.json",
        "reward.warnings.txt",
        "reward_evaluation.csv",
        "reward_margins.csv",
    ),
    "ppo": ("ppo.csv", "ppo.json", "ppo.warnings.txt", "evaluation.csv", "ppo_samples.csv"),
    "dpo": ("dpo.csv", "dpo.json", "dpo.warnings.txt", "evaluation.csv", "dpo_samples.csv"),
}
# Settings that may change on --resume: they change no training step, or name files whose contents
# are compared.
MAY_CHANGE = {
    "config",
    "resume",
    "overwrite",
    "tensorboard",
    "device",
    "out",
    "data",
    "sft",
    "comparison_files",
    "log_every",
    "eval_every",
    "eval_prompts",
}


@dataclasses.dataclass
class Training:
    """A run of the kind cfg.kind, new or resumed.

    With --resume, model, optimizer and gradient scaler get the state of the checkpoint.

    Args: inputs: `digests` of the files that the run is made from.
    Raises: InputError if a new run would replace the results of another one without --overwrite, or
        if the checkpoint to resume is of another run.

    step: how many steps are done; rows: of the metrics CSV; path: of the checkpoint; progress: the
    lines on the screen; warnings: printed again at the end; state: the checkpoint's contents, such
    as PPO's kl_coef, if resumed.
    """

    cfg: TrainConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute: Compute
    tokenizer: Tokenizer
    inputs: dict[str, str]

    def __post_init__(self):
        self.path = self.cfg.checkpoint(self.cfg.kind)
        self.csv = self.path.with_suffix(".csv")
        self.csv_is_old = self.csv.exists()  # it stays until this run has a checkpoint
        self.results = [self.path.with_name(name) for name in RESULTS[self.cfg.kind]]
        self.state = {"step": 0, "metrics": []}
        if self.cfg.resume:
            self.state = self.resume()
        elif not self.cfg.overwrite:
            self.check_folder()
        self.step = self.state["step"]
        self.rows = list(self.state["metrics"])
        seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0
        self.progress = Progress(self.step, self.cfg.steps, seconds_before)
        self.warnings = Warnings()
        self.writer = self.open_tensorboard() if self.cfg.tensorboard and is_first() else None
        if self.cfg.resume:
            self.write_records()

    # ---- begin, or resume ----

    def check_folder(self) -> None:
        """Raise InputError if this folder holds the checkpoint or the results of another run."""
        for file in (self.path, *self.results):
            if file.exists():
                raise InputError(
                    f"{file} is of another run; give --resume to go on, --overwrite or another "
                    f"--out"
                )

    def resume(self) -> dict:
        """Load the checkpoint into model, optimizer and scaler, and return its contents."""
        path = self.path
        check_file(path, "so there is nothing to resume from; drop --resume")
        checkpoint = load_checkpoint(path, self.cfg.kind, unfinished=True)
        check_tokenizer(path, checkpoint, self.tokenizer)
        self.check_settings(checkpoint)
        with fitting(path):
            self.model.load_state_dict(checkpoint["model"])
            if "optimizer" in checkpoint:
                load_optimizer(self.optimizer, checkpoint["optimizer"])
                self.compute.scaler.load_state_dict(checkpoint["scaler"])
        return checkpoint

    def check_settings(self, checkpoint: dict) -> None:
        """Raise InputError if the checkpoint was begun with other settings or other files."""
        before = settings(checkpoint["config"], checkpoint["inputs"])
        now = settings(dataclasses.asdict(self.cfg), self.inputs)
        for name in sorted((before.keys() | now.keys()) - MAY_CHANGE):
            if before.get(name) != now.get(name):
                raise InputError(
                    f"--resume: {self.path} was begun with another {name} ({before.get(name)}, now "
                    f"{now.get(name)}); give the same, or --overwrite to start afresh"
                )

    # ---- metrics ----

    def announce(self, text: str) -> None:
        """Print what is trained, on what, where and how. The first step begins after it."""
        where = f"on {self.compute.device}, amp {self.cfg.amp}, seed {self.cfg.seed}"
        print(f"{text}, {where}")
        print_adapters(self.model)
        self.progress.start_clock()

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many steps: every --eval-every, and at the end."""
        return step % self.cfg.eval_every == 0 or step == self.cfg.steps

    def logs(self, step: int) -> bool:
        """Whether a line is due: after the first step, every --log-every, and at evaluations."""
        return step == 1 or step % self.cfg.log_every == 0 or self.evaluates(step)

    def count_tokens(self, tokens: int) -> None:
        """For tokens per second."""
        self.progress.tokens += tokens

    def log(self, step: int, metrics: dict[str, float | None], show: Sequence[str]) -> None:
        """Write a row of the CSV and, if one is due, print a line with the metrics named in show.

        step: how many are done. A metric is None if it is not measured at this step.
        """
        row = self.progress.row(step, metrics)
        if self.logs(step):
            self.progress.show(row, show)
        self.rows.append(row)
        if not self.csv_is_old:
            append_csv(self.csv, self.rows)
        if self.writer:
            for name, value in row.items():
                if value is not None:
                    self.writer.add_scalar(f"{self.cfg.kind}/{name}", value, step)
            self.writer.flush()

    def show_responses(self, step: int, responses: list) -> None:
        """Print responses (rlhf.evaluate.Response), which TensorBoard gets too."""
        print_responses(now=responses)
        if self.writer:
            for number, response in enumerate(responses):
                self.writer.add_text(
                    f"{self.cfg.kind}/response {number}",
                    f"{last_turn(response.prompt)}\n\n{response.text}",
                    step,
                )

    def write_records(self) -> None:
        """Write the metrics that belong to the checkpoint, and the settings for --config.

        What a run makes after its last step is removed: it comes from an older run, or is made
        again.
        """
        if is_first():
            for file in self.results[1:] if self.rows else self.results:
                file.unlink(missing_ok=True)
        if self.rows:  # none in 0 steps
            write_csv(self.csv, self.rows)
        self.csv_is_old = False
        with replacing(self.path.with_suffix(".json")) as file:
            print(json.dumps(to_json(self.cfg), indent=1), file=file)

    def open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs the package: pip install tensorboard") from error
        folder = self.path.parent / "tensorboard" / self.cfg.kind
        return SummaryWriter(folder, purge_step=self.step + 1)

    # ---- checkpoints, and the end ----

    def save(self, step: int, **state) -> None:
        """Write a checkpoint, and after it the metrics that belong to it.

        step: how many are done; state: what else the run needs to resume.
        """
        finished = step == self.cfg.steps
        if finished:
            check_trained(self.optimizer)
        network = getattr(self.model, "gpt", self.model)
        contents = {
            "format": FORMAT,
            "kind": self.cfg.kind,
            "model": self.model.state_dict(),
            "model_config": dataclasses.asdict(network.config),
            "config": dataclasses.asdict(self.cfg),
            "step": step,
            "metrics": self.rows,
            "tokenizer": self.tokenizer.fingerprint,
            "tokenizer_name": self.tokenizer.name,
            "inputs": self.inputs,
            **state,
        }
        if not finished:
            contents["optimizer"] = self.optimizer.state_dict()
            contents["scaler"] = self.compute.scaler.state_dict()
        with replacing(self.path, "wb") as file:
            torch.save(contents, file)
        self.write_records()

    def close_policy(self, rows: list[dict], before: list, after: list) -> None:
        """Write evaluation.csv and KIND_samples.csv beside the checkpoint, and close the run.

        Args: rows: of evaluation.csv; before, after: the reference's and the policy's
            rlhf.evaluate.Response to each prompt.
        """
        samples = f"{self.cfg.kind}_samples.csv"
        write_csv(self.path.with_name("evaluation.csv"), rows)
        write_csv(self.path.with_name(samples), sample_rows(before, after))
        print("\nbefore and after, on held-out prompts:")
        print_responses(before=before[:3], after=after[:3])
        print(f"\nevaluation.csv and {samples}, beside the checkpoint:\n")
        print_table(rows)
        texts = of_policy(self.cfg.kind.upper(), before, after)
        self.close(texts, "optimality", "report", "sample", "export")

    def close(self, texts: list[str], *programs: str) -> None:
        """Print what was written, all warnings, last these, and the commands that come next.

        The warnings are also in KIND.warnings.txt, a line each.
        """
        print(f"wrote {self.path}")
        self.warnings.close(texts)
        with replacing(self.path.with_suffix(".warnings.txt"), encoding="utf-8") as file:
            print(*self.warnings.texts, *texts, sep="\n", file=file)
        for name in programs:
            print(f"next: {next_command(self.cfg, name)}")


def settings(config: dict, inputs: dict[str, str]) -> dict:
    """{name: value} of all that determines a run: its flags, and the digests of its files."""
    return config | {f"{name} file": digest for name, digest in inputs.items()}
