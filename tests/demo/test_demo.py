"""Every method through the demo's journey: train, save, fresh process, export, plain PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.demo import DemoOptions, run_demo
from spectune.errors import OptionError


# Coefficients between frozen singular vectors, and no basis at all; spectral_a goes through the command line in
# tests/cli. The others' travels are tests/tuner's; each journey starts two processes.
@pytest.mark.parametrize("method", ["svft", "lidb"])
def test_a_method_survives_the_journey(method: str, tmp_path: Path) -> None:
    options = DemoOptions(method=method, steps=3, sentences=40)
    done = run_demo(options, tmp_path, lambda line: None, lambda name, steps: lambda step, steps, loss: None)
    assert done.reload_agreement == 1.0 and done.lora_agreement == 1.0
    assert done.result.steps == 3 and done.result.trainable > 0
    assert done.export.proof.max_relative_error < 1e-5 and all(check.ok for check in done.result.checks)


@pytest.mark.parametrize(
    ("options", "line"), [({"steps": 0}, "training.steps"), ({"method": "nope"}, "unknown method")]
)
def test_wrong_options_are_refused_before_any_work(options: dict[str, object], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        DemoOptions(**options).check()  # type: ignore[arg-type]
