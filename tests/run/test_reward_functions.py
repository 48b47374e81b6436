"""rlhf.run.reward_functions: what --reward names, and functions that are found and checked."""

import sys
from pathlib import Path

import pytest
import torch

from rlhf.run.errors import InputError
from rlhf.run.reward_functions import Rewards, load_function, named_rewards, part_means

DEFAULT = Path("runs/reward.pt")


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("names", "weights", "expected"),
    [
        ((), (), Rewards(DEFAULT, (), (1.0,))),
        ((), (0.5,), Rewards(DEFAULT, (), (0.5,))),
        (("a/b.pt",), (), Rewards(Path("a/b.pt"), (), (1.0,))),
        (("x.py",), (2.0,), Rewards(None, ("x.py",), (2.0,))),
        (("m.pt", "x.py:f"), (2.0, 3.0), Rewards(Path("m.pt"), ("x.py:f",), (2.0, 3.0))),
        (("C:\\x.py:f",), (), Rewards(None, ("C:\\x.py:f",), (1.0,))),
    ],
)
def test_flags_name_a_model_and_functions_with_weights_of_their_own(names, weights, expected):
    assert named_rewards(names, weights, DEFAULT) == expected


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (("a.pt", "b.pt"), (), "--reward a.pt b.pt: give a reward model FILE.pt first, if any"),
        (("x.py", "a.pt"), (), "--reward x.py a.pt: give a reward model FILE.pt first, if any"),
        (("a.pt", "x.py:"), (), "FILE.py:FUNCTION"),
        (("rules",), (), "--reward rules: give a reward model FILE.pt first, if any"),
        (("a/x.py", "x.py"), (), "two metrics would be score_x; rename a function or its file"),
        (("a.py:f", "b.py:f"), (), "two metrics would be score_f"),
        (("std.py",), (), "two metrics would be score_std"),
        (("a.py:model",), (), "two metrics would be score_model"),
        (("x.py",), (1.0, 2.0), "2 weights for 1 rewards"),
        ((), (1.0, 2.0), "2 weights for 1 rewards"),
    ],
)
def test_flags_that_do_not_fit_are_refused(names, weights, message):
    with pytest.raises(ValueError, match=message):
        named_rewards(names, weights, DEFAULT)


def load(*specs):
    return tuple(map(load_function, specs))


def test_functions_are_found_in_their_files(tmp_path):
    """`score`, or the one that is named. Two files have modules of their own."""
    first = write(
        tmp_path / "rules.py",
        "import dataclasses",
        "SIGN = -1",
        "@dataclasses.dataclass",
        "class Settings:",
        "    sign: int = SIGN",
        "def score(prompts, responses): return [len(r) for r in responses]",
        "def short(prompts, responses): return [Settings().sign * len(r) for r in responses]",
    )
    second = write(tmp_path / "asks.py", "def score(prompts, responses): return map(len, prompts)")
    functions = load(first, f"{first}:short", second)
    assert [function.name for function in functions] == ["rules", "short", "asks"]
    got = [function(["abc", "d"], ["x", ""]) for function in functions]
    assert got == [[1.0, 0.0], [-1.0, 0.0], [3.0, 1.0]]


def test_functions_get_lists_of_their_own(tmp_path):
    """A function that sorts or empties them does not change what the next one gets."""
    line = "def score(prompts, responses): return [prompts.pop() + responses.pop()]"
    path = write(tmp_path / "x.py", line)
    prompts = ["3"]
    responses = ["4"]
    assert load(path)[0](prompts, responses) == [34.0]
    assert prompts == ["3"] and responses == ["4"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.py", "none.py does not exist; give --reward a file with a function"),
        ("x.py:other", "x.py has no function other"),
        ("empty.py", "empty.py has no function score"),
        ("number.py", "number.py has no function score"),
    ],
)
def test_missing_functions_are_one_line(tmp_path, spec, message):
    write(tmp_path / "x.py", "def score(prompts, responses): return []")
    write(tmp_path / "empty.py", "")
    write(tmp_path / "number.py", "score = 3")
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / spec))


def test_files_have_the_names_of_their_rewards():
    """Of the functions' metrics; the reward model's comes last."""
    rewards = named_rewards(("m.pt", "a/rules.py", "a/rules.py:short"), (), DEFAULT)
    rules = Path("a/rules.py")
    expected = {"reward rules": rules, "reward short": rules, "reward": Path("m.pt")}
    assert list(rewards.files().items()) == list(expected.items())
    assert named_rewards(("x.py",), (), DEFAULT).files() == {"reward x": Path("x.py")}


def test_a_file_may_import_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    write(tmp_path / "numbers_beside_it.py", "ONE = 1")
    text = "from numbers_beside_it import ONE\ndef score(prompts, responses): return [ONE]"
    assert load(write(tmp_path / "x.py", text))[0](["a"], ["b"]) == [1.0]


@pytest.mark.parametrize(
    "value", ["numpy.ones(2)", "torch.ones(2)", "(1 for _ in prompts)", "[True, 1]", "iter('11')"]
)
def test_numbers_may_come_in_any_collection(tmp_path, value):
    text = f"import numpy, torch\ndef score(prompts, responses): return {value}"
    assert load(write(tmp_path / "x.py", text))[0](["a", "b"], ["c", "d"]) == [1.0, 1.0]


ODD = ["[1.0]", "[1.0, 2.0, 3.0]", "[1.0, float('nan')]", "[]", "None", "3.0", "['a', 'b']"]


@pytest.mark.parametrize("value", [*ODD, "[None, 1]", "__import__('torch').ones(2, 2)"])
def test_anything_but_one_finite_number_per_response_is_refused(tmp_path, value):
    path = write(tmp_path / "x.py", f"def score(prompts, responses): return {value}")
    with pytest.raises(InputError, match=r"x\(\) in .*x.py must return one finite number for each"):
        load(path)[0](["a", "b"], ["c", "d"])


def test_an_error_inside_a_function_keeps_its_traceback(tmp_path):
    path = write(tmp_path / "x.py", "def score(prompts, responses): return [1 / 0]")
    with pytest.raises(ZeroDivisionError):
        load(path)[0](["a"], ["b"])


def test_part_means_name_each_of_several_rewards(tmp_path):
    path = write(tmp_path / "x.py", "def score(prompts, responses): return []")
    (function,) = load(path)
    parts = torch.tensor([[1.0, 10.0], [2.0, 30.0]])
    assert part_means((function,), parts) == {"score_model": 1.5, "score_x": 20.0}
    assert part_means((function, function._replace(name="y")), parts) == {
        "score_x": 1.5,
        "score_y": 20.0,
    }
    assert part_means((function,), parts[:, 1:]) == {}
    assert part_means((), parts[:, :1]) == {}
