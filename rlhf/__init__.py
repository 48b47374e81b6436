"""RLHF from scratch: supervised fine-tuning, a reward model from comparisons, and PPO against it.

The convention
--------------
A sequence is [prompt][response][pad ...], padded on the right only. Under causal attention no pad
can influence a real token, so training needs no attention mask. Everything that reinforcement
learning touches has T-1 columns, the *action slots*:

    slot t is the decision taken after reading tokens 0..t; its action is token t+1

    tokens      p0   p1   p2 | a0   a1   EOS | pad
    slot         0    1    2    3    4     5
    action      p1   p2   a0   a1   EOS   pad
    mask         -    -    x    x    x     -      x, True: the action was the policy's own
    score                            +            the score lands on the last True slot
    value       V0   V1   V2   V3   V4     0      GAE takes V as 0 after the last action

Logits and tokens are aligned only in masked.py. Values drop their last column, which has no action.

Shapes
------
    B  sequences in a batch      P  tokens in the longest prompt   N  comparisons or samples
    T  tokens in a sequence      C  channels of the network        K  ranked responses to a prompt
    V  tokens in the vocabulary  H  attention heads                Q  prompts
    S  actions: the True slots of a batch, row by row

Glossary
--------
    policy         the model that is trained; it gives each next token a probability
    reference      the fine-tuned model (SFT) that the policy starts from; frozen
    old policy     the policy that sampled the rollout; its log-probabilities and values are kept
    response       what a model says to a prompt, end-of-text included
    rollout        one batch of prompts with responses, log-probabilities, values and scores
    reward model   gives a response its score, learned from comparisons; frozen while PPO runs
    score          the number for a whole response, of the reward model or of a reward function
    reward         what one action earns: minus its KL penalty, plus the score if it is the last
    judge, gold    the data set's judge.py, and its number for a response; for evaluation only
    vote           which of two responses an annotator prefers: a comparison, with noise
    value          V(t), the value network's estimate of the rewards still to come at slot t
    return         the sum of rewards from slot t on, as GAE estimates it: the target of V
    advantage      how much better an action was than V expected
    whiten         subtract the mean, divide by the standard deviation
    inner epoch    one pass over a rollout
    minibatch      the rows of one gradient step; micro-batch: the part of them that fits in memory
    objective      J = E[score] - kl_coef * kl_ref, what PPO maximises
    kl_ref         KL of the policy to the reference, nats per response; of one response: its k1
    kl_old         KL of the rollout's policy to the one being updated, nats per token
    nat            unit of log-probability and KL with the natural logarithm; 1 nat = 1.44 bits
    optimality     0 for the reference, 1 for the best policy of the objective
    best-of-n      sample n responses, keep the one with the highest score

Reading order
-------------
Fifteen minutes: the convention above; `action_slots` and `chosen_logprobs` in masked.py;
`collect_rows` and `score_rows` in rollout.py; rewards.py; `gae` in advantages.py; `policy_loss` in
losses.py; `assign_credit`, `minibatch_loss` and `update` in ppo.py; `main` in ../train_ppo.py.
One hour, in this order:

    model.py         a GPT and its cache, a policy with a value head, a reward model
    tokenizer.py     text <-> token ids
    data.py          a data set's three kinds of rows, padding and masks
    masked.py        means over real tokens; the alignment of logits and tokens
    losses.py        every loss, in the order in which the scripts need them
    ../train_sft.py, ../train_reward.py
    sampling.py      `generate`: a response to each prompt, with a key-value cache
    rollout.py       `collect`: sample, then score with all models
    rewards.py       the KL penalty and the reward of each action
    advantages.py    GAE; RLOO, GRPO and REINFORCE, which need no value network
    ppo.py           one minibatch's loss, and the update around it
    ../train_ppo.py  all of it together
    evaluate.py      before and after, on held-out prompts

Not needed to understand RLHF:

    run/             what any training program needs: flags, checkpoints, files, device, ...
    networks/        other networks in the GPT's place: LoRA, GPT-2's weights, transformers' models
    methods/         optional features: DPO, rankings, the optimum
    tools/           programs, `python -m rlhf.tools.NAME`
"""
