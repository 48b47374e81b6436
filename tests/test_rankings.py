"""Rankings: reading them, and the loss over all pairs of a prompt from one forward pass."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.common import InputError
from rlhf.rankings import Ranking, load_rankings, ranking_losses
from rlhf.tokenizer import load_tokenizer
from tests.conftest import BUNDLED
from tests.test_updates import CPU, gradient


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(BUNDLED / "tokenizer.tiktoken"))


def write(tmp_path, *lines):
    path = tmp_path / "rankings.csv"
    path.write_text("\n".join(["Prompt,Response,Rank", *lines]) + "\n")
    return path


def test_rows_of_a_prompt_form_one_ranking(tokenizer, tmp_path, capsys):
    """Prompt a has three responses that do not stand together; b's two are tied and c has one: both are dropped. Ranks
    may be anything from 0 to 2**31 - 1."""
    path = write(tmp_path, "a,one,2147483647", "b,one,1", "a,two,0", "c,one,1", "b,two,1", "a,three,2147483647")
    (got,) = load_rankings(path, tokenizer, 80)
    assert got.ranks == [2147483647, 0, 2147483647]
    assert [tokenizer.decode(row[:-1]) for row in got.responses] == ["a one", "a two", "a three"]
    assert "2 of 3 rankings dropped" in capsys.readouterr().out


def test_a_response_that_comes_twice_counts_once(tokenizer, tmp_path, capsys):
    """In ranking a, with its first rank; b has nothing else and is dropped. Another ranking may have it too."""
    path = write(tmp_path, "a,one,1", "a,two,2", "a,one,3", "b,one,1", "b,one,2", "c,one,2", "c,two,1")
    first, second = load_rankings(path, tokenizer, 80)
    assert (first.ranks, second.ranks) == ([1, 2], [2, 1]) and len(first.responses) == 2
    assert "2 responses left out" in (shown := capsys.readouterr().out) and "1 of 3 rankings dropped" in shown


def test_a_group_tells_rankings_of_one_prompt_apart(tokenizer, tmp_path):
    path = tmp_path / "rankings.csv"
    path.write_text("Group,Rank,Prompt,Response\nx,1,a,one\ny,2,a,two\nx,2,a,three\ny,1,a,four\n")
    first, second = load_rankings(path, tokenizer, 80)
    assert [tokenizer.decode(row[:-1]) for row in first.responses + second.responses] == [
        "a one", "a three", "a two", "a four"]
    assert (first.ranks, second.ranks) == ([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("line", "message"),
    [("a,x,first", "row 2: Rank is 'first'"), ("a,x,-1", "row 2: Rank is '-1'"), ("a,x,", "row 2: Rank is empty"),
     ("a,x,2147483648", "row 2: Rank is '2147483648'"),
     ("b,x,1", "no ranking has two responses"), ("a," + "x " * 90 + ",2", "row 2: prompt and response together takes")],
)
def test_bad_rankings(tokenizer, tmp_path, line, message):
    with pytest.raises(InputError, match=message):
        load_rankings(write(tmp_path, "a,one,2", line), tokenizer, 80)


class Table(torch.nn.Module):
    """Scores by the last token: token k scores table[k]."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor([0.0, math.log(2), math.log(3), 0.0], dtype=torch.float64))

    def forward(self, tokens, lengths):
        return self.table[tokens[torch.arange(len(tokens)), lengths - 1]]


ROWS = [Ranking([[3, 2], [3, 3, 1], [0]], [1, 2, 3]), Ranking([[2], [0, 1]], [1, 0])]


def test_ranking_losses_by_hand():
    """First prompt: scores ln 3, ln 2, 0 in the right order: -log sigmoid of ln 3/2, ln 3, ln 2, that is -log of 3/5,
    3/4, 2/3, mean 1/3 log(10/3). Second: ln 3 is ranked below ln 2: -log sigmoid(ln 2/3) = -log 2/5. The loss is the
    mean of the two prompts; 3 of the 4 margins are positive."""
    margins = []
    (loss,) = ranking_losses(Table(), ROWS, 0, 3, CPU, None, margins)
    assert loss.item() == pytest.approx((math.log(10 / 3) / 3 - math.log(2 / 5)) / 2, rel=1e-12)
    assert_close(torch.cat(margins).sort().values.exp(), torch.tensor([2 / 3, 3 / 2, 2, 3], dtype=torch.float64))


def test_rankings_in_micro_batches_are_the_whole_batch():
    model = Table()
    whole, parts = (gradient(model, ranking_losses(model, ROWS, size, 3, CPU, None, [])) for size in (0, 1))
    assert_close(parts, whole)
