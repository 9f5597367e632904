"""`ehr-embed COMMAND ...`: find the command, and hand it the rest of the command line.

Nothing is imported here that loads torch, so that `ehr-embed --help` and shell completion answer at once.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module

from ehr_embed import __version__
from ehr_embed.core.collector import collect_rarely
from ehr_embed.core.errors import unknown_name
from ehr_embed.core.pipes import reader_may_leave
from ehr_embed.core.programs import PROGRAM, started_as

COMPLETION = ("-sc", "--shell-completion")
"""Hydra's flag of an application: what the shell calls, and what installs the completion."""


@dataclass(frozen=True)
class Command:
    """A command of the console script.

    Attributes:
        module: the module whose `main` runs it.
        config: its configuration in conf/, for a command that Hydra composes; None = it parses its arguments itself.
        what: one line of help.
    """

    module: str
    config: str | None
    what: str


COMMANDS = {
    "train": Command("ehr_embed.console.train", "train", "prepare what is missing, train and evaluate; -m runs many"),
    "embed": Command("ehr_embed.console.embed", "embed", "prepare a dataset: vocabulary, event store, embedding table"),
    "predict": Command("ehr_embed.predict", "predict", "probabilities of a finished run for a dataset's subjects"),
    "explain": Command("ehr_embed.explain", "explain", "what moved the predictions of a finished run"),
    "represent": Command("ehr_embed.represent", "represent", "vectors of records or events, for probes and clustering"),
    "generate": Command("ehr_embed.generate", "generate", "futures of subjects, from a run that predicts events"),
    "ask": Command("ehr_embed.ask", "ask", "risks of outcomes in words, from a run that predicts times"),
    "serve": Command("ehr_embed.serve", "serve", "predictions over HTTP, for other programs of this machine"),
    "report": Command("ehr_embed.report", "report", "report.html of a run or of a search, again"),
    "compare": Command("ehr_embed.compare", None, "several runs: one table, plots, paired bootstrap tests"),
    "tabulate": Command("ehr_embed.tabulate", None, "many runs: one row per setting, with means over seeds"),
    "convert": Command("ehr_embed.convert", "convert", "a corpus or a checkpoint of the original pipeline"),
    "migrate": Command("ehr_embed.migrate", None, "a configuration of the original pipeline to an experiment"),
    "new": Command("ehr_embed.console.new", None, "a project of your own: a model, an experiment, a test"),
}


def usage() -> str:
    """Return the text of `ehr-embed --help`."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.what}" for name, command in COMMANDS.items())
    return f"""{PROGRAM} {__version__}: text-embedded transformers for health-record event sequences.

  {PROGRAM} train                                              a synthetic cohort, from data to held-out metrics
  {PROGRAM} train data=meds data.root=DIR task.labels=NAME     your MEDS dataset
  {PROGRAM} train -m seed=0,1,2                                one run for each value
  {PROGRAM} train sweeps=encoder_tpe                           a search

Commands:
{listed}

{PROGRAM} COMMAND --help lists a command's keys. Completion in bash: eval "$({PROGRAM} -sc install=bash)"; also zsh, fish."""


@reader_may_leave()
def main() -> None:
    """Run the command line."""
    collect_rarely()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
    elif arguments[0] == "--version":
        print(__version__)
    elif arguments[0] in COMPLETION:
        complete(arguments)
    elif arguments[0] in COMMANDS:
        start(arguments[0], arguments[1:])
    else:
        print(f"error: {unknown_name('command', arguments[0], COMMANDS, f'Type: {PROGRAM} --help')}", file=sys.stderr)
        sys.exit(2)


def start(name: str, arguments: list[str]) -> None:
    """Run a command in this process; its exit code becomes that of the process where it is not 0."""
    command = COMMANDS[name]
    sys.argv = [sys.argv[0], *arguments]
    with started_as(name):
        found = import_module(command.module)
        if command.config is None:
            if code := found.main(arguments):
                sys.exit(code)
        else:
            from ehr_embed.experiment.cli import run_main

            run_main(found.main, command.config)


def complete(arguments: list[str]) -> None:
    """Answer the shell: names of commands for the first word; what follows it is answered by the command's own configuration.

    Hydra's script of the shell knows applications without commands, and asks the program itself.
    """
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if "query=" not in " ".join(arguments):
        start("train", arguments)  # which prints the script that is to be evaluated
    elif len(words) < 2 or (len(words) == 2 and not line[-1].isspace()):
        print(" ".join(name for name in COMMANDS if name.startswith("".join(words[1:]))))
    elif words[1] in COMMANDS and COMMANDS[words[1]].config is not None:
        rest = line.split(maxsplit=2)[2:]
        os.environ["COMP_LINE"] = f"{PROGRAM} {''.join(rest)}"
        start(words[1], arguments)
