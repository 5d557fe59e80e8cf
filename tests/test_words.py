"""The word list of `make lint` finds the words it should, and no others."""

from pathlib import Path

import pytest

from tests import words


@pytest.mark.parametrize(
    "text",
    [
        "The run goes on.",
        "def test_training_goes_on():",
        '"the run goes "\n    f"on at step 3"',
        "# a run that has gone\n# on",
        "{path} is no run",
        "these are no shards",
        "Whoever reads it",
        "after so many steps",
        "8 micro-steps",
        "three products per block",
        "the newest whole checkpoint",
        "Likewise.",
    ],
)
def test_old_words_are_found(text: str) -> None:
    assert len(list(words.find(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "The run resumes; it is no longer needed, and there is no other.",
        "if there\n    # is no checkpoint",
        "lines go on the screen",
        "not so many as before",
        "the dot products are exact, as are products of sizes",
        'rung["utilisation"], renewed, retold, speakeasy',
    ],
)
def test_plain_text_passes(text: str) -> None:
    assert list(words.find(text)) == []


def test_each_word_is_printed_with_file_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {
        "README.md": "All good.\nThe ranks are told, and\nit goes on.\n",
        "rekindle/model/a.py": "# compile anew\n",
        "launch/run.sh": "# for ever\n",
        "benchmarks/LOG.md": "| the run goes on |\n\nIt goes on.\n",  # a row is a record
        "docs/wikipedia-on-a-laptop.md": "```\nruns/wiki goes on\n```\nand so\n",
        "tests/faults/corpus/a.py": "goes on",
        "other/a.py": "goes on",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert words.main(tmp_path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(": say ")[0] for line in printed] == [
        'README.md:2: "told"',
        'README.md:3: "goes on"',
        'benchmarks/LOG.md:3: "goes on"',
        'launch/run.sh:1: "for ever"',
        'rekindle/model/a.py:1: "anew"',
    ]
    assert printed[1] == 'README.md:3: "goes on": say "resumes, continues"'


def test_a_clean_tree_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("The run resumes.\n")
    assert words.main(tmp_path) == 0
    assert capsys.readouterr().out == ""
