"""Start with test_advantages.py: GAE is worked by hand, for responses of different lengths and with
NaN in the pads. Then test_losses.py: every loss and its gradient are worked by hand, and finite
differences confirm the gradients. Then test_sampling.py and test_rollout.py: the policy's own
distribution is sampled, and each response is scored as if it were the only one. Then test_ppo.py:
the loss of one minibatch is worked by hand in fractions, and micro-batches and minibatches have the
gradients that they must have. Then test_exact.py: with 120 responses in all, the loss has the exact
gradient of J and PPO reaches the optimum. test_device.py rehearses a run on a GPU."""
