"""Collect comparisons: a person at the keyboard says which of two sampled answers is better.

    python -m rlhf.tools.label --checkpoint runs/sft.pt --out my_comparisons.csv
    python train_reward.py --comparison-files my_comparisons.csv

The code is in data/label.py, beside `prepare`: both make data sets.
"""

from data.label import LabelConfig, main
from rlhf.run.program import run

if __name__ == "__main__":
    run(main, LabelConfig)
