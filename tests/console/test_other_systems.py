"""Windows and macOS: what only some systems have is asked for where it is needed, and training needs none of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from ehr_embed.training import memory
from tests.helpers.small_meds import ROOT

WITHOUT = '''
import builtins, importlib, os, pkgutil, signal, sys, types

MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog"}
NAMES = {"os": {"killpg", "getpgrp", "getpgid", "setsid", "fork", "nice", "sysconf", "sched_getaffinity", "sched_setaffinity",
                "getuid", "geteuid", "uname", "statvfs", "EX_TEMPFAIL", "getloadavg", "posix_fadvise", "sendfile", "wait"},
         "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "alarm", "pause", "pthread_sigmask"}}


class Without(types.ModuleType):
    """A module without some of its names."""
    def __init__(self, module, names):
        super().__init__(module.__name__)
        self.__dict__.update({name: value for name, value in vars(module).items() if name not in names})


STAND_INS = {name: Without(sys.modules[name], names) for name, names in NAMES.items()}
STAND_INS["os"].name = "nt"
real = builtins.__import__


def imported(name, globals=None, locals=None, fromlist=(), level=0):
    """Our modules alone see a system without these modules and names; libraries have their own branches for Windows."""
    if ((globals or {}).get("__name__") or "").split(".")[0] == "ehr_embed" and level == 0:
        if name in MODULES:
            raise ImportError(f"{name}: blocked")
        if name in STAND_INS:
            return STAND_INS[name]
    return real(name, globals, locals, fromlist, level)


builtins.__import__ = imported
import ehr_embed
from pathlib import Path
for found in pkgutil.walk_packages(ehr_embed.__path__, "ehr_embed."):
    if not found.name.startswith(("ehr_embed.console.template", "ehr_embed.__main__")):
        importlib.import_module(found.name)
from ehr_embed.console.main import main
from ehr_embed.core import stopping, threads
from ehr_embed.training import memory
assert not hasattr(stopping.os, "killpg") and stopping.SIGNALS, "the stand-ins are not in use"
memory.STATUS = Path("absent")
threads._PROC = Path("absent")
main()
'''


@pytest.mark.slow
def test_the_demo_trains_without_what_only_posix_has(tmp_path):
    arguments = [
        "train",
        "data.n_subjects=300",
        "embedder=hashing",
        "trainer.epochs=1",
        "trainer.n_bootstrap=20",
        "run_dir=run",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "EHR_EMBED_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["train"]["peak_memory_mib"] > 100


def test_peak_memory_is_measured_where_neither_linux_nor_posix_tells_it(monkeypatch, tmp_path):
    told = memory.peak_memory_mib(torch.device("cpu"))
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    assert memory.peak_memory_mib(torch.device("cpu")) >= told / 2
    importlib.import_module("psutil")  # which imports resource on Linux
    monkeypatch.setitem(sys.modules, "resource", None)
    assert told * 2 >= memory.peak_memory_mib(torch.device("cpu")) > 50
