"""Sampling from models whose next token is known, and from a GPT with and without its cache."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlhf.sampling import generate, has_ended, sample
from tests.helpers import f64, some_prompts

EOS = 9


class PlusOne(nn.Module):
    """The next token is the last one plus one, with probability 1."""

    def forward(self, tokens):
        logits = torch.full((*tokens.shape, 12), -math.inf)
        return logits.scatter(-1, (tokens[..., None] + 1) % 12, 0.0)


def test_generate_stops_each_row_at_end_of_text_or_the_limit():
    """Prompts 4 | 1 2 3 | 6 7 | 8 and at most four new tokens. End-of-text is 9.
        row 1: 5 6 7 8, four tokens
        row 2: 4 5 6 7, four tokens
        row 3: 8 9, ended
        row 4: 9, ended before the longest prompt ends
    The mask is True on the sampled tokens. After a row's end the tokens are 0."""
    prompts = torch.tensor([[4, 11, 11], [1, 2, 3], [6, 7, 11], [8, 11, 11]])
    tokens, mask = generate(
        PlusOne(), prompts, torch.tensor([1, 3, 2, 1]), max_new_tokens=4, eos_id=EOS
    )
    assert tokens.tolist() == [
        [4, 5, 6, 7, 8, 0, 0],
        [1, 2, 3, 4, 5, 6, 7],
        [6, 7, 8, 9, 0, 0, 0],
        [8, 9, 0, 0, 0, 0, 0],
    ]
    assert mask.int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert has_ended(tokens, mask, EOS).tolist() == [False, False, True, True]


def test_generate_stops_if_all_rows_have_ended():
    """7 -> 8 9 and 8 -> 9: two columns of the hundred allowed are enough."""
    tokens, mask = generate(PlusOne(), torch.tensor([[7], [8]]), torch.tensor([1, 1]), 100, EOS)
    assert tokens.tolist() == [[7, 8, 9], [8, 9, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_generate_takes_logits_from_the_first_entry_of_a_tuple():
    tokens, _ = generate(
        lambda tokens: (PlusOne()(tokens), "values"), torch.tensor([[7]]), torch.tensor([1]), 4, EOS
    )
    assert tokens.tolist() == [[7, 8, 9]]


def test_has_ended_counts_only_sampled_end_of_text():
    """Row 1: the 9 in the prompt ends nothing. Row 2: the 9 is the last of the two tokens
    allowed."""
    tokens, mask = generate(PlusOne(), torch.tensor([[9, 1], [0, 7]]), torch.tensor([2, 2]), 2, EOS)
    assert tokens.tolist() == [[9, 1, 2, 3], [0, 7, 8, 9]]
    assert has_ended(tokens, mask, EOS).tolist() == [False, True]


def test_sample_inverts_the_cumulative_distribution():
    """p = 1/2, 0, 1/4, 1/4, 0. A uniform number below 1/2 gives token 0, below 3/4 token 2, above
    it token 3. The two tokens of probability 0 never come."""
    u = torch.tensor(
        [0, 0.1, 0.499999, 0.500001, 0.749999, 0.750001, 1 - 1e-15], dtype=torch.float64
    )
    got = sample(torch.log(f64(0.5, 0, 0.25, 0.25, 0)).expand(len(u), 5), u)
    assert torch.equal(got, torch.where(u < 0.5, 0, torch.where(u < 0.75, 2, 3)))


def test_generate_samples_from_the_models_distribution(gpt):
    """10,000 samples of one token: each frequency is within 5 standard errors of its softmax
    probability."""
    prompts = torch.tensor([[3, 1, 4]]).expand(10_000, 3)
    tokens, _ = generate(
        gpt, prompts, torch.full((10_000,), 3), 1, EOS, torch.Generator().manual_seed(0)
    )
    p = torch.softmax(gpt(prompts[:1])[0, -1], dim=0)
    frequencies = torch.bincount(tokens[:, 3], minlength=11) / 10_000
    assert ((frequencies - p).abs() < 5 * torch.sqrt(p * (1 - p) / 10_000)).all()


def test_generate_with_cache_equals_generate_without(gpt):
    """A plain function has no make_cache, so the second call runs the whole prefix at each
    column."""
    prompts, lens = some_prompts(6, 5), torch.tensor([5, 1, 3, 2, 4, 5])
    cached = generate(gpt, prompts, lens, 8, EOS, torch.Generator().manual_seed(1))
    full = generate(
        lambda tokens: gpt(tokens), prompts, lens, 8, EOS, torch.Generator().manual_seed(1)
    )
    assert torch.equal(cached[0], full[0]) and torch.equal(cached[1], full[1])


class Counting(nn.Module):
    """A GPT that notes the shape of the tokens of every pass, and the logits that were sampled
    from."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.make_cache, self.shapes, self.seen = gpt, gpt.make_cache, [], []

    def hidden(self, tokens, *args):
        self.shapes.append(tuple(tokens.shape))
        return self.gpt.hidden(tokens, *args)

    def logits(self, hidden):
        self.seen.append(self.gpt.logits(hidden))
        return self.seen[-1]


@pytest.mark.parametrize("lens", [[5, 1, 3, 2, 4, 5], [5, 5, 5, 5, 5, 5], [1, 1, 2, 1, 2, 1]])
def test_generate_reads_all_prompts_in_one_pass(gpt, lens):
    """One pass over the prompts and one for each new token but the last; and nothing past the
    longest prompt."""
    model = Counting(gpt)
    generate(model, some_prompts(6, 5), torch.tensor(lens), 8, -1, torch.Generator().manual_seed(1))
    assert model.shapes == [(6, max(lens))] + [(6, 1)] * 7


def test_cached_logits_equal_those_of_the_full_forward_pass(gpt):
    """To 12 digits, for prompts of different lengths side by side."""
    model, lens = Counting(gpt), torch.tensor([5, 1, 3, 2, 4, 5])
    tokens, _ = generate(model, some_prompts(6, 5), lens, 8, -1, torch.Generator().manual_seed(1))
    for place, row in enumerate([1, 3, 2, 4, 0, 5]):  # shorter prompts come first
        full = gpt(tokens[row : row + 1, : lens[row] + 8])[0, lens[row] - 1 : -1]  # (8, V)
        assert_close(
            torch.stack([logits[place] for logits in model.seen]), full, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_have_ended_leave_the_batch(gpt, seed):
    """End-of-text is made likelier, so that rows end early. The batch shrinks, there are as many
    passes as the longest response has tokens, and the responses are those of the same model without
    a cache."""
    model, lens = Counting(gpt), torch.tensor([5, 1, 3, 2, 4, 5, 2, 2])
    with torch.no_grad():
        gpt.ln_f.bias.add_(gpt.wte.weight[EOS] * 2)
        gpt.wte.weight.mul_(5)  # so that what a row has read decides what it says
    tokens, mask = generate(
        model, some_prompts(8, 5), lens, 11, EOS, torch.Generator().manual_seed(seed)
    )
    sizes = [shape[0] for shape in model.shapes]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 8
    assert len(model.shapes) == mask.sum(dim=1).max()
    full = generate(
        lambda tokens: gpt(tokens),
        some_prompts(8, 5),
        lens,
        11,
        EOS,
        torch.Generator().manual_seed(seed),
    )
    assert torch.equal(tokens, full[0]) and torch.equal(mask, full[1])


def ending_early(gpt):
    """The GPT with end-of-text made likelier, and with logits that depend more on what was read."""
    with torch.no_grad():
        gpt.ln_f.bias.add_(gpt.wte.weight[EOS] * 2)
        gpt.wte.weight.mul_(5)
    return gpt


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_generate_makes_as_many_passes_as_the_longest_response_has_tokens(gpt, seed, cache):
    """Of at most eleven. Without a cache each pass reads everything so far."""
    lens, widths, generator = torch.tensor([5, 1, 3, 2]), [], torch.Generator().manual_seed(seed)
    model = Counting(ending_early(gpt))

    def without_cache(tokens):
        widths.append(tokens.size(1))
        return gpt(tokens)

    chosen = model if cache else without_cache
    _, mask = generate(chosen, some_prompts(4, 5), lens, 11, EOS, generator)
    longest = int(mask.sum(dim=1).max())
    if cache:
        assert [width for _, width in model.shapes] == [5] + [1] * (longest - 1)
    else:
        assert widths == list(range(5, 5 + longest))


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_responses_do_not_depend_on_the_rows_at_once(gpt, rows):
    prompts, lens = some_prompts(6, 5), torch.tensor([5, 1, 3, 2, 4, 5])
    model = Counting(gpt)
    limited = generate(model, prompts, lens, 8, EOS, torch.Generator().manual_seed(1), rows)
    every = generate(gpt, prompts, lens, 8, EOS, torch.Generator().manual_seed(1))
    assert torch.equal(limited[0], every[0]) and torch.equal(limited[1], every[1])
    assert max(shape[0] for shape in model.shapes) == min(rows, 6)


def test_generate_keeps_the_prompts(gpt):
    prompts, lens = some_prompts(5, 4), torch.tensor([1, 2, 3, 4, 4])
    tokens, _ = generate(gpt, prompts, lens, 8, EOS, torch.Generator().manual_seed(1))
    for row, length in enumerate(lens):
        assert torch.equal(tokens[row, :length], prompts[row, :length])


def test_generate_follows_from_the_seed(gpt):
    prompts, lens = some_prompts(5, 4), torch.tensor([1, 2, 3, 4, 4])
    first, again, other = (
        generate(gpt, prompts, lens, 8, EOS, torch.Generator().manual_seed(seed))[0].tolist()
        for seed in (1, 1, 2)
    )
    assert first == again and first != other


@pytest.mark.parametrize("lens", [[0, 1], [4, 1], [1]])
def test_generate_rejects_impossible_prompt_lengths(gpt, lens):
    with pytest.raises(ValueError, match="prompt_lens"):
        generate(gpt, torch.zeros(2, 3, dtype=torch.long), torch.tensor(lens), 4, EOS)


def test_generate_rejects_zero_new_tokens(gpt):
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(gpt, torch.zeros(2, 3, dtype=torch.long), torch.tensor([1, 1]), 0, EOS)


@pytest.mark.parametrize("cached", [True, False])
def test_rows_may_have_limits_of_their_own(gpt, cached):
    """The first tokens are those of a common limit; without a cache too. No row ends earlier."""
    model = gpt if cached else lambda tokens: gpt(tokens)
    prompts, lens = some_prompts(4, 3), torch.tensor([1, 3, 2, 3])
    limits = torch.tensor([2, 5, 1, 4])
    uniforms = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, mask = generate(model, prompts, lens, limits, 99, uniforms)
    every, _ = generate(model, prompts, lens, 5, 99, uniforms)
    assert mask.sum(dim=1).tolist() == limits.tolist() and tokens.size(1) == 8
    for row, end in enumerate((lens + limits).tolist()):
        assert torch.equal(tokens[row, :end], every[row, :end]) and not tokens[row, end:].any()
