"""What is printed of policies, and facts that hold in every run. train_ppo.py would train without them."""

import pandas


def sample_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of ppo_samples.csv: a response to each prompt before and after."""
    return [{"Prompt": a["prompt"], "Before": a["response"], "After": b["response"],
             "score_before": round(a["score"], 4), "score_after": round(b["score"], 4),
             "gold_before": a["gold"], "gold_after": b["gold"]} for a, b in zip(before, after)]


def print_table(rows: list[dict]) -> None:
    """Rows of the same columns, aligned, such as those of evaluation.csv."""
    print(pandas.DataFrame(rows).to_string(index=False, na_rep="", float_format="%.3f"))


def print_responses(**policies: list[dict]) -> None:
    """Each prompt, and under it what the policies, of these names, say to it."""
    for said in zip(*policies.values()):
        print(f"    {said[0]['prompt'].strip().splitlines()[0]}")
        for name, one in zip(policies, said):
            gold = "" if one["gold"] is None else f", gold {one['gold']:+.1f}"
            print(f"        {name} -> {one['response']}   (score {one['score']:+.2f}{gold})")


def check_first_step(step: int, kl_ref: float, first_log_ratio: float, amp) -> None:
    """Facts that hold whatever the data: kl_ref is 0 at step 0, and the ratio is 1 in the first minibatch of each step.
    If one fails, two of the forward passes disagree."""
    tolerance = 1e-4 if amp is None else 0.1
    kl_start = kl_ref if step == 0 else 0.0
    if not (abs(kl_start) <= tolerance and first_log_ratio <= tolerance):  # `not <=`, so that NaN fails too
        fault = (f"kl_ref is {kl_start} before the first update, and the log ratio {first_log_ratio} in the first "
                 f"minibatch; both must be 0: two of the forward passes disagree")
        if amp is None:
            raise RuntimeError(fault)
        print(f"warning: {fault}")  # in half precision an unlikely token may be off by this much
    if kl_ref < -1:
        print(f"warning: kl_ref is {kl_ref:.2f} nats; a KL this negative means that sampler and scorer disagree")
