"""rlhf.run.heldout: which rows are held out, with and without a held-out file."""

import json

import pytest

from rlhf.run.errors import InputError
from rlhf.run.heldout import choose_heldout, hash_of, read_rows


def write(folder, name, *lines):
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def prompts_of(folder, name, heldout, share=0.3):
    tables = read_rows(str(folder), name, heldout, share)
    return [prompt for _, frame in tables for prompt in frame["Prompt"]]


def test_hash_is_of_the_text_only():
    """The first eight digits of sha256("a") are ca978112: 0xca978112 / 16**8."""
    assert hash_of("a") == 0xCA978112 / 16**8
    assert 0 <= hash_of("") < 1


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_about_a_share_of_the_prompts_is_held_out(share):
    """2,000 prompts: the deviation of a binomial share is at most 0.011."""
    prompts = [f"prompt {number}" for number in range(2000)]
    chosen = choose_heldout(prompts, share)
    assert abs(len(chosen) / 2000 - share) < 0.04
    more = choose_heldout(prompts, share + 0.1)
    assert chosen < more  # a larger share holds out more, and no other ones


def test_a_few_prompts_are_on_both_sides():
    """With hashes of 0.79, 0.24 and 0.18, none of the first two lies below 0.1."""
    assert [round(hash_of(text), 2) for text in "abc"] == [0.79, 0.24, 0.18]
    assert choose_heldout(["a", "b", "a"], 0.1) == {"b"}
    assert choose_heldout(["b", "c"], 0.99) == {"c"}
    assert choose_heldout(["a"], 0.99) == set()


def test_a_prompt_is_on_the_same_side_in_every_file(tmp_path, capsys):
    prompts = [f"prompt {number}" for number in range(40)]
    write(tmp_path, "prompts", "Prompt", *prompts)
    write(tmp_path, "demonstrations", "Prompt,Response", *[f"{p},x" for p in prompts[10:]])
    pairs = [f"{p},x,y" for p in prompts for _ in range(2)]
    write(tmp_path, "comparisons", "Prompt,Chosen,Rejected", *pairs)
    heldout = set(prompts_of(tmp_path, "prompts", heldout=True))
    assert heldout == {p for p in prompts if hash_of(p) < 0.3} and 4 <= len(heldout) <= 20
    assert f"{len(heldout)} of 40 prompts" in capsys.readouterr().out
    assert prompts_of(tmp_path, "prompts", False) == [p for p in prompts if p not in heldout]
    for name in ("demonstrations", "comparisons"):
        assert set(prompts_of(tmp_path, name, True)) <= heldout
        assert not set(prompts_of(tmp_path, name, False)) & heldout
    assert len(prompts_of(tmp_path, "comparisons", True)) == 2 * len(heldout)


def test_a_held_out_file_decides_if_there_is_one(tmp_path, capsys):
    write(tmp_path, "prompts", "Prompt", "a", "b", "c")
    write(tmp_path, "prompts_heldout", "Prompt", "d")
    assert prompts_of(tmp_path, "prompts", False) == ["a", "b", "c"]
    assert prompts_of(tmp_path, "prompts", True) == ["d"]
    assert capsys.readouterr().out == ""


def test_what_is_held_out_is_printed_once(tmp_path, capsys):
    write(tmp_path, "prompts", "Prompt", "a", "b", "c")
    prompts_of(tmp_path, "prompts", False)
    assert capsys.readouterr().out == ""
    prompts_of(tmp_path, "prompts", True)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "no prompts_heldout.csv: 2 of 3 prompts" in printed


def test_one_prompt_cannot_be_held_out(tmp_path):
    write(tmp_path, "comparisons", "Prompt,Chosen,Rejected", "a,x,y", "a,z,y")
    assert prompts_of(tmp_path, "comparisons", False) == ["a", "a"]
    with pytest.raises(InputError, match="one prompt only.*write .*comparisons_heldout.csv"):
        prompts_of(tmp_path, "comparisons", True)


def test_votes_are_held_out_by_the_folders_file(tmp_path):
    """--comparison-files: all of their rows are trained on if the folder has a held-out file."""
    lines = ["Prompt,Chosen,Rejected", "a,x,y", "b,x,y"]
    write(tmp_path, "votes", *lines)
    files = (tmp_path / "votes.csv",)
    (path, frame), *none = read_rows(str(tmp_path), "comparisons", False, 0.1, files)
    assert (path, list(frame["Prompt"]), none) == (files[0], ["a"], [])
    write(tmp_path, "comparisons_heldout", "Prompt,Chosen,Rejected", "c,x,y")
    assert len(read_rows(str(tmp_path), "comparisons", False, 0.1, files)[0][1]) == 2
    assert prompts_of(tmp_path, "comparisons", True) == ["c"]


def test_rankings_are_held_out_by_the_file_of_comparisons(tmp_path):
    """Both kinds are evaluated on comparisons. Without that file, "b" has a hash below 0.3."""
    write(tmp_path, "rankings", "Prompt,Response,Rank", "a,x,1", "b,x,1", "b,y,2")
    assert prompts_of(tmp_path, "rankings", False) == ["a"]
    write(tmp_path, "comparisons_heldout", "Prompt,Chosen,Rejected", "c,x,y")
    assert prompts_of(tmp_path, "rankings", False) == ["a", "b", "b"]


def test_prompts_of_messages_are_read(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": 'Say "hi"'}]
    cell = json.dumps(messages).replace('"', '""')
    write(tmp_path, "prompts", "Prompt", f'"{cell}"', "plain")
    write(tmp_path, "prompts_heldout", "Prompt", '"[1, 2] are numbers"')
    assert prompts_of(tmp_path, "prompts", False) == [messages, "plain"]
    assert prompts_of(tmp_path, "prompts", True) == ["[1, 2] are numbers"]


def test_a_prompt_that_is_no_list_of_messages_is_an_error(tmp_path):
    write(tmp_path, "prompts", "Prompt", "fine", "\"[{'role': 'user', 'content': 'Hi'}]\"")
    with pytest.raises(InputError, match="prompts.csv, row 2: Prompt looks like messages"):
        prompts_of(tmp_path, "prompts", False)
