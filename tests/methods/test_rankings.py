"""Rankings: reading them, and the loss over all pairs of a prompt from one forward pass."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.methods.rankings import Ranking, load_rankings, score_rankings
from rlhf.run.device import setup
from rlhf.run.errors import InputError
from rlhf.tokenizer import load_tokenizer
from tests.helpers import BUNDLED

COMPUTE = setup("cpu", "off")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BUNDLED / "tokenizer.tiktoken"))


def write(tmp_path, *lines):
    """rankings.csv, and a held-out file, so that no prompt of it is held out."""
    text = "\n".join(["Prompt,Response,Rank", *lines]) + "\n"
    (tmp_path / "rankings.csv").write_text(text)
    (tmp_path / "comparisons_heldout.csv").write_text("Prompt,Chosen,Rejected\nz,x,y\n")


# ---- reading ----


def test_load_rankings_makes_one_ranking_per_prompt(tokenizer, tmp_path, capsys):
    """Prompt a has three responses that are not in neighbouring rows. The two of b are tied and c
    has one: both are dropped. Ranks may be any numbers: only their order counts."""
    write(
        tmp_path,
        "a,one,1e30",
        "b,one,1",
        "a,two,-0.5",
        "c,one,1",
        "b,two,1",
        "a,three,1e30",
    )
    (got,) = load_rankings(str(tmp_path), tokenizer, 80)
    assert got.ranks == [2, 1, 2]
    assert [tokenizer.decode(row[:-1]) for row in got.responses] == ["a one", "a two", "a three"]
    assert all(row[-1] == tokenizer.eos_id for row in got.responses)
    assert "3 of 6 rows left out" in capsys.readouterr().out


def test_load_rankings_keeps_first_of_equal_responses(tokenizer, tmp_path, capsys):
    """Ranking a keeps "one" with its first rank. Ranking b has nothing else and is dropped. Another
    ranking may hold the same response."""
    write(tmp_path, "a,one,1", "a,two,2", "a,one,3", "b,one,1", "b,one,2", "c,one,2", "c,two,1")
    first, second = load_rankings(str(tmp_path), tokenizer, 80)
    assert (first.ranks, second.ranks) == ([1, 2], [2, 1]) and len(first.responses) == 2
    assert "3 of 7 rows left out" in capsys.readouterr().out


def test_load_rankings_separates_groups_of_one_prompt(tokenizer, tmp_path):
    path = tmp_path / "rankings.csv"
    path.write_text("Group,Rank,Prompt,Response\nx,1,a,one\ny,2,a,two\nx,2,a,three\ny,1,a,four\n")
    first, second = load_rankings(str(tmp_path), tokenizer, 80)
    texts = [tokenizer.decode(row[:-1]) for row in first.responses + second.responses]
    assert texts == ["a one", "a three", "a two", "a four"]
    assert (first.ranks, second.ranks) == ([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,x,first", "row 2: Rank is not a number"),
        ("a,x,nan", "row 2: Rank is not a number"),
        ("a,x,", "row 2: Rank is empty"),
        ("b,x,1", "no ranking has two responses"),
        ("a," + "x " * 90 + ",2", "row 2: the prompt with its response takes"),
    ],
)
def test_load_rankings_rejects_bad_rows(tokenizer, tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path, "a,one,2", line)
        load_rankings(str(tmp_path), tokenizer, 80)


# ---- the loss ----


class Table(torch.nn.Module):
    """Scores by the last token: token k scores table[k]."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.tensor([0.0, math.log(2), math.log(3), 0.0], dtype=torch.float64)
        )
        self.batches = []

    def forward(self, tokens, lengths):
        self.batches.append(len(tokens))
        return self.table[tokens[torch.arange(len(tokens)), lengths - 1]]


RANKINGS = [Ranking([[3, 2], [3, 3, 1], [0]], [1, 2, 3]), Ranking([[2], [0, 1]], [1, 0])]


def test_score_rankings_matches_hand_computation():
    """First prompt: scores ln 3, ln 2, 0 in the right order. Its terms are -log sigmoid of ln 3/2,
    ln 3 and ln 2, that is -log of 3/5, 3/4 and 2/3, with mean 1/3 log(10/3). Second prompt: ln 3 is
    ranked below ln 2, which makes -log sigmoid(ln 2/3) = -log 2/5. The loss is the mean of the two
    prompts. The margins are better minus worse, and 3 of the 4 are positive. All 5 responses go
    through the model once, in one batch."""
    model = Table()
    loss, margins, scores = score_rankings(model, RANKINGS, 0, COMPUTE)
    assert loss.item() == pytest.approx((math.log(10 / 3) / 3 - math.log(2 / 5)) / 2, rel=1e-12)
    assert_close(
        margins.sort().values.exp(), torch.tensor([2 / 3, 3 / 2, 2, 3], dtype=torch.float64)
    )
    assert not margins.requires_grad and model.batches == [5]
    expected = torch.tensor([3.0, 2, 1, 3, 2], dtype=torch.float64)  # in the order of the responses
    assert_close(scores.exp(), expected)
    assert not scores.requires_grad


def test_score_rankings_gradient_matches_hand_computation():
    """A term -log sigmoid(r_i - r_j) has the derivative -(1 - sigmoid) by r_i and the opposite by
    r_j. With scores c = ln 3, b = ln 2 and a = 0, the first prompt has 1 - sigmoid = 2/5 (c over
    b), 1/4 (c over a) and 1/3 (b over a), each with weight 1/3 * 1/2. The second has 3/5 (b over
    c), with weight 1/2.

        c: -(2/5 + 1/4)/6 + 3/10 = -13/120 + 36/120 = 23/120
        b: (2/5 - 1/3)/6 - 3/10 = 1/90 - 27/90 = -26/90
        a: (1/4 + 1/3)/6 = 7/72
    """
    model = Table()
    score_rankings(model, RANKINGS, 0, COMPUTE)[0].backward()
    expected = torch.tensor([7 / 72, -26 / 90, 23 / 120, 0], dtype=torch.float64)
    assert_close(model.table.grad, expected, atol=1e-12, rtol=0)


def test_score_rankings_is_the_mean_over_rankings():
    """So micro-batches weighted by their share of the rankings sum to the batch: here one of 1 and
    one of 2."""
    model = Table()
    batch = [*RANKINGS, Ranking([[1], [0], [2]], [1, 1, 2])]
    whole, whole_margins, _ = score_rankings(model, batch, 3, COMPUTE)
    (gradient,) = torch.autograd.grad(whole, model.table)
    parts = [score_rankings(model, part, 3, COMPUTE) for part in (batch[:1], batch[1:])]
    total = parts[0][0] / 3 + parts[1][0] * 2 / 3
    assert_close(total, whole)
    assert_close(torch.autograd.grad(total, model.table)[0], gradient)
    assert_close(torch.cat([margins for _, margins, _ in parts]), whole_margins)
