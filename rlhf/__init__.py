"""RLHF from scratch: supervised fine-tuning, a reward model from comparisons, and PPO against it.

Read in this order (about an hour):

    model.py         a GPT, a policy with a value head, a reward model
    tokenizer.py     text <-> token ids
    data.py          the three data sets, padding and masks
    masked.py        the only means over tokens and the only shift between logits and tokens
    losses.py        every loss, in the order in which the scripts need them
    ../train_sft.py, ../train_reward.py
    rollout.py       sampling with a key-value cache, and scoring what was sampled
    rewards.py       the KL penalty and the reward of each action
    advantages.py    generalised advantage estimation
    ../train_ppo.py  all of it together
    evaluate.py      before and after, on held-out prompts
    optimum.py       the best policy that the objective has, to compare with

    Plumbing: cli.py, common.py, checkpoints.py, judge.py, optim.py and report.py (flags, devices, files, a data set's
    judge, optimizer steps, what is printed). Options that the three scripts do without: lora.py, rankings.py, ptx.py.
    Programs: sample.py, label.py, export.py, study.py. For data sets: bpe.py, download.py.

Shapes are written with these letters:

    B  sequences in a batch        P  tokens in the longest prompt
    T  tokens in a sequence        C  channels of the network
    V  tokens in the vocabulary    H  attention heads

and, where answers are compared, N comparisons or samples, K ranked answers to a prompt, Q prompts.

One convention carries the whole project. A sequence is [prompt][response][pad ...], padded on the right only, so
under causal attention no pad can influence a real token and nothing needs an attention mask. Everything that
reinforcement learning touches has T-1 columns, the *action slots*:

    slot t is the decision taken after reading tokens 0..t; its action is token t+1

    tokens      p0   p1   p2 | a0   a1   EOS | pad
    slot         0    1    2    3    4     5
    action      p1   p2   a0   a1   EOS   pad
    mask         -    -    T    T    T     -         True where the action was the policy's own
    score                            +               the reward model's number lands on the last True slot
    V(after)                              0          nothing follows the last action
"""
