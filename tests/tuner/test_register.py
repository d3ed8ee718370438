"""`import spectune` makes PEFT know the method, in any order and any number of times."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ..effort import PATIENCE


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CHECK = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as M; print(type(M['SPECTUNE']()).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import spectune, peft",
        "import peft, spectune",
        "import spectune; from peft import PeftModel",
        "from spectune import SpectralConfig",
        "import spectune; from transformers.utils import is_peft_available; is_peft_available()",
        "import spectune, importlib; importlib.reload(spectune); import peft; importlib.reload(spectune)",
    ],
)
def test_registration_does_not_depend_on_the_order_of_imports(imports: str) -> None:
    assert run(f"{imports}\n{CHECK}") == "SpectralConfig"


def test_importing_spectune_alone_imports_neither_torch_nor_peft() -> None:
    assert (
        run("import spectune, sys; print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])") == "[]"
    )


def test_a_pickled_config_opens_in_a_fresh_process() -> None:
    import pickle

    from spectune import SpectralConfig

    data = pickle.dumps(SpectralConfig(r=5))
    assert run(f"import pickle; print(pickle.loads({data!r}).r)") == "5"


def test_registering_twice_does_nothing() -> None:
    from spectune.tuner import peft_type, register

    register.register()
    assert peft_type.extend(type(peft_type.PEFT_TYPE)) is peft_type.PEFT_TYPE
