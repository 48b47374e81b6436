"""RLHF from scratch: supervised fine-tuning, a reward model from comparisons, and PPO against it.

Fifteen minutes: this page; `collect` in rollout.py; rewards.py; `gae` in advantages.py; `policy_loss` in losses.py;
`main` and `update` in ../train_ppo.py. One hour, in this order:

    model.py         a GPT, a policy with a value head, a reward model
    tokenizer.py     text <-> token ids
    data.py          a data set's three kinds of rows, padding and masks
    masked.py        means over real tokens, and the only shift between logits and tokens
    losses.py        every loss, in the order in which the scripts need them
    ../train_sft.py, ../train_reward.py
    rollout.py       sampling with a key-value cache, and scoring what was sampled
    rewards.py       the KL penalty and the reward of each action
    advantages.py    generalised advantage estimation
    ../train_ppo.py  all of it together
    evaluate.py      before and after, on held-out prompts

Not needed to understand RLHF: support/ (flags, devices, checkpoints, tables), extras/ (options that the scripts do
without: LoRA, rankings, GPT-2's weights, ...) and tools/ (programs, `python -m rlhf.tools.NAME`).

The convention
--------------
A sequence is [prompt][response][pad ...], padded on the right only. Under causal attention no pad can influence a real
token, so nothing needs an attention mask. Everything that reinforcement learning touches has T-1 columns, the *action
slots*:

    slot t is the decision taken after reading tokens 0..t; its action is token t+1

    tokens      p0   p1   p2 | a0   a1   EOS | pad
    slot         0    1    2    3    4     5
    action      p1   p2   a0   a1   EOS   pad
    mask         -    -    T    T    T     -         True if the action was the policy's own
    score                            +               the reward model's score lands on the last True slot
    V(after)                              0          nothing follows the last action

Shapes
------
    B  sequences in a batch        P  tokens in the longest prompt      N  comparisons, or samples of one prompt
    T  tokens in a sequence        C  channels of the network           K  ranked responses to a prompt
    V  tokens in the vocabulary    H  attention heads                   Q  prompts

Glossary
--------
    policy         the model that is trained; it gives each next token a probability
    reference      the fine-tuned model (SFT) that the policy starts from; frozen
    old policy     the policy that sampled the rollout; only its log-probabilities and values are kept
    response       what a model says to a prompt, end-of-text included
    rollout        one batch of prompts with the policy's responses, log-probabilities, values and scores
    reward model   gives a response its score, learned from comparisons; frozen while PPO runs
    score          the reward model's number for a whole response
    reward         what one action is paid: the KL penalty, plus the score if the action is the last
    judge, gold    the data set's judge.py and its number for a response, from which nothing learns
    vote           which of two responses an annotator prefers: a comparison, with noise
    value          V(t), the value network's estimate of the rewards still to come at slot t
    return         the sum of rewards from slot t on, as estimated by GAE: what V is trained towards
    advantage      how much better an action was than V expected
    whiten         subtract the mean, divide by the standard deviation
    inner epoch    one pass over a rollout; minibatch: its rows for one gradient step; micro-batch: rows that fit memory
    objective      J = E[score] - kl_coef * kl_ref, what PPO maximises
    kl_ref         KL of the policy to the reference, nats per response: how far training has moved it
    kl_old         KL of the rollout's policy to the one being updated, nats per token
    nat            unit of log-probability and KL with the natural logarithm; 1 nat = 1.44 bits
    optimality     0 for the reference, 1 for the best policy that the objective has
    best-of-n      sample n responses, keep the one with the highest score
"""
