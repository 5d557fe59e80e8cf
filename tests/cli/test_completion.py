"""Completion for shells knows the commands, the flags and the recipes."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = """
source {script}
complete_line() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _shtab_rekindle rekindle "${{@: -1}}" "${{@: -2:1}}"
    echo "${{COMPREPLY[@]}}"
}}
complete_line rekindle tr
complete_line rekindle train gpt2-124m-t
complete_line rekindle train demo --optim.l
"""


@pytest.fixture
def print_completion(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    from rekindle.cli import main

    def call(shell: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["--completion", shell])
        assert end.value.code == 0
        return capsys.readouterr().out

    return call


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash(tmp_path: Path, print_completion: Callable[[str], str]) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(print_completion("bash"))
    done = subprocess.run(
        ["bash", "-c", SCRIPT.format(script=script)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:3] == ["train", "gpt2-124m-tuned", "--optim.lr"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell: str, print_completion: Callable[[str], str]) -> None:
    script = print_completion(shell)
    assert "gpt2-124m-tuned" in script
    assert "hellaswag" in script
