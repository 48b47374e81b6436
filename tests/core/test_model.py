"""The networks: causality, pads, the key-value cache, heads, GPT-2's architecture and its initial
weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rlhf.model import GPT, GPTConfig, PolicyWithValue, RewardModel
from tests.helpers import noisy


def test_logits_do_not_depend_on_later_tokens(gpt):
    """Another token at position 5 changes the logits from position 5 on. Those before stay the same
    to the last bit."""
    tokens = torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    before, after = gpt(tokens), gpt(other)
    assert torch.equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(dim=-1).all()


def test_tokens_after_a_row_ends_change_nothing_before_it(policy, reward_model):
    """Logits and values up to a row's end, and its score, stay the same to the last bit."""
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([3, 5, 9, 1])
    filled = torch.where(torch.arange(9) < lengths[:, None], tokens, 7)
    assert torch.equal(reward_model(tokens, lengths), reward_model(filled, lengths))
    for row, length in enumerate(lengths):
        for one, other in zip(policy(tokens), policy(filled)):
            assert torch.equal(one[row, :length], other[row, :length])


def test_forward_pass_of_batch_equals_forward_pass_of_each_row(policy, reward_model):
    tokens = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 4, 2])
    logits, values = policy(tokens)
    scores = reward_model(tokens, lengths)
    for row, length in enumerate(lengths):
        single = tokens[row : row + 1, :length]
        single_logits, single_values = policy(single)
        assert_close(logits[row : row + 1, :length], single_logits)
        assert_close(values[row : row + 1, :length], single_values)
        assert_close(scores[row : row + 1], reward_model(single, length[None]))


@pytest.mark.parametrize("prefix", [1, 4])
def test_cache_gives_the_logits_of_the_full_forward_pass(gpt, prefix):
    """The cache reads the first `prefix` tokens at once, then one at a time."""
    tokens = torch.randint(11, (3, 10), generator=torch.Generator().manual_seed(0))
    cache = gpt.make_cache(3, 10)
    parts = [
        gpt.logits(gpt.hidden(tokens[:, a:b], cache))
        for a, b in [(0, prefix), *((t, t + 1) for t in range(prefix, 10))]
    ]
    assert_close(torch.cat(parts, dim=1), gpt(tokens), atol=1e-12, rtol=0)


def test_filled_cache_rejects_two_tokens_at_once(gpt):
    tokens, cache = torch.tensor([[1, 2, 3]]), gpt.make_cache(1, 10)
    gpt.hidden(tokens, cache)
    with pytest.raises(ValueError, match="one token at a time"):
        gpt.hidden(tokens[:, :2], cache)


def test_attention_matches_explicit_loops(gpt):
    """softmax(q k / sqrt(d)) v for each head and each token, over the tokens that it may read."""
    attention, x = gpt.blocks[0].attn, torch.randn(1, 4, 8, dtype=torch.float64)
    q, k, v = attention.c_attn(x)[0].split(8, dim=-1)
    expected = torch.zeros(4, 8, dtype=torch.float64)
    for head in (slice(0, 4), slice(4, 8)):
        for t in range(4):
            weights = torch.softmax(k[: t + 1, head] @ q[t, head] / math.sqrt(4), dim=0)
            expected[t, head] = weights @ v[: t + 1, head]
    assert_close(attention(x, layer=0)[0], attention.c_proj(expected))


def test_block_is_pre_layernorm_with_tanh_gelu(gpt):
    """x + attn(ln_1(x)), then x + W gelu(W ln_2(x)) with 0.5 u (1 + tanh(sqrt(2/pi) (u + 0.044715
    u^3)))."""
    block, x = gpt.blocks[1], torch.randn(2, 3, 8, dtype=torch.float64)
    y = x + block.attn(F.layer_norm(x, (8,), block.ln_1.weight, block.ln_1.bias, 1e-5), layer=1)
    u = block.mlp.c_fc(F.layer_norm(y, (8,), block.ln_2.weight, block.ln_2.bias, 1e-5))
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    assert_close(block(x, layer=1), y + block.mlp.c_proj(gelu))


def test_gpt_output_matrix_is_the_token_embedding(gpt):
    """hidden = ln_f(blocks(wte + wpe)); logits = hidden @ wte."""
    tokens = torch.tensor([[3, 1, 4]])
    x = gpt.wte.weight[tokens] + gpt.wpe.weight[:3]
    for layer, block in enumerate(gpt.blocks):
        x = block(x, layer)
    hidden = F.layer_norm(x, (8,), gpt.ln_f.weight, gpt.ln_f.bias, 1e-5)
    assert_close(gpt.hidden(tokens), hidden)
    assert_close(gpt(tokens), hidden @ gpt.wte.weight.T)


def test_gpt_of_gpt2_size_has_124_million_parameters():
    """12 layers of 768 channels: 50257*768 + 1024*768 + 12*(12*768^2 + 13*768) + 2*768 =
    124,439,808."""
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_initial_weights_have_the_documented_spread():
    """Standard deviation 0.02, and 0.02 / sqrt(2 * 8) = 0.005 for the matrices that write to the
    residual stream. Biases are 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(512, 64, 8, 4, 64))
    for name, parameter in model.named_parameters():
        if "ln_" not in name and name.endswith("weight"):
            expected = 0.005 if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
        elif name.endswith("bias"):
            assert parameter.eq(0).all(), name


def test_initial_loss_is_near_log_v():
    torch.manual_seed(0)
    model, tokens = GPT(GPTConfig(512, 64, 8, 4, 64)), torch.randint(512, (8, 32))
    loss = F.cross_entropy(model(tokens)[:, :-1].reshape(-1, 512), tokens[:, 1:].reshape(-1))
    assert loss.item() == pytest.approx(math.log(512), rel=0.1)


def test_value_and_score_start_at_zero():
    config = GPTConfig(11, 16, 1, 2, 8)
    tokens = torch.randint(11, (2, 5))
    assert PolicyWithValue(GPT(config))(tokens)[1].eq(0).all()
    assert RewardModel(GPT(config))(tokens, torch.tensor([5, 2])).eq(0).all()


def test_score_is_read_at_the_last_real_token(reward_model):
    tokens, lengths = torch.randint(11, (2, 6)), torch.tensor([6, 3])
    hidden = reward_model.gpt.hidden(tokens)
    raw = (
        torch.stack([hidden[0, 5], hidden[1, 2]]) @ reward_model.head.weight[0]
        + reward_model.head.bias
    )
    assert_close(reward_model(tokens, lengths), raw)


def test_score_is_shifted_and_scaled(reward_model):
    """(raw - 2) / 4"""
    tokens, lengths = torch.randint(11, (2, 6)), torch.tensor([6, 3])
    raw = reward_model(tokens, lengths)
    reward_model.mean.fill_(2.0)
    reward_model.scale.fill_(4.0)
    assert_close(reward_model(tokens, lengths), (raw - 2) / 4)


def test_separate_value_network_gives_the_values(gpt, reward_model):
    """The values come from the second network's hidden states. The logits come from the first
    network."""
    policy = PolicyWithValue(gpt, reward_model.gpt).double()
    policy.value_head.load_state_dict(reward_model.head.state_dict())
    tokens = torch.randint(11, (2, 6))
    logits, values = policy(tokens)
    assert_close(logits, gpt(tokens))
    assert_close(values, reward_model.head(reward_model.gpt.hidden(tokens)))


def test_value_network_may_be_wider_than_the_policy(gpt):
    policy = noisy(PolicyWithValue(gpt, GPT(GPTConfig(11, 16, 1, 2, 12)).double()).double(), seed=3)
    tokens = torch.randint(11, (2, 6))
    assert_close(policy(tokens)[1], policy.value_head(policy.value_gpt.hidden(tokens)))


def test_score_head_computes_in_float32_under_autocast():
    """In bfloat16, 1 + 2^-10 would be rounded to 1."""
    model = RewardModel(GPT(GPTConfig(11, 16, 1, 2, 8)))
    with torch.no_grad():
        model.head.bias.fill_(1 + 2**-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = model(torch.randint(11, (1, 4)), torch.tensor([4]))
    assert score.dtype == torch.float32 and score.item() == 1 + 2**-10


def test_gpt_config_rejects_impossible_sizes():
    with pytest.raises(ValueError, match=r"n_embd \(10\) must be a multiple of n_head \(3\)"):
        GPTConfig(11, 16, 2, 3, 10)
    with pytest.raises(ValueError, match="n_layer is 0"):
        GPTConfig(11, 16, 0, 2, 8)


def test_gpt_rejects_sequences_longer_than_block_size(gpt):
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        gpt(torch.zeros(1, 17, dtype=torch.long))


def test_reward_model_rejects_impossible_lengths(reward_model):
    for lengths in ([0, 1], [1, 6]):
        with pytest.raises(ValueError, match="between 1 and 5"):
            reward_model(torch.zeros(2, 5, dtype=torch.long), torch.tensor(lengths))
    with pytest.raises(ValueError, match="one length per row"):
        reward_model(torch.zeros(2, 5, dtype=torch.long), torch.tensor([1]))
