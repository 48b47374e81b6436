"""What train_ppo.py shows of its policies. It would train without it."""

import pandas


def sample_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of ppo_samples.csv: a response to each prompt before and after."""
    return [{"Prompt": a["prompt"], "Before": a["response"], "After": b["response"],
             "score_before": round(a["score"], 4), "score_after": round(b["score"], 4),
             "gold_before": a["gold"], "gold_after": b["gold"]} for a, b in zip(before, after)]


def print_table(rows: list[dict]) -> None:
    """The rows of evaluation.csv, aligned."""
    print(pandas.DataFrame(rows).to_string(index=False, na_rep="", float_format="%.3f"))


def print_responses(**policies: list[dict]) -> None:
    """Each prompt, and under it what the policies, of these names, say to it."""
    for said in zip(*policies.values()):
        print(f"    {said[0]['prompt'].strip().splitlines()[0]}")
        for name, one in zip(policies, said):
            gold = "" if one["gold"] is None else f", gold {one['gold']:+.1f}"
            print(f"        {name} -> {one['response']}   (score {one['score']:+.2f}{gold})")
