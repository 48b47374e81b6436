"""Collect comparisons: a person says which of two responses is better, at the terminal or on a web
page.

    python -m rlhf.tools.label --checkpoint runs/sft.pt --out my_comparisons.csv
    python -m rlhf.tools.label --pairs pairs.jsonl --web
    python train_reward.py --comparison-files my_comparisons.csv

The code is in data/label.py, beside `prepare`: both make data sets.
"""

from data.label import LabelConfig, main
from rlhf.run.program import run

if __name__ == "__main__":
    run(main, LabelConfig)
