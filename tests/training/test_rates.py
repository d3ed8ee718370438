"""Learning rates: defaults for every method, words for one that is far off, and the range test's proposal."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spectune.errors import OptionError
from spectune.methods import METHODS
from spectune.recipes import parse_config
from spectune.runs import range_test
from spectune.runs.range_test import divergence, read_ramp, running_mean
from spectune.training import advice, choice, learning_rate
from spectune.training.config import RunConfig
from spectune.training.rates import FAR, HEAD_RATE, KNOWN, head_learning_rate

from ..recipes import tiny


def test_every_method_has_known_rates_around_its_default() -> None:
    for name, method in METHODS.items():
        known = KNOWN[name]
        assert known.low <= method.learning_rate <= known.high * FAR and known.source, name
        assert advice(name, method.learning_rate) is None
    for name, known in KNOWN.items():
        assert known.low <= known.high and (name in METHODS or known.low <= (known.usual or 0) <= known.high), name


def test_defaults_stand_where_the_committed_sweeps_say() -> None:
    """At most half a decade above the best compromise of small models, a decade below: papers' models are larger."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "rates.json"
    found = json.loads(path.read_text())
    for name, method in METHODS.items():
        if name not in found["compromise"]:
            assert "not measured" in KNOWN[name].source
            continue
        best = found["compromise"][name]
        assert best / 10.01 <= method.learning_rate <= 3.01 * best, name
        assert found["defaults"][name] == method.learning_rate, name


def test_a_rate_far_outside_is_warned_about() -> None:
    assert "100 times above" in (advice("svft", 10.0) or "") and "lr" in (advice("svft", 10.0) or "")
    assert "times below" in (advice("svft", 2e-5) or "")
    assert advice("svft", 9e-1) is None and advice("unheard of", 1.0) is None


def test_the_rate_of_a_run_is_asked_or_the_methods(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path)
    values["training"].pop("learning_rate")
    assert learning_rate(parse_config(values)) == METHODS["spectral_a"].learning_rate
    assert head_learning_rate(parse_config(values)) == HEAD_RATE
    full = parse_config(values | {"adapter": "none"})
    assert head_learning_rate(full) == learning_rate(full) == KNOWN["none"].usual
    with pytest.raises(OptionError, match="PSOFT has no default rate"):
        learning_rate(parse_config(values | {"adapter": {"peft_type": "PSOFT"}}))


def test_the_proposal_is_where_the_loss_falls_fastest_before_it_diverges() -> None:
    rates = [10 ** (-5 + 5 * i / 99) for i in range(100)]
    # Flat until 1e-3, a steep fall to 1e-2, flat, then up at 1e-1.
    losses = [2.0 if r < 1e-3 else 2.0 - 1.5 * min(1, 1 + (r - 1e-2) / 9e-3) if r < 1e-1 else 40 * r for r in rates]
    found = read_ramp("svft", rates, losses, 1e-3)
    assert found.steepest is not None and 2e-3 < found.steepest < 4e-2
    assert found.diverged is not None and 1e-1 <= found.diverged < 4e-1
    assert found.proposed == min(found.steepest, found.diverged / 10)
    still = read_ramp("svft", rates, [1.0] * 100, 1e-3)
    assert (still.steepest, still.diverged, still.found, still.proposed) == (None, None, None, None)
    assert divergence(running_mean([1.0, 0.9, float("nan")])) == 2


def test_what_is_proposed_is_known_to_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spectune.runs
    from spectune.cli.app import app

    rates = [10 ** (-5 + 6 * i / 99) for i in range(100)]
    found = read_ramp("svft", rates, [2.0 if r < 1 else 2.0 - r / 10 for r in rates], 1e-3)
    assert found.found is not None and found.found > KNOWN["svft"].high == found.proposed
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(json.dumps(tiny.text_run(tmp_path)))
    monkeypatch.setattr(spectune.runs, "range_test", lambda *given, **named: found)
    said = CliRunner().invoke(app, ["lr", "run.yaml", "training.batch_size=4"]).stdout
    assert "proposed learning rate: 0.1, the highest that is known to work for svft; curve: file:" in said
    assert "next: spectune train run.yaml training.batch_size=4 training.learning_rate=0.1\n" in said


def test_the_ramp_grows_exponentially_and_leaves_the_head_alone(tmp_path: Path) -> None:
    from spectune.recipes.table import recipe_class
    from spectune.runs.building import build
    from spectune.training.loop import Plan

    config = parse_config(tiny.text_run(tmp_path, training={"steps": 11}))
    recipe = recipe_class(config.recipe)(config)
    model, plan = build(recipe)
    trainer = recipe.trainer(model, Plan(plan.rates, plan.loss, ramp=1e-4), tmp_path / "out")
    optimizer = trainer.create_optimizer()
    schedule = trainer.create_scheduler(11, optimizer)
    seen = []
    for _ in range(11):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    adapter = [rates[0] for rates in seen]
    assert adapter[0] == pytest.approx(1e-6) and adapter[-1] == pytest.approx(1e-2)
    ratios = [b / a for a, b in pairwise(adapter)]
    assert ratios == pytest.approx([10**0.4] * 10)
    assert {rates[-1] for rates in seen} == {HEAD_RATE}


def test_the_range_test_of_a_head_alone_ramps_the_heads_rate(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path) | {"adapter": "head", "training": {"steps": 6, "batch_size": 4}}
    found = range_test(parse_config(values), low=1e10, high=1e38, steps=40)
    assert found.method == "head" and found.diverged is not None


def test_the_range_test_runs_on_a_recipe_and_stops_at_divergence(tmp_path: Path) -> None:
    found = range_test(parse_config(tiny.text_run(tmp_path)), low=1e10, high=1e38, steps=40)
    assert len(found.losses) == len(found.rates) < 40 and found.diverged is not None
    assert found.rates[0] == pytest.approx(1e10) and found.current == 1e-2
    with pytest.raises(OptionError, match="from 0 to"):
        range_test(parse_config(tiny.text_run(tmp_path)), low=0.0)
    with pytest.raises(OptionError, match="low below high"):
        range_test(parse_config(tiny.text_run(tmp_path)), low=1.0, high=0.1)


def test_the_rate_of_a_dense_core_goes_by_its_size_and_is_said(tmp_path: Path) -> None:
    values = tiny.text_run(tmp_path)
    values["training"].pop("learning_rate")

    def run(**options: object) -> RunConfig:
        return parse_config(values | {"adapter": {"method": "svft", "target_modules": ["query"], **options}})

    # The rates that were measured as best: 3e-3 for 78, 7e-3 for 17, 5e-3 and 1e-2 alike for 24.
    for size, lowest, highest in ((78, 2.5e-3, 3.5e-3), (24, 5e-3, 1e-2), (17, 6e-3, 8e-3)):
        assert lowest <= learning_rate(run(pattern="dense", basis_rank=size)) <= highest
    assert learning_rate(run(pattern="dense", core=[117, 52])) == pytest.approx(3e-3, rel=0.2)
    assert learning_rate(run(pattern="dense", basis_rank=1)) == learning_rate(run()) == METHODS["svft"].learning_rate
    assert learning_rate(run(pattern="dense", core=[1, 16])) == METHODS["svft"].learning_rate / 2
    assert learning_rate(run(pattern="dense")) == 1e-3
    said = choice(run(pattern="dense", basis_rank=80))
    assert said == "learning rate 0.00335: the default for these options of svft (0.03 for others)"
    assert choice(run()) is None and choice(parse_config(tiny.text_run(tmp_path))) is None
    values["training"]["learning_rate"] = 0.5
    own = run(pattern="dense", basis_rank=80)
    assert learning_rate(own) == 0.5 and choice(own) is None
