"""Each reader of LoRA folders reads a Spectune folder in a process that never names spectune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from spectune import SpectralConfig

from ..recipes import tiny
from .readers import IDS, READERS, logits, unet_output
from .start import run_installed

# The same computation in another process; on outputs of order one.
TOLERANCE = 1e-4


def saved_adapter(model: Any, place: Path, name: str, targets: list[str], **options: Any) -> Any:
    """Get a model with a trained adapter, and save it in `{name}-adapter`."""
    tuned = get_peft_model(model, SpectralConfig(r=2, target_modules=targets, **options)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, tuned.parameters()):
            parameter.add_(torch.randn_like(parameter))
    tuned.save_pretrained(place / f"{name}-adapter")
    return tuned


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """For each reader, its outputs; under "llama", "bert" and "unet", those of the models that were saved."""
    place = tmp_path_factory.mktemp("readers")
    tiny.llama(place / "llama")
    tiny.bert(place / "bert")
    base = tf.AutoModelForCausalLM.from_pretrained(place / "llama")
    expected = {"llama-base": logits(base)}
    expected["llama"] = logits(saved_adapter(base, place, "llama", ["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    bert = saved_adapter(tf.AutoModel.from_pretrained(place / "bert"), place, "bert", ["query", "value"])
    words = tf.AutoTokenizer.from_pretrained(place / "bert")("w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        expected["bert"] = bert(**words).last_hidden_state[0].mean(0).tolist()
    if (unet := unet_of_diffusers()) is not None:
        unet.save_pretrained(place / "unet")
        expected["unet"] = unet_output(saved_adapter(unet, place, "unet", ["to_q", "to_v"]))
    code = "import runpy; sys.argv[0] = 'readers'; runpy.run_module('tests.autoload.readers', run_name='__main__')"
    done = run_installed(place / "site", code, str(place))
    assert done.returncode == 0, done.stderr
    return {**expected, **json.loads(done.stdout.splitlines()[-1])}


def unet_of_diffusers() -> Any:
    try:
        from diffusers import UNet2DConditionModel
    except ImportError:
        return None
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, **blocks, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("read", list(READERS), ids=lambda read: read.__name__)
def test_it_reads_the_adapter(answers: dict[str, Any], read: Any) -> None:
    package, model = READERS[read]
    given = answers[read.__name__]
    if isinstance(given, dict) and "missing" in given:
        pytest.skip(f"{package} needs {given['missing']}, which is not installed")
    assert isinstance(given, list), given["error"]
    torch.testing.assert_close(torch.tensor(given), torch.tensor(answers[model]), rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_the_adapter_changes_what_the_base_says(answers: dict[str, Any]) -> None:
    change = torch.tensor(answers["llama"]) - torch.tensor(answers["llama-base"])
    assert change.abs().max() > 100 * TOLERANCE and len(IDS) == 1


def test_the_folder_says_which_package_loads_it(tmp_path: Path) -> None:
    tiny.llama(tmp_path / "llama")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    saved_adapter(base, tmp_path, "llama", ["q_proj"]).save_pretrained(tmp_path / "llama-adapter")  # a second time
    card = (tmp_path / "llama-adapter" / "README.md").read_text()
    config = json.loads((tmp_path / "llama-adapter" / "adapter_config.json").read_text())
    assert card.splitlines().count("    pip install spectune") == 1 and "`spectral_a`" in card
    assert config["requires"] == "pip install spectune"
    again = SpectralConfig.from_pretrained(str(tmp_path / "llama-adapter"))
    assert SpectralConfig(**again.to_dict()).to_dict() == again.to_dict()


def test_a_config_that_is_saved_alone_has_no_card(tmp_path: Path) -> None:
    SpectralConfig().save_pretrained(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
