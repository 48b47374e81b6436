"""Lines printed while a program runs."""

import time
from collections.abc import Iterator, Sequence

import pandas
from torch import Tensor, nn

from rlhf.run.errors import printable
from rlhf.run.messages import in_one_line, last_turn
from rlhf.tokenizer import Tokenizer


def format_seconds(seconds: float) -> str:
    """59 s, 1.5 min."""
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def ticker(items: Sequence, what: str, seconds: float = 10.0) -> Iterator:
    """Yield the items, and print every so many seconds how many are done and the time left."""
    began = time.perf_counter()
    last_line = began
    for done, item in enumerate(items):
        now = time.perf_counter()
        if now - last_line > seconds:
            left = format_seconds((now - began) / done * (len(items) - done))
            print(f"    {what}: {done} of {len(items)}, {left} left", flush=True)
            last_line = now
        yield item


def print_table(rows: list[dict]) -> None:
    """Print rows of the same columns, aligned, such as those of evaluation.csv. None is empty."""
    frame = pandas.DataFrame(rows).fillna(float("nan"))  # a column of None is one of objects
    print(frame.to_string(index=False, na_rep="", float_format="%.3f"))


# ---- responses ----


def sample_rows(before: list, after: list) -> list[dict]:
    """Rows of ppo_samples.csv: an rlhf.evaluate.Response to each prompt before and after."""
    rows = []
    for old, new in zip(before, after):
        row = {
            "Prompt": old.prompt,
            "last_turn": last_turn(old.prompt),
            "Before": old.text,
            "After": new.text,
            "score_before": old.score,
            "score_after": new.score,
            "gold_before": old.gold,
            "gold_after": new.gold,
        }
        rows.append(row)
    return rows


def token_rows(
    responses: list, rewards: Tensor, experience, after, tokenizer: Tokenizer
) -> list[dict]:
    """Rows of ppo_tokens.csv: each token of some responses, and the numbers of its slot.

    Args: responses: rlhf.evaluate.Response of the first rows of a step's rewards (B, T-1) and
        rlhf.ppo.Experience; after: their rlhf.rollout.Rollout after the update.
    """
    columns = {
        "token": after.tokens[:, 1:],
        "logprob": experience.old_logprobs,
        "ref_logprob": after.ref_logprobs,
        "reward": rewards,
        "value": experience.old_values,
        "advantage": experience.advantages,
        "return": experience.returns,
        "new_logprob": after.logprobs,
        "new_value": after.values,
    }
    numbers, slots = after.mask.nonzero(as_tuple=True)  # (S,), (S,)
    # All numbers of a column at once, as each copy makes the host wait for a GPU.
    lists = [x[numbers, slots].tolist() for x in columns.values()]
    rows = []
    for number, *values in zip(numbers.tolist(), *lists):
        response = responses[number]
        row = {
            "response": number,
            "prompt": last_turn(response.prompt),
            "score": response.score,
            "gold": response.gold,
            "length": response.length,
            "ended": int(response.ended),
            **dict(zip(columns, values)),
        }
        row["token"] = tokenizer.decode([row["token"]])
        rows.append(row)
    return rows


def print_responses(**policies: list) -> None:
    """Each prompt, and under it what the policies, of these names, say to it."""
    for responses in zip(*policies.values()):
        print(f"    {printable(in_one_line(responses[0].prompt))}")
        for name, response in zip(policies, responses):
            gold = "" if response.gold is None else f", gold {response.gold:+.1f}"
            text = printable(response.text)
            print(f"        {name} -> {text}   (score {response.score:+.2f}{gold})")


def count_parameters(model: nn.Module) -> str:
    """In words."""
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def print_adapters(model: nn.Module) -> None:
    """With adapters (LoRA), print how many numbers are trained, and the names of their layers."""
    layers = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith(".A")}
    if layers:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"LoRA trains {count:,} numbers, with adapters in {', '.join(sorted(layers))}")


def print_training_row(tokens: list[int], prompt_len: int, tokenizer: Tokenizer) -> None:
    """Print one row with its mask."""
    prompt = tokenizer.decode(tokens[:prompt_len])
    response = tokenizer.decode(tokens[prompt_len:])
    print(f"one row, | where the loss begins: {prompt!r} | {response!r}")


# ---- training ----


class Progress:
    """One aligned line on the screen for each logged step, with tokens per second and time left.

    Whoever trains adds to `tokens`.

    Args: start: the steps done before a resume; steps: of the whole run; seconds_before: what the
        steps before the resume took.
    """

    def __init__(self, start: int, steps: int, seconds_before: float = 0.0):
        self.start = start
        self.steps = steps
        self.seconds_before = seconds_before
        self.start_clock()
        self.elapsed = 0.0  # seconds, at the last row
        self.tokens = 0  # processed so far
        self.lines = 0

    def start_clock(self) -> None:
        self.began = time.perf_counter()

    def row(self, step: int, metrics: dict[str, float | None]) -> dict:
        """The metrics with the columns step, tokens_per_s and seconds. step: how many are done."""
        self.elapsed = time.perf_counter() - self.began
        return {
            "step": step,
            **metrics,
            "tokens_per_s": round(self.tokens / self.elapsed),
            "seconds": round(self.seconds_before + self.elapsed, 1),
        }

    def show(self, row: dict, columns: Sequence[str]) -> None:
        """Print a row's step, these columns, tokens per second and time left. None is empty."""
        seconds_per_step = self.elapsed / (row["step"] - self.start)
        seconds_left = seconds_per_step * (self.steps - row["step"])
        cells = {"step": f"{row['step']}/{self.steps}"}
        for name in columns:
            cells[name] = format_cell(name, row[name])
        cells["tokens/s"] = f"{row['tokens_per_s']:,}"
        cells["left"] = format_seconds(seconds_left)
        if self.lines % 25 == 0:
            print("  ".join(name.rjust(8) for name in cells))
        line = [cell.rjust(max(8, len(name))) for name, cell in cells.items()]
        print("  ".join(line), flush=True)
        self.lines += 1


def format_cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if name == "lr" else f"{value:.3f}"
