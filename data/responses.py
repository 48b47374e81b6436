"""The responses of policies to a file of prompts: `python -m rlhf.tools.sample --prompts FILE`.

The prompts are those of a file of any shape that data/formats.py knows, each once. The responses
go to a file of JSON lines, as soon as they are sampled:

    {"run": "0123456789abcdef", "prompt": "Why?", "response": "So.", "checkpoint": "runs/ppo.pt",
     "ended": true, "score": 0.1234, "gold": 2.0}

prompt is text or messages, as the file has it; score and gold are there if they are at hand. run is
a digest of the flags and of all files that the responses follow from. If the program is killed, the
same command continues after the last whole line, and the file gets the same bytes. A file with
lines of another run is refused.
"""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch

from data.formats import read_prompts
from rlhf.data import Prompt, pad_prompts
from rlhf.evaluate import Response, describe
from rlhf.model import PolicyWithoutValue
from rlhf.rollout import collect
from rlhf.run.device import make_generator
from rlhf.run.errors import InputError
from rlhf.run.files import digest, writing
from rlhf.run.messages import TextOrMessages, read_prompt
from rlhf.run.program import lock
from rlhf.run.progress import format_seconds
from rlhf.run.tables import check_lengths
from rlhf.sampling import draw_uniforms

FIRST_KEY = '{"run": "'  # begins each line
SECONDS = 5.0  # between two lines of progress


def write_responses(policies: list, cfg) -> None:
    """Write a line to --out for each response to --prompts; those of one prompt stand together.

    Args: policies: of rlhf.tools.sample; cfg: its SampleConfig.
    """
    if cfg.prompt:
        raise InputError("give --prompt TEXT or --prompts FILE, not both")
    cells = read_prompts(Path(cfg.prompts))
    given = [read_prompt(cell) for cell in cells for _ in range(cfg.n)]
    encoded = [encode_all(policy, cells, cfg) for policy in policies]
    with lock(Path(f"{cfg.out}.lock")):
        write_lines(policies, given, encoded, cfg)


def encode_all(policy, cells: dict[str, int], cfg) -> list[Prompt]:
    """What a policy reads, each prompt cfg.n times.

    Args: cells: {a prompt, as the CSV of a data set holds it: the number of its row}.
    Raises: InputError that names the row if one is too long.
    """
    prompts = [policy.encode(read_prompt(cell), cfg) for cell in cells]
    lengths = [len(prompt.tokens) for prompt in prompts]
    limit = policy.frozen.context - policy.frozen.max_new_tokens
    fix = "give a smaller --max-new-tokens, "
    check_lengths(Path(cfg.prompts), list(cells.values()), lengths, limit, "the prompt", fix)
    return [prompt for prompt in prompts for _ in range(cfg.n)]


def write_lines(
    policies: list, given: list[TextOrMessages], encoded: list[list[Prompt]], cfg
) -> None:
    """Write the lines that --out lacks, in batches.

    Args: given: the prompts; encoded: for each policy, what it reads.
    """
    out = Path(cfg.out)
    run = name_run(policies, cfg)
    total = len(given) * len(policies)
    done = count_lines(out, run, cfg.overwrite)
    print(f"{out}: {done:,} of {total:,} responses are there", flush=True)
    if done == total:
        return
    # A resumed run has the batches of an uninterrupted one, because rounding depends on them.
    batch, skipped = divmod(done, cfg.sample_rows * len(policies))
    progress = Progress(done - skipped, total)
    for start in range(batch * cfg.sample_rows, len(given), cfg.sample_rows):
        rows = slice(start, start + cfg.sample_rows)
        columns = []
        for policy, prompts in zip(policies, encoded):
            columns.append(respond(policy, prompts[rows], start, cfg.seed))
        lines = []
        for prompt, *responses in zip(given[rows], *columns):
            for policy, response in zip(policies, responses):
                lines.append(make_line(run, prompt, policy, response))
        with writing(out), out.open("ab") as file:
            file.write("".join(lines[skipped:]).encode())
        progress.show(len(lines))
        skipped = 0


def respond(policy, prompts: list[Prompt], first: int, seed: int) -> list[Response]:
    """A response to each prompt.

    Args: first: the number of the first response. The random numbers of each follow from the seed
        and from its number, so they do not depend on the batch.
    """
    frozen = policy.frozen
    device = next(frozen.reference.parameters()).device
    tokens, prompt_lens = pad_prompts(prompts, frozen.tokenizer.pad_id, device)  # (B, P), (B,)
    uniforms = []
    for number in range(first, first + len(prompts)):
        generator = make_generator(device, seed, "response", number)
        uniforms.append(draw_uniforms(generator, tokens[:1], frozen.max_new_tokens))  # (1, N)
    network = PolicyWithoutValue(frozen.reference)
    rollout = collect(network, frozen, tokens, prompt_lens, torch.cat(uniforms), prompts)
    return describe(prompts, rollout, frozen.tokenizer, policy.judge)


class Progress:
    """Prints how many responses are done and the time left.

    Args: done: those of earlier calls.
    """

    def __init__(self, done: int, total: int):
        self.before = done
        self.done = done
        self.total = total
        self.began = time.perf_counter()
        self.printed = -SECONDS  # when the last line was, in seconds since then

    def show(self, count: int) -> None:
        """Count some more, and print a line if the last one was SECONDS ago or all are done."""
        self.done += count
        seconds = time.perf_counter() - self.began
        if self.done == self.total or seconds - self.printed >= SECONDS:
            left = seconds / (self.done - self.before) * (self.total - self.done)
            print(f"    {self.done:,} of {self.total:,}, {format_seconds(left)} left", flush=True)
            self.printed = seconds


# ---- the file ----


def make_line(run: str, prompt: TextOrMessages, policy, response: Response) -> str:
    record = {"run": run, "prompt": prompt, "response": response.text}
    record |= {"checkpoint": str(policy.path), "ended": response.ended}
    record |= policy.known_numbers(response)
    return json.dumps(record, ensure_ascii=False) + "\n"


def name_run(policies: list, cfg) -> str:
    """A digest of the flags and of the files that the responses and their scores follow from."""
    first = policies[0]
    files = [cfg.prompts, *cfg.checkpoint]
    files += [function.path for function in first.frozen.functions]
    if first.frozen.reward_model is not None:
        files.append(cfg.rewards().model)
    if first.judge is not None:
        files.append(first.judge.__file__)
    digests = [digest(Path(file)) for file in files]
    flags = asdict(cfg) | {"out": "", "overwrite": False}
    return hashlib.sha256(repr((flags, digests)).encode()).hexdigest()[:16]


def count_lines(out: Path, run: str, overwrite: bool) -> int:
    """How many lines of this run the file holds. What follows the last whole one is removed.

    Args: overwrite: all lines are removed, also those of other runs.
    Raises: InputError if it holds anything else.
    """
    begin = (FIRST_KEY if overwrite else FIRST_KEY + run).encode()
    data = out.read_bytes() if out.is_file() else b""
    *lines, torn = data.split(b"\n")
    whole = all(line.startswith(begin) for line in lines)
    if not whole or torn[: len(begin)] != begin[: len(torn)]:
        raise InputError(
            f"{out} holds something else than responses of this run: other prompts, checkpoints, "
            f"rewards or flags; give another --out, or --overwrite to replace responses"
        )
    with writing(out), out.open("ab") as file:
        file.truncate(0 if overwrite else len(data) - len(torn))
    return 0 if overwrite else len(lines)
