# make run   the three scripts in order, into runs/
# make test  the tests
PYTHON = .venv/bin/python

run: .venv/installed
	$(PYTHON) train_sft.py
	$(PYTHON) train_reward.py
	$(PYTHON) train_ppo.py

test: .venv/installed
	$(PYTHON) -m pytest

# Installs once; a later call finds the stamp newer than requirements.txt and does nothing.
.venv/installed: requirements.txt
	python3 -c "import sys; sys.exit(sys.version_info < (3, 10) and 'error: Python 3.10 or newer is needed')"
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf .venv runs

.PHONY: run test clean
