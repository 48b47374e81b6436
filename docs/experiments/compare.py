"""Several policies that were trained from the same files, compared with one J*.

    python -m docs.experiments.compare --policies A/ppo.pt B/ppo.pt C/dpo.pt \\
        --sft runs/sft.pt --reward runs/reward.pt

J* is estimated from the samples of all of them (rlhf/tools/optimality.py). Each folder gets its own
tables. Name a good policy first: the optimum is measured as a difference to it, and the error is
small if that is small.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rlhf.run import processes, program
from rlhf.run.errors import InputError
from rlhf.run.files import check_file
from rlhf.run.flags import arg
from rlhf.tools.optimality import OptimalityConfig, Run, compare_with_optimum, load_run


@dataclass(frozen=True)
class CompareConfig(OptimalityConfig):
    """Compare several policies of one objective with its best policy."""

    policies: tuple[str, ...] = arg(("runs/ppo.pt",), "the policies, in place of --checkpoint")

    def __post_init__(self):
        super().__post_init__()
        folders = {Path(policy).parent.resolve() for policy in self.policies}
        if len(folders) < len(self.policies):
            raise ValueError("--policies: each must be in another folder")

    def lock_file(self) -> None:
        """main locks all folders."""


def main(cfg: CompareConfig) -> None:
    with contextlib.ExitStack() as locks:
        for policy in cfg.policies:
            path = check_file(Path(policy), "name the policy of a finished run")
            if processes.is_first():
                locks.enter_context(program.lock(path.with_name(".lock")))
        compare_with_optimum(load_runs(cfg), cfg)


def load_runs(cfg: CompareConfig) -> list[Run]:
    """The run of each policy. Raises InputError if the optimum of one is not that of the first."""
    runs = []
    for policy in cfg.policies:
        run = load_run(dataclasses.replace(cfg, checkpoint=policy))
        runs.append(run)
        settings = objective_settings(run)
        for name, value in objective_settings(runs[0]).items():
            if settings[name] != value:
                raise InputError(
                    f"{policy} has another {name} than {cfg.policies[0]}, so their optima differ; "
                    f"call this program once for each"
                )
    return runs


def objective_settings(run: Run) -> dict:
    """What the optimum and its estimate depend on."""
    inputs = {}
    for name, digest in run.checkpoint["inputs"].items():
        if name.startswith(("sft", "reward")):
            inputs[name] = digest
    frozen = run.frozen
    return {
        "kl_coef": run.checkpoint["kl_coef"],
        "temperature": run.gpt.temperature,
        "list of held-out prompts": run.prompts,
        "weights of the rewards": frozen.weights,
        "files of sft and rewards": inputs,
        "seed": run.checkpoint["config"]["seed"],
        "max_new_tokens": (frozen.shortest_limit, frozen.max_new_tokens),
        "missing_eos_score": frozen.missing_eos_score,
        "amp": frozen.amp,
    }


if __name__ == "__main__":
    program.run(main, CompareConfig)
