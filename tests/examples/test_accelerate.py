"""The ready configurations of accelerate: each parses, and names only keys that accelerate knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def known(section: str) -> set[str]:
    """The names that `accelerate launch` takes from a section of its file."""
    options = {action.dest for action in launch_command_parser()._actions}
    # Without the section's own word in front where the launcher's option has none.
    return options | {f"{section}_{option}" for option in options}


def test_every_engine_has_one() -> None:
    assert [path.stem for path in FILES] == ["ddp", "fsdp2", "zero2", "zero3"]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_it_names_only_keys_that_accelerate_knows(path: Path) -> None:
    assert isinstance(load_config_from_file(str(path)), ClusterConfig)  # refuses unknown keys of the first level
    values = yaml.safe_load(path.read_text())
    assert set(values) <= {field.name for field in dataclasses.fields(ClusterConfig)}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(values.get(section, {})) <= known(section.removesuffix("_config")), section


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_the_launcher_takes_it(path: Path) -> None:
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "spectune.cli", "train", "run.yaml"])
    assert args.training_script == "spectune.cli" and args.training_script_args == ["train", "run.yaml"]
