"""`ehr-embed`: every command is found, answers help without torch, and completes in the shell."""

from __future__ import annotations

import copy
import io
import os
import re
import subprocess
import sys

import pytest

from ehr_embed.console import main as console
from ehr_embed.core.errors import UserError
from ehr_embed.core.pipes import _MayBeLeft, reader_may_leave
from tests.helpers.small_meds import ROOT


def type_(*arguments: str, code: int = 0, **variables: str) -> str:
    command = [sys.executable, "-m", "ehr_embed", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_command_at_the_top_is_a_command_of_the_program():
    modules = {path.stem for path in (ROOT / "ehr_embed").glob("*.py")} - {"__init__", "__main__", "api"}
    assert modules <= set(console.COMMANDS)
    assert all(f"  {name} " in console.usage() for name in console.COMMANDS)


def test_no_command_loads_torch_before_it_works():
    modules = ", ".join(command.module for command in console.COMMANDS.values())
    code = f"import sys, ehr_embed.console.main, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_command_of_the_documents_is_there():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "ehr_embed" / "console").rglob("*.md")]
    named = {
        (page.name, name) for page in pages for name in re.findall(r"^ehr-embed ([a-z]\S*)", page.read_text(), re.M)
    }
    assert len(named) >= 3
    assert {(page, name) for page, name in named if name not in console.COMMANDS} == set()


def test_a_misspelt_command_is_named():
    assert "did you mean 'predict'" in type_("predit", code=2)


@pytest.mark.parametrize("name", ["train", "predict", "compare", "migrate"])
def test_a_command_has_help(name):
    assert name in type_(name, "--help")


def test_messages_name_what_the_user_typed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ehr-embed", "migrate", str(tmp_path / "absent.yaml")])
    with pytest.raises(SystemExit):
        console.main()
    assert "Type: ehr-embed migrate OLD.yaml" in capsys.readouterr().err
    assert str(UserError("Type: python train.py data=meds")) == "Type: python train.py data=meds", "as before"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ehr-embed tr", "train"),
        ("ehr-embed train model=encoder_", "model=encoder_small"),
        ("ehr-embed predict spl", "split="),
        ("ehr-embed train sweeps=encoder", "sweeps=encoder_tpe"),
        ("ehr-embed compare ", ""),
    ],
)
def test_the_shell_completes_commands_options_and_keys(line, found):
    assert type_("-sc", "query=bash", COMP_LINE=line).strip() == found


def test_the_completion_is_installed_for_the_program():
    code = (
        "import sys; sys.argv = ['ehr-embed', '-sc', 'install=bash']; from ehr_embed.console.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("-F hydra_bash_completion ehr-embed")


def run_python(*arguments: str, stdout: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", [["ehr_embed", "train", "--help"], ["ehr_embed.ask", "--cfg", "job"]])
def test_a_reader_that_leaves_ends_nothing(command):
    """As `| head -0`: the reader is gone before the first line, so the pipe is broken whenever something is printed."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = run_python("-m", *command, stdout=theirs)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


def test_work_goes_on_and_prints_to_nobody_when_the_reader_has_left():
    code = (
        "import sys\nfrom ehr_embed.core.pipes import reader_may_leave\nwith reader_may_leave():\n"
        "    for _ in range(3):\n        print('x' * 100_000)\n    print('written', file=sys.stderr)"
    )
    ours, theirs = os.pipe()
    os.close(ours)
    for stdout, printed in ((subprocess.PIPE, 300_003), (theirs, 0)):
        done = run_python("-c", code, stdout=stdout)
        assert (done.returncode, done.stderr, len(done.stdout or "")) == (0, "written\n", printed)
    os.close(theirs)


def test_bytes_and_lines_are_left_too_and_an_error_of_the_work_is_not_hidden():
    code = (
        "import copy, sys\nfrom ehr_embed.core.pipes import reader_may_leave\nwith reader_may_leave():\n"
        "    sys.stdout.writelines(['x' * 100_000] * 3)\n    sys.stdout.buffer.write(b'x' * 100_000)\n"
        "    copy.copy(sys.stdout).write('x' * 100_000)\n    print('written', file=sys.stderr)"
    )
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "written\n")


def test_streams_are_given_back_where_one_cannot_be_flushed(monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError("no space left on device")

    full = Full()
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(KeyError, match="its own"), reader_may_leave():
        raise KeyError("its own")
    assert sys.stdout is full
    with pytest.raises(OSError, match="no space"), reader_may_leave():
        pass
    assert sys.stdout is full
    assert copy.copy(_MayBeLeft(full)).getvalue() == ""
