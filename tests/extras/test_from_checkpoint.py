"""The tokenizer and the judge that a checkpoint names."""

from types import SimpleNamespace

import pytest

from rlhf.extras.from_checkpoint import judge_of, tokenizer_of
from rlhf.support.cli import InputError
from rlhf.tokenizer import load_tokenizer
from tests.helpers import BUNDLED, ROOT


@pytest.fixture
def two_tokenizers(tmp_path, small_data):
    """The tokenizer of the small data set and another outside of it, with 44 merges."""
    own = small_data / "tokenizer.tiktoken"
    (tmp_path / "short.tiktoken").write_text("".join(own.read_text().splitlines(keepends=True)[:300]))
    return SimpleNamespace(folder=str(small_data), own=load_tokenizer(str(own)),
                           other=load_tokenizer(str(tmp_path / "short.tiktoken")))


@pytest.mark.parametrize("name", ["own", "other"])
def test_tokenizer_of_is_the_one_of_the_checkpoint(tmp_path, two_tokenizers, name):
    """The data set's own or, if the checkpoint was trained with another, the one that it names."""
    expected = getattr(two_tokenizers, name)
    checkpoint = {"tokenizer": expected.fingerprint, "tokenizer_name": expected.name, "model_config": {}}
    got = tokenizer_of(tmp_path / "sft.pt", checkpoint, two_tokenizers.folder)
    assert got.fingerprint == expected.fingerprint


def test_tokenizer_of_rejects_a_tokenizer_file_that_has_changed(tmp_path, two_tokenizers):
    other = two_tokenizers.other
    (tmp_path / "short.tiktoken").write_bytes((tmp_path / "data" / "tokenizer.tiktoken").read_bytes())
    with pytest.raises(InputError, match="another tokenizer"):
        tokenizer_of(tmp_path / "sft.pt", {"tokenizer": other.fingerprint, "tokenizer_name": other.name,
                                           "model_config": {}}, two_tokenizers.folder)


def marked_judge(folder):
    """A judge.py that leaves a file beside it if it is run."""
    folder.mkdir()
    (folder / "judge.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
                                     "def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    return folder


def test_judge_of_a_folder_that_only_the_checkpoint_names_does_not_run(tmp_path, capsys):
    folder = marked_judge(tmp_path / "named")
    with pytest.raises(InputError, match=f"judge.py is code that only the checkpoint names; give --data {folder}"):
        judge_of("", str(folder))
    assert judge_of("", str(folder), needed=False) is None and "going on without gold" in capsys.readouterr().out
    assert not (folder / "ran").exists()
    assert judge_of(str(folder), "elsewhere").score([], ["a"]) == [0.0] and (folder / "ran").exists()


@pytest.mark.parametrize("spelled", [BUNDLED, BUNDLED.relative_to(ROOT), BUNDLED / ".." / "tiny_assistant"])
def test_judge_of_the_bundled_data_set_runs_without_a_flag(spelled, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert judge_of("", str(spelled)).score(["\n\nHuman: Hi.\n\nAssistant:"], ["Shame on you."])[0] < 0


def test_judge_of_a_folder_named_as_the_bundled_one_does_not_run(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    marked_judge(tmp_path / "data" / "tiny_assistant")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="only the checkpoint names"):
        judge_of("", "data/tiny_assistant")


def test_judge_of_a_folder_without_a_judge_is_none(tmp_path):
    assert judge_of("", str(tmp_path)) is None
