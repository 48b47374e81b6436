# make run       the three stages in order, how close PPO came to the optimum, and a page about it,
#                runs/report.html; replaces what is in runs/
# make test      the tests, except the slow ones
# make test-all  all tests
# make lint      ruff: the format, and common mistakes
PYTHON = .venv/bin/python
PIP = $(PYTHON) -m pip install --quiet --disable-pip-version-check
RUFF = ruff==0.17.6
# Threads that wait for each other spin for a moment and then sleep. They spin 15 times longer by
# default, which costs most of the speed if another program needs the core. (For libgomp, the OpenMP
# of torch on Linux.)
export GOMP_SPINCOUNT = 20000

run: .venv/installed
	$(PYTHON) train_sft.py --overwrite
	$(PYTHON) train_reward.py --overwrite
	$(PYTHON) train_ppo.py --overwrite
	$(PYTHON) -m rlhf.tools.optimality
	$(PYTHON) -m rlhf.tools.report runs

test: .venv/installed
	$(PYTHON) -m pytest -m "not slow"

test-all: .venv/installed
	$(PYTHON) -m pytest

lint: .venv/$(RUFF)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# These install once; a later call finds the stamp and does nothing.
.venv/installed: requirements.txt
	python3 -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is needed')"
	python3 -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/$(RUFF):
	test -x $(PYTHON) || python3 -m venv .venv
	$(PIP) $(RUFF)
	touch $@

clean:
	rm -rf .venv runs

.PHONY: run test test-all lint clean
