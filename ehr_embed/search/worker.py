"""`python -m ehr_embed.search.worker PID`: one job of the search PID, read from standard input, run as Hydra runs it."""

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

PARENT_CHECK_S = 0.5


def main() -> None:
    """Run the job; its outcome is left by `SearchCallback`, its exit code says nothing."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    application = pickle.load(sys.stdin.buffer)  # written by the search that started this process
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
    """SIGTERM as Ctrl-C, so that trackers and files are closed on the way out."""
    raise KeyboardInterrupt


def _end_with_parent(parent: int) -> None:
    """End this process and all it started when the search is gone, even by SIGKILL: nobody would read the result."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
