"""What rlhf/evaluate.py found, as rows of a CSV and as lines on the screen. No maths."""


def sample_rows(before: list[dict], after: list[dict]) -> list[dict]:
    """Rows of ppo_samples.csv: the same prompt answered before and after."""
    return [{"Prompt": a["prompt"], "Before": a["response"], "After": b["response"],
             "score_before": round(a["score"], 4), "score_after": round(b["score"], 4),
             "gold_before": a["gold"], "gold_after": b["gold"]} for a, b in zip(before, after)]


def shown(value) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def print_table(rows: list[dict]) -> None:
    """The rows of evaluation.csv, aligned."""
    rows = [{name: shown(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print(" | ".join(name.rjust(width) for name, width in widths.items()))
    for row in rows:
        print(" | ".join(row[name].rjust(width) for name, width in widths.items()))


def verdict(one: dict) -> str:
    return f"score {one['score']:+.2f}" + ("" if one["gold"] is None else f", gold {one['gold']:+.1f}")


def print_answers(answers: list[dict]) -> None:
    for one in answers:
        print(f"    {one['prompt'].strip().splitlines()[0]}\n        -> {one['response']}   ({verdict(one)})")


def print_pairs(before: list[dict], after: list[dict], count: int) -> None:
    for a, b in list(zip(before, after))[:count]:
        print(f"\n    {' / '.join(a['prompt'].split(chr(10) * 2)).strip(' /')}")
        for name, one in (("before", a), ("after", b)):
            print(f"      {name:>6} ({verdict(one)}): {one['response']}")
