"""`python -m ehr_embed.serve`: answer requests for predictions of a finished run over HTTP."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ehr_embed.config.check import checks_config
from ehr_embed.core.errors import UserError
from ehr_embed.core.threads import use_threads
from ehr_embed.experiment.cli import CONF, run_main

log = logging.getLogger(__name__)
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@checks_config("ServeKeys")
def serve(cfg: DictConfig) -> None:
    """Serve as `cfg` (conf/serve.yaml) says, until a signal.

    Raises:
        UserError: the extra is not installed, `Predictor` refuses the run, or the address is taken.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(
            f'{", ".join(missing)} is not installed, which the server needs. Type: pip install "ehr_embed[serve]"'
        )
    # Imported here, so that a misspelt override is refused before torch is loaded.
    from ehr_embed.inference.predictor import Predictor
    from ehr_embed.inference.trained_run import device_named
    from ehr_embed.serving.answers import Answers
    from ehr_embed.serving.app import Limits, create_app
    from ehr_embed.serving.server import hosts_of, is_loopback, listen
    from ehr_embed.serving.server import serve as serve_app

    device = device_named(cfg.device)
    listener = listen(cfg.host, cfg.port)  # before the run is opened, which takes seconds
    with listener:
        use_threads(cfg.threads, device=device.type)
        predictor = Predictor(cfg.run, device=str(device), trusted_packages=cfg.trusted_packages)
        answers = Answers(
            predictor,
            lookups=list(cfg.data.lookups),
            n_steps=cfg.n_steps,
            max_steps=cfg.max_steps,
            tolerance=cfg.tolerance,
        )
        answers.warm_up()
        limits = Limits(**{name: cfg[name] for name in Limits.__dataclass_fields__})
        allowed = None if cfg.allowed_hosts is None else list(cfg.allowed_hosts)
        hosts = hosts_of(cfg.host, allowed)
        app = create_app(answers, run_name=Path(cfg.run).expanduser().resolve().name, limits=limits, hosts=hosts)
        if not is_loopback(cfg.host):
            log.warning(
                "host=%s: other machines can reach this server, which asks for no password and does not encrypt. Put a proxy "
                "before it that does both.",
                cfg.host,
            )
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(f"serving {cfg.run} at http://{shown}:{port}: POST /predict, GET /health, GET /metrics", flush=True)
        serve_app(app, listener, shutdown_s=cfg.shutdown_s, max_connections=cfg.max_connections)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="serve")
def composed(cfg: DictConfig) -> None:
    """Serve as the command line says."""
    serve(cfg)


def main() -> None:
    """Run the command line."""
    # A request's few events are too little to share among threads, and Polars reads this once, when it is imported: one thread
    # took 15 % less CPU time per request, and 40 % less time on a busy machine.
    os.environ.setdefault("POLARS_MAX_THREADS", "1")
    composed()


if __name__ == "__main__":
    run_main(main, "serve")
