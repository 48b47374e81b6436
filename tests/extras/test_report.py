"""What train_ppo.py shows of its policies."""

from rlhf.extras.report import print_responses, print_table, sample_rows

BEFORE = {"prompt": "\n\nHuman: Hi.\n\nAssistant:", "response": "Go away.", "score": -0.123456, "gold": -1.0}
AFTER = {**BEFORE, "response": "Hello.", "score": 1.5, "gold": 2.0}


def test_print_table_is_aligned_and_leaves_missing_numbers_empty(capsys):
    print_table([{"policy": "sft", "score": 0.25, "prompts": 500}, {"policy": "optimum", "score": None, "prompts": 3}])
    assert capsys.readouterr().out.splitlines() == [
        " policy  score  prompts",
        "    sft  0.250      500",
        "optimum               3"]


def test_sample_rows_put_both_responses_side_by_side():
    assert sample_rows([BEFORE], [AFTER]) == [{
        "Prompt": BEFORE["prompt"], "Before": "Go away.", "After": "Hello.", "score_before": -0.1235,
        "score_after": 1.5, "gold_before": -1.0, "gold_after": 2.0}]


def test_print_responses_shows_each_prompt_with_what_the_policies_say(capsys):
    print_responses(before=[BEFORE, BEFORE], after=[AFTER, {**AFTER, "gold": None}])
    assert capsys.readouterr().out.splitlines() == [
        "    Human: Hi.",
        "        before -> Go away.   (score -0.12, gold -1.0)",
        "        after -> Hello.   (score +1.50, gold +2.0)",
        "    Human: Hi.",
        "        before -> Go away.   (score -0.12, gold -1.0)",
        "        after -> Hello.   (score +1.50)"]
