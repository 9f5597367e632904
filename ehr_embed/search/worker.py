"""`python -m ehr_embed.search.worker PID`: read one job of the search with process id PID from standard input, and run it."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import run_job, setup_globals
from omegaconf import open_dict

from ehr_embed.core.collector import collect_rarely

PARENT_CHECK_S = 0.5


def main() -> None:
    """Run the job as Hydra would; `SearchCallback` writes its outcome, and the exit code carries no meaning."""
    collect_rarely()
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    application = pickle.load(sys.stdin.buffer)  # safe: the search that started this process wrote it
    setup_globals()
    Singleton.set_state(application["singletons"])
    context = application["hydra_context"]
    config = context.config_loader.load_sweep_config(application["config"], application["overrides"])
    with open_dict(config):
        config.hydra.job.id = f"{config.hydra.job.name}_{application['number']}"
        config.hydra.job.num = application["number"]
    HydraConfig.instance().set_config(config)
    run_job(
        hydra_context=context,
        task_function=application["task_function"],
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C, so that the run closes its tracker and files before the process ends."""
    raise KeyboardInterrupt


def _end_with_parent(parent: int) -> None:
    """End this process and its children when the search is gone, even by SIGKILL: nothing would read the result."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    if hasattr(os, "killpg"):
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)  # on Windows, where a process has no group


if __name__ == "__main__":
    main()
