"""`--help` of a command that takes no groups tells what the command is, and each of its keys, and nothing of training."""

from __future__ import annotations

from omegaconf import OmegaConf

from ehr_embed.console.main import COMMANDS
from ehr_embed.experiment.usage import SELF_DESCRIBED, usage
from tests.helpers.configs import composed
from tests.helpers.entry_points import inside  # noqa: F401  (a fixture)


def test_the_help_of_a_command_without_groups_is_its_keys_and_their_meaning(inside, tmp_path):
    for name in SELF_DESCRIBED:
        assert COMMANDS[name].config == name
        told = usage(name).splitlines()
        for key, value in OmegaConf.to_container(composed(name=name)).items():
            assert any(line.startswith(f"{key}:") for line in told), key
            for inner in value if isinstance(value, dict) else ():
                assert any(line.startswith(f"  {inner}:") for line in told), (key, inner)
        assert "run=RUN_DIR" in usage(name)
        assert len(told) < 70
    output = inside("-m", "ehr_embed.predict", "--help", cwd=tmp_path)
    assert "python -m ehr_embed.predict run=RUN_DIR" in output
    assert "Folder of a run that predicts classes" in output
    assert "Configuration groups" not in output
