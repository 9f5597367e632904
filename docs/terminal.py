"""Record what a user sees of `make demo`: on a terminal, and in the log file of a job without one.

Run from anywhere; writes docs/terminal.md anew, which takes the time of two runs of the demo:

    python docs/terminal.py
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "terminal.md"
COMMANDS = ("embed.py", "train.py")
"""The commands that `make demo` runs after it has made the environment."""
COLUMNS, LINES = 120, 40
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEAD = """# What the terminal shows

This page holds what `make demo` writes, recorded by `python docs/terminal.py`, so that you can compare it with your own screen.
The first part was recorded in a pseudo-terminal of {columns} columns: a line of progress is written over itself, and stands here
as it was last written. The second part is the log file of the same commands without a terminal, as a job of Slurm has it: a line
of progress comes once a minute, and none where a step takes less. The first line on CPU threads is printed only where other
programs keep the machine busy, as they did here.

Recorded on {machine}.

"""


def on_a_terminal(
    *arguments: str,
    cwd: Path,
    environment: Mapping[str, str],
    silent_s: float | None = None,
    columns: int = COLUMNS,
    kind: str = "xterm",
) -> tuple[int, str]:
    """Run a Python program in a pseudo-terminal, and return its exit code and what it wrote there.

    Args:
        arguments: those of the interpreter.
        cwd: the folder in which it runs.
        environment: its environment variables.
        silent_s: seconds without a byte after which the program is killed; None = it may take as long as it will.
        columns: width of the terminal.
        kind: what it tells the program that it is, in TERM.

    Raises:
        TimeoutError: the program wrote nothing for so long.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**environment, "TERM": kind},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    parts = []
    while True:
        if not select.select([master], [], [], silent_s)[0]:
            process.kill()
            raise TimeoutError(f"{arguments} wrote nothing for {silent_s} s")
        try:
            part = os.read(master, 65_536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    return process.wait(), b"".join(parts).decode()


def shown(written: str) -> list[str]:
    """Return the lines that are left on the screen: each as it was last written, without colours.

    >>> shown("a: 10%\\ra: 100%\\r\\n\\x1b[1mdone\\x1b[0m  \\r\\n")
    ['a: 100%', 'done']
    """
    lines = []
    for line in ESCAPE.sub("", written).replace("\r\n", "\n").split("\n"):
        screen = ""
        for part in line.split("\r"):
            screen = part + screen[len(part) :]
        lines.append(screen.rstrip())
    while lines and not lines[-1]:
        lines.pop()
    return lines


def log_of(*arguments: str, cwd: Path, environment: Mapping[str, str]) -> list[str]:
    """Run a Python program with its output in a file, and return the lines of the file."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        subprocess.run(
            [sys.executable, *arguments], cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True
        )
        file.seek(0)
        return file.read().splitlines()


def main() -> None:
    """Record both, and write the page."""
    machine = " ".join(sys.argv[1:]) or f"{os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}"
    parts = [HEAD.format(columns=COLUMNS, machine=machine)]
    for title, is_terminal in (("On a terminal", True), ("In a log file", False)):
        with tempfile.TemporaryDirectory() as folder:
            cwd = Path(folder)
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            environment.pop("EHR_EMBED_CACHE", None)
            lines = []
            for program in COMMANDS:
                words = str(ROOT / program)
                lines.append(f"$ python {program}" + ("" if is_terminal else " > slurm-1.out 2>&1; cat slurm-1.out"))
                if is_terminal:
                    code, written = on_a_terminal(words, cwd=cwd, environment=environment)
                    if code:
                        raise RuntimeError(f"{program} ended with exit code {code}: {written}")
                    lines += shown(written)
                else:
                    lines += log_of(words, cwd=cwd, environment=environment)
        parts.append(
            f"## {title}\n\n```text\n" + "\n".join(line.replace(str(cwd), "DIR") for line in lines) + "\n```\n"
        )
    PAGE.write_text(parts[0] + "\n".join(parts[1:]), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
