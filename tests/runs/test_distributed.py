"""Two processes (gloo, on a CPU) train what one process trains, move runs to and fro, and die in bounded time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file

from spectune import SpectralConfig
from spectune.errors import OptionError, OutputError
from spectune.recipes.table import recipe_class
from spectune.runs import RunResult, run
from spectune.runs.building import build
from spectune.training.checkpoints import checkpoints, history
from spectune.training.engines import refuse_deepspeed_options, refuse_fsdp_options, refuse_output_embedding

from ..abilities import RESUMES_ON_SEVERAL_CPUS, needs_fsdp2_on_a_cpu
from ..effort import PATIENCE
from ..models import MODELS
from ..tuner.test_sharding import bytes_here
from .distributed_cases import BASES, CASES, MOVED, STEPS, ZERO, config_of, is_taken, prepare, stopped

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# A sum over eight examples rounds otherwise than two sums over four: 1e-7 of a gradient. Adam divides a gradient by
# its own size, so an entry whose gradient is a thousandth of the loss's scale moves by 1e-4 of a step of 1e-2.
WEIGHTS = 1e-5
# Of the figure itself where it is above one, as a perplexity of 127 is, and of the logits' scale where it is below.
LOSS = 1e-5


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Runs that one process stopped.
STOPPED = {"spectral_a": "from one", "svft": "sharded from one"}


def launch(*words: str | Path, by: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    """Run a module on two processes."""
    command = [sys.executable, "-m", *by, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def near(figures: Any) -> Any:
    return pytest.approx(figures, rel=LOSS, abs=LOSS)


def saved(folder: Path) -> dict[str, Any]:
    return {name: tensor for path in folder.glob("*/*.safetensors") for name, tensor in load_file(path).items()}


def difference(first: Path, second: Path) -> float:
    one, two = saved(first), saved(second)
    assert one.keys() == two.keys() and one
    # A key's bias moves no attention: its gradient is roundoff alone, and Adam makes steps of it.
    return max(float((one[name] - two[name]).abs().max()) for name in one if not name.endswith("key.bias"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every case on one process and on two."""
    folder = tmp_path_factory.mktemp("distributed")
    prepare(folder)
    for name in CASES:
        run(config_of(name, folder, 1), folder / "one" / name)
    for name, place in STOPPED.items():
        stopped(name, folder, folder / "stopped" / name, 1)
        shutil.copytree(folder / "stopped" / name, folder / place)
    done = launch("-m", "tests.runs.distributed_cases", "pair", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_train_what_one_trains_on_the_same_examples(name: str, runs: Path) -> None:
    one, two = RunResult.read(runs / "one" / name), RunResult.read(runs / "pair" / name)
    assert len(two.losses) == STEPS and two.losses == near(one.losses)
    assert difference(runs / "one" / name, runs / "pair" / name) < WEIGHTS
    assert two.trainable == one.trainable and two.file_bytes == one.file_bytes
    for split, figures in one.metrics.items():
        assert two.metrics[split] == near(figures)


def test_the_bases_are_not_sent_before_every_forward(runs: Path) -> None:
    config = config_of("svft", runs, 1)
    recipe = recipe_class(config.recipe)(config)
    model, plan = build(recipe)
    recipe.trainer(model, plan, runs / "unused")
    left = model._ddp_params_and_buffers_to_ignore
    assert {name.rpartition(".")[2] for name in left} >= {"U_OR", "S_R", "Vh_RI", "sketch"}
    assert all(".spectune_adapter." in name for name in left)


def test_only_one_process_writes(runs: Path) -> None:
    def names(folder: Path) -> set[str]:
        files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        return {name for name in files if "rng_state" not in name}

    assert names(runs / "pair" / "spectral_a") == names(runs / "one" / "spectral_a")


def test_a_run_goes_on_with_fewer_and_with_more_processes(runs: Path) -> None:
    whole = RunResult.read(runs / "one" / "spectral_a")
    assert [path.name for path in checkpoints(runs / "from pair" / "checkpoints")] == ["checkpoint-2", "checkpoint-3"]
    fewer = run(config_of("spectral_a", runs, 1), runs / "from pair", resume=True)
    more = [RunResult.read(runs / "from one")] if RESUMES_ON_SEVERAL_CPUS else []
    for moved in (fewer, *more):
        assert moved.losses == near(whole.losses)
        assert difference(Path(moved.folder), Path(whole.folder)) < WEIGHTS


def test_a_step_of_other_examples_is_refused(runs: Path) -> None:
    halved = config_of("spectral_a", runs, 2)
    with pytest.raises(OutputError, match="examples per step, but 4 x 1 on each of 1 processes are 4"):
        run(halved, runs / "one" / "spectral_a", resume=True)


def test_a_checkpoint_that_deepspeed_wrote_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "stopped" / "svft", tmp_path / "svft")
    for state in tmp_path.rglob("optimizer.pt"):
        state.replace(state.with_name("global_step2"))
    with pytest.raises(OutputError, match="cannot continue: this checkpoint has no optimizer.pt"):
        run(config_of("svft", runs, 1), tmp_path / "svft", resume=True)


def test_a_killed_worker_ends_the_launch_and_costs_no_checkpoint(runs: Path) -> None:
    done = launch("-m", "tests.runs.distributed_cases", "killed", runs)  # within PATIENCE, or it raises
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr[-3000:]
    folder = runs / "killed"
    assert not (folder / "result.json").exists()
    (last,) = checkpoints(folder / "checkpoints")
    assert last.name == "checkpoint-2" and load_file(last / "adapter_model.safetensors")
    whole = RunResult.read(runs / "one" / "spectral_a")
    again = run(config_of("spectral_a", runs, 1), folder, resume=True)
    assert again.losses == near(whole.losses)
    assert difference(folder, Path(whole.folder)) < WEIGHTS


def test_the_command_prints_and_writes_once(runs: Path) -> None:
    whole = RunResult.read(runs / "one" / "spectral_a")
    printed = json.loads((runs / "0.said").read_text())
    assert {split: near(figures) for split, figures in whole.metrics.items()} == printed["metrics"]
    assert (runs / "1.said").read_text() == ""
    assert (runs / "command" / "report.html").is_file()
    assert difference(runs / "command", Path(whole.folder)) < WEIGHTS


@needs_fsdp2_on_a_cpu
def test_fsdp2_shards_the_bases_and_trains_what_one_process_trains(runs: Path) -> None:
    whole = RunResult.read(runs / "one" / "svft")
    losses = [e["loss"] for e in history(runs / "sharded" / "checkpoints" / "checkpoint-4") if "loss" in e]
    assert losses == near(whole.losses[:4])
    assert difference(runs / "sharded", Path(whole.folder)) < WEIGHTS
    model, _ = build(recipe_class("causal_lm")(config_of("svft", runs, 1)))
    all_bytes = bytes_here(model, ("U_OR", "Vh_RI"))
    for rank in range(2):
        assert int((runs / f"{rank}.bytes").read_text()) == pytest.approx(all_bytes / 2, rel=0.02)


@needs_fsdp2_on_a_cpu
def test_a_sharded_run_goes_on_with_as_many_fewer_and_more_processes(runs: Path) -> None:
    whole = RunResult.read(runs / "one" / "svft")
    last = checkpoints(runs / "sharded to one" / "checkpoints")[-1]
    # Not the whole base, which transformers writes there.
    assert sum(path.stat().st_size for path in last.rglob("*")) < 1e6 and (last / "optimizer.pt").is_file()
    run(config_of("svft", runs, 1), runs / "sharded to one", resume=True)
    for name in ("sharded to pair", "sharded from one", "sharded to one"):
        moved = RunResult.read(runs / name)
        assert moved.losses == near(whole.losses), name
        assert difference(runs / name, Path(whole.folder)) < WEIGHTS, name


@pytest.fixture(scope="module", params=["zero2", "zero3", "zero3 init"])
def zero(request: pytest.FixtureRequest, runs: Path) -> Path:
    """A folder with every case that DeepSpeed takes, by a stage; its part for CPUs needs a C++ compiler."""
    pytest.importorskip("deepspeed")
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("DeepSpeed compiles its part for CPUs, and there is no C++ compiler")
    stage = str(request.param)
    for name in MOVED:
        shutil.copytree(runs / "stopped" / name, runs / f"{stage} from one" / name)
    done = launch("-m", "tests.runs.distributed_cases", "zero", runs, by=zero_launch(stage, runs))
    assert done.returncode == 0, done.stderr[-3000:]
    return runs / stage


def zero_launch(stage: str, folder: Path) -> tuple[str, ...]:
    name, _, begins_cut = stage.partition(" ")
    told = (ROOT / f"examples/accelerate/{name}.yaml").read_text()
    if begins_cut:
        assert "zero3_init_flag: false" in told
        told = told.replace("zero3_init_flag: false", "zero3_init_flag: true")
    config = folder / f"{stage}.yaml"
    config.write_text(told)
    return "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"


def test_zero_trains_what_one_process_trains(zero: Path) -> None:
    for name in (name for name in ZERO if is_taken(name, zero.name)):
        one, two = RunResult.read(zero.parent / "one" / name), RunResult.read(zero / name)
        assert len(two.losses) == STEPS and two.losses == near(one.losses), name
        assert difference(zero / name, Path(one.folder)) < WEIGHTS, name
        assert two.trainable == one.trainable and two.file_bytes == one.file_bytes, name
        for split, figures in one.metrics.items():
            assert two.metrics[split] == near(figures), name


def test_zero_3_cuts_the_bases(zero: Path) -> None:
    if zero.name != "zero2":
        model, _ = build(recipe_class("causal_lm")(config_of("svft", zero.parent, 1)))
        for rank in range(2):
            held = int((zero.parent / f"{rank}.{zero.name}.bytes").read_text())
            assert held == pytest.approx(bytes_here(model, BASES) / 2, rel=0.02)


def test_a_run_under_deepspeed_goes_on_with_fewer_and_more_processes(zero: Path) -> None:
    moved = zero.parent / f"{zero.name} to one"
    for name in MOVED:
        last = checkpoints(moved / name / "checkpoints")[-1]
        assert not list(last.glob("global_step*")) and (last / "optimizer.pt").is_file()
        stopped(name, zero.parent, moved / name, 1, 4)
    started = zero_launch(zero.name, zero.parent)
    done = launch("-m", "tests.runs.distributed_cases", "zero again", zero.parent, by=started)
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in (moved, zero.parent / f"{zero.name} from one"):
        for name in MOVED:
            whole, other = RunResult.read(zero.parent / "one" / name), RunResult.read(folder / name)
            assert other.losses == near(whole.losses), folder
            assert difference(folder / name, Path(whole.folder)) < WEIGHTS, folder


@pytest.mark.parametrize(
    "told, answer",
    [
        ({"fsdp_version": 1}, "fsdp_version=1 does not shard bases.* Set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, "Set fsdp_cpu_ram_efficient_loading: false"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "Set fsdp_state_dict_type: FULL_STATE_DICT"),
    ],
)
def test_what_fsdp_cannot_do_with_an_adapter_is_refused(told: dict[str, Any], answer: str) -> None:
    right = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT"}
    refuse_fsdp_options(SimpleNamespace(**right))
    with pytest.raises(OptionError, match=answer):
        refuse_fsdp_options(SimpleNamespace(**right | told))


def test_an_output_embedding_that_is_trained_in_full_is_refused_under_fsdp2() -> None:
    def model(*whole: str) -> Any:
        config = LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=list(whole) or None)
        return get_peft_model(MODELS["llama"].fresh(), config)

    refuse_output_embedding(model("embed_tokens"))
    with pytest.raises(OptionError, match=r"an output embedding in modules_to_save \(lm_head\) trains otherwise"):
        refuse_output_embedding(model("lm_head"))


def test_what_deepspeed_cannot_do_with_an_adapter_is_refused() -> None:
    def model(**options: Any) -> Any:
        return get_peft_model(MODELS["llama"].fresh(), SpectralConfig(r=2, target_modules=["q_proj"], **options))

    agrees = SimpleNamespace(mismatches=[])
    three = SimpleNamespace(zero_stage=3, hf_ds_config=agrees)
    still = model()
    refuse_deepspeed_options(three, still)
    with pytest.raises(OptionError, match="singular_decay and grad_norm have no effect under DeepSpeed"):
        refuse_deepspeed_options(three, model(grad_norm="rms"))
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=9)
    with pytest.raises(OptionError, match="ZeRO-3.* Use ZeRO-2 or DDP"):
        refuse_deepspeed_options(three, get_peft_model(MODELS["llama"].fresh(), config))
    differs = SimpleNamespace(mismatches=["- ds gradient_clipping=0.3 vs hf max_grad_norm=1.0"])
    with pytest.raises(OptionError, match=r"the run: DeepSpeed gradient_clipping=0.3 vs hf max_grad_norm=1.0. Leave"):
        refuse_deepspeed_options(SimpleNamespace(zero_stage=2, hf_ds_config=differs), still)
