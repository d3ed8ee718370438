"""Runs of the recipes with a step of eight examples, on as many processes as there are.

`torchrun --nproc-per-node 2 -m tests.runs.distributed_cases FOLDER` runs them on two; `one_process` in this one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import DistributedType

from spectune.adapter import gathered, spectral_modules
from spectune.cli import main
from spectune.errors import OptionError
from spectune.recipes import parse_config
from spectune.runs import run, train, train_run
from spectune.training import Interrupted
from spectune.training.yaml_file import write_yaml

from ..abilities import FSDP2_ON_A_CPU, RESUMES_ON_SEVERAL_CPUS
from ..models import vit_targets
from ..recipes import tiny
from ..tuner.test_sharding import bytes_here
from .cut_model import compare

EXAMPLES = 8  # of one optimizer step, over all processes
STEPS = 5
LLAMA = ["q_proj", "v_proj", "up_proj"]
VIT = [vit_targets()[0]]
# name: (recipe, adapter, forwards per step)
CASES: dict[str, tuple[str, Any, int]] = {
    "spectral_a": ("text", {"method": "spectral_a", "r": 2, "target_modules": ["query", "value"]}, 1),
    "spectral_r": ("lm", {"method": "spectral_r", "r": 4, "target_modules": LLAMA}, 1),
    "svft": ("lm", {"method": "svft", "pattern": "banded", "target_modules": LLAMA}, 1),
    "singular decay and gradient norm": (
        "text",
        {"method": "spectral_a", "r": 2, "target_modules": ["query"], "singular_decay": 5.0, "grad_norm": "rms"},
        1,
    ),
    "gradient accumulation, tokens": (
        "lm",
        {"method": "spectral_a", "r": 2, "target_modules": ["embed_tokens", *LLAMA]},
        2,
    ),
    "gradient accumulation, classes": (
        "image",
        {"method": "spectral_a", "r": 2, "target_modules": VIT},
        2,
    ),
    "full fine-tuning": ("image", "none", 1),
    "muon": ("text", {"method": "svft", "pattern": "dense", "target_modules": ["query"]}, 1),
}
# DeepSpeed's optimizer holds other tensors than the adapter's, so dynamics and muon are refused there.
ZERO = [name for name in CASES if name not in ("singular decay and gradient norm", "muon")]
# Those that move between DeepSpeed's processes and a single one.
MOVED = ["spectral_a", "svft"]
BASES = ("U_OR", "Vh_RI")
# Up to so many numbers, DeepSpeed keeps whole what it has gathered.
KEEPS_WHOLE = [
    f"stage3_{name}"
    for name in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
]


def prepare(folder: Path) -> None:
    """Write models and data, answers of one to eleven tokens among them: processes then hold unequal counts."""
    values = {
        "text": tiny.text_run(_made(folder / "text"), dropout=0.0),
        "lm": tiny.lm_run(_made(folder / "lm")),
        "image": tiny.image_run(_made(folder / "image")),
    }
    rows = [
        {"question": f"w{i} w{i + 1}", "answer": " ".join(f"w{j}" for j in range(1 + i * 7 % 11))} for i in range(24)
    ]
    Path(values["lm"]["data"]["train"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "runs.json").write_text(json.dumps(values))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def config_of(name: str, folder: Path, processes: int) -> Any:
    """Get the configuration of a case whose step has `EXAMPLES` examples on so many processes."""
    recipe, adapter, forwards = CASES[name]
    values = json.loads((folder / "runs.json").read_text())[recipe]
    training = {
        "steps": STEPS,
        "save_every": 2,
        "batch_size": EXAMPLES // forwards // processes,
        "gradient_accumulation": forwards,
        "learning_rate": 1e-3 if adapter == "none" else 1e-2,
        "optimizer": "muon" if name == "muon" else "adamw_torch",
    }
    return parse_config(tiny.merged(values, {"adapter": adapter, "training": training}))


def stopped(name: str, folder: Path, output: Path, processes: int, step: int = 2) -> None:
    """Run, or go on, until the main process alone gets a signal in this step."""

    def stop(done: int, steps: int, loss: float) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        run(config_of(name, folder, processes), output, on_step=stop, resume=output.exists())
    except Interrupted:
        return
    raise AssertionError("the run did not stop")


def pair(folder: Path) -> None:
    """Run every case on the processes of this launch, and move runs between one process and them."""
    for name in CASES:
        with _compared(name):
            train_run(config_of(name, folder, dist.get_world_size()), folder / "pair" / name)
    _through_the_command(folder)
    stopped("spectral_a", folder, folder / "from pair", dist.get_world_size())
    if RESUMES_ON_SEVERAL_CPUS:
        run(config_of("spectral_a", folder, dist.get_world_size()), folder / "from one", resume=True)
    if FSDP2_ON_A_CPU:
        _sharded(folder)


def _through_the_command(folder: Path) -> None:
    config = folder / f"{os.environ['RANK']}.yaml"
    config.write_text(write_yaml(config_of("spectral_a", folder, dist.get_world_size()).plain()))
    sys.argv = ["spectune", "train", str(config), "-o", str(folder / "command"), "--json"]
    with redirect_stdout(StringIO()) as said, suppress(SystemExit):
        main()
    (folder / f"{os.environ['RANK']}.said").write_text(said.getvalue())


def _sharded(folder: Path) -> None:
    """Train through accelerate's FSDP2, which shards on accelerators alone: here it takes the CPU for one."""
    connect = accelerate.state.PartialState.__init__

    def take_for_accelerator(self: Any, *args: Any, **kwargs: Any) -> None:
        connect(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = take_for_accelerator
    told = yaml.safe_load((Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml").read_text())
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ |= {key.upper(): str(value) for key, value in told["fsdp_config"].items()}
    done = train_run(config_of("svft", folder, dist.get_world_size()), folder / "sharded")
    held = bytes_here(done.model, BASES)
    (folder / f"{os.environ['RANK']}.bytes").write_text(str(held))
    stopped("svft", folder, folder / "sharded to one", dist.get_world_size())
    for name in ("sharded to pair", "sharded from one"):  # the second was stopped on one process
        if name == "sharded to pair" and os.environ["RANK"] == "0":
            shutil.copytree(folder / "sharded to one", folder / name)
        dist.barrier()
        run(config_of("svft", folder, dist.get_world_size()), folder / name, resume=True)


def zero(folder: Path) -> None:
    """Train through DeepSpeed as accelerate's launcher sets it up, and go on from one process."""
    stage = _cut_small_parameters()
    for name in ZERO:
        if not is_taken(name, stage):
            with pytest.raises(
                OptionError, match="model: cannot be loaded under zero.Init: .*size mismatch for classifier"
            ):
                train_run(config_of(name, folder, dist.get_world_size()), folder / "refused")
            continue
        with _compared(name):
            done = train_run(config_of(name, folder, dist.get_world_size()), folder / f"zero{stage}" / name)
        if name == "svft" and stage != "2":
            cut = [getattr(module, basis) for _, _, module in spectral_modules(done.model) for basis in BASES]
            assert not any(part.numel() for part in cut)
            held = sum(part.ds_tensor.numel() * part.element_size() for part in cut)
            (folder / f"{os.environ['RANK']}.zero{stage}.bytes").write_text(str(held))
    if stage.endswith("init"):
        compare(config_of("svft", folder, dist.get_world_size()), folder / "one" / "svft" / "adapter", folder)
    for name in MOVED:
        stopped(name, folder, folder / f"zero{stage} to one" / name, dist.get_world_size())
    zero_again(folder, f"zero{stage} from one")


def is_taken(name: str, stage: str) -> bool:
    """Ask whether a case trains: under zero.Init, transformers does not replace the head of a picture model."""
    return not (stage.endswith("init") and CASES[name][0] == "image")


def zero_again(folder: Path, place: str = "") -> None:
    """Go on with runs that one process stopped."""
    place = place or f"zero{_cut_small_parameters()} to one"
    for name in MOVED:
        run(config_of(name, folder, dist.get_world_size()), folder / place / name, resume=True)


def _cut_small_parameters() -> str:
    """Have ZeRO-3 cut a tiny model, too, and give back at once what it gathers; get the stage of this launch."""
    made = accelerate.DeepSpeedPlugin.__post_init__

    def make(self: Any) -> None:
        made(self)
        self.hf_ds_config.config["zero_optimization"] |= dict.fromkeys(KEEPS_WHOLE, 0)

    accelerate.DeepSpeedPlugin.__post_init__ = make
    begins_cut = os.environ.get("ACCELERATE_DEEPSPEED_ZERO3_INIT") == "true"
    return os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] + (" init" if begins_cut else "")


@contextmanager
def _compared(name: str) -> Iterator[None]:
    """Compare the trained weights of all processes when a run saves them; the result's model is read from the file."""
    save = train._save

    def save_equal(recipe: Any, trainer: Any, found: Any) -> int:
        _say_if_weights_differ(name, trainer.accelerator.unwrap_model(trainer.model))
        return save(recipe, trainer, found)

    train._save = save_equal
    try:
        yield
    finally:
        train._save = save


def _say_if_weights_differ(name: str, model: torch.nn.Module) -> None:
    with gathered(*model.parameters()):
        mine = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    if not all(torch.equal(other, mine) for other in others):
        raise AssertionError(f"{name}: the processes hold other weights")


def killed(folder: Path) -> None:
    """Run, and have the main process kill the other one in the third step."""
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))

    def kill(done: int, steps: int, loss: float) -> None:
        if done == 3:
            os.kill(int((folder / "1.pid").read_text()), signal.SIGKILL)

    run(config_of("spectral_a", folder, 2), folder / "killed", on_step=kill)


if __name__ == "__main__":
    from spectune.training import join

    join()
    {"pair": pair, "killed": killed, "zero": zero, "zero again": zero_again}[sys.argv[1]](Path(sys.argv[2]))
