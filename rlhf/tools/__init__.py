from rlhf.support import cli  # noqa: F401  first, so that Ctrl-C prints one line even while torch loads
