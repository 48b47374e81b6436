"""Make a data set of the files that people have, and print the commands that train on it.

    python -m rlhf.tools.prepare pairs.jsonl --out mine
    python -m rlhf.tools.prepare answers.json pairs.csv questions.txt --out mine
    python -m rlhf.tools.prepare ranked.csv --ranked "worst,middle,best" --out mine

The code is in data/prepare.py, beside the recipes of other data sets.
"""

from data.prepare import PrepareConfig, main
from rlhf.run.program import run

if __name__ == "__main__":
    run(main, PrepareConfig)
