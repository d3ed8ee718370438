"""What PEFT, transformers and diffusers offer for LoRA, on a spectral adapter: it works, or one line refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter

from spectune import SpectralConfig, export_lora, merge_checkpoint
from spectune.errors import AdapterError, OptionError, SpectuneError

from ..models import INIT, MODELS, output
from .conftest import adapted, assert_travels, config_for, train
from .test_bases import together

LLAMA = MODELS["llama"]
TOKENS_SEEN = [10, 22]  # of the inputs


def tied_llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tf.LlamaConfig(vocab_size=64, pad_token_id=0, tie_word_embeddings=True, initializer_range=INIT, **sizes)
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval()


def mixed(*configs: Any) -> Any:
    model = get_peft_model(LLAMA.fresh(), configs[0], mixed=True)
    for i, config in enumerate(configs[1:]):
        model.add_adapter(f"more{i}", config)
    return model


def weighed(method: str, **options: Any) -> Any:
    model = adapted(LLAMA, method)
    model.add_adapter("b", config_for(LLAMA, method))
    model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c", **options)
    return model


def saved(place: Path, method: str = "spectral_a") -> str:
    adapted(LLAMA, method).save_pretrained(place)
    return str(place)


def swapped_by_transformers(folder: str) -> None:
    model: Any = LLAMA.fresh()
    model.load_adapter(folder, adapter_name="a")
    model.load_adapter(folder, adapter_name="a", hotswap=True)


def rescaled() -> None:
    with rescale_adapter_scale(adapted(LLAMA, "spectral_a"), 0.5):
        pass


LORA = LoraConfig(target_modules=["q_proj"])
REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "mixed model": (lambda _: mixed(config_for(LLAMA, "svft")), "not compatible with the `PeftMixedModel`"),
    "mixed, second": (lambda _: mixed(LORA, config_for(LLAMA, "svft")), "not compatible with the `PeftMixedModel`"),
    "mixed, loaded": (lambda d: PeftMixedModel.from_pretrained(LLAMA.fresh(), d), "not supported for mixed models"),
    "weighed": (lambda _: weighed("spectral_a"), "set_scale. For saved adapters of any method: spectune fuse A B"),
    "weighed by svd": (
        lambda _: weighed("svft", combination_type="svd", svd_rank=4),
        "combination_type='svd', svd_rank=4: only combination_type='linear'.*spectune fuse A B",
    ),
    "rescaled": (lambda _: rescaled(), "scaling is only supported for models with `LoraLayer`s"),
    "hot-swapped": (lambda d: hotswap_adapter(adapted(LLAMA, "svft"), d, "default"), "only supports LORA"),
    "hot-swapped by transformers": (swapped_by_transformers, "only supported for LoRA"),
}


@pytest.mark.parametrize("road", list(REFUSED))
def test_it_is_refused_in_one_line(road: str, tmp_path: Path) -> None:
    call, words = REFUSED[road]
    with pytest.raises((ValueError, SpectuneError), match=words) as refusal:
        call(saved(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("options", [{}, {"ensure_weight_tying": True}])
@pytest.mark.parametrize("build", [LLAMA.fresh, tied_llama], ids=["untied", "tied"])
def test_single_tokens_are_trained_saved_and_exported(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    tiny = type(LLAMA)(build, ("q_proj",), LLAMA.inputs)
    config = config_for(tiny, "spectral_a", trainable_token_indices=list(TOKENS_SEEN), **options)
    model = get_peft_model(tiny.build(), config)
    before = output(model.eval(), LLAMA.inputs())
    vectors = {name: p for name, p in model.named_parameters() if "trainable_tokens_delta" in name}
    assert [p.requires_grad for p in vectors.values()] == [True] and next(iter(vectors.values())).shape == (2, 32)
    next(iter(vectors.values())).data += 1.0  # only these
    assert (output(model, LLAMA.inputs()) - before).abs().max() > 0.1
    train(model)
    assert_travels(model.eval(), tiny, tmp_path)
    with pytest.raises(SpectuneError, match="trainable_token_indices.* Load the adapter and call merge_and_unload"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    live = output(model, LLAMA.inputs())
    torch.testing.assert_close(output(model.merge_and_unload(), LLAMA.inputs()), live, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"embed_tokns": [1]}, "no module of LlamaForCausalLM is called 'embed_tokns'. Did you mean 'embed_tokens'"),
        ({"mlp": [1]}, "model.layers.0.mlp is a LlamaMLP and not an embedding"),
        ([10**6], "token 1000000 does not exist in model.embed_tokens, which has 64"),
        ([-1], "must be a list of token numbers"),
        ({"": [1]}, "must be a list of token numbers"),
        (["the"], "must be a list of token numbers"),
        ({"q_proj": [1]}, "Take it out of target_modules"),
    ],
)
def test_tokens_that_do_not_exist_are_refused(asked: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        get_peft_model(LLAMA.fresh(), SpectralConfig(target_modules=["q_proj"], trainable_token_indices=asked))


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head", "model.embed_tokens"])
def test_tied_embeddings_that_are_trained_in_full_stay_tied(module: str, tmp_path: Path) -> None:
    tiny = type(LLAMA)(tied_llama, ("q_proj",), LLAMA.inputs)
    model = get_peft_model(tied_llama(), config_for(tiny, "svft", modules_to_save=[module], ensure_weight_tying=True))
    inner = model.get_base_model()
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    first, last = (end.modules_to_save["default"].weight for end in ends)
    assert first is last and first.requires_grad
    train(model)
    assert_travels(model.eval(), tiny, tmp_path)


def test_tied_embeddings_are_not_adapted_as_one() -> None:
    with pytest.raises(OptionError, match="ensure_weight_tying=True works with modules_to_save and trainable_token"):
        get_peft_model(tied_llama(), SpectralConfig(target_modules=["embed_tokens"], ensure_weight_tying=True))


@pytest.mark.filterwarnings("ignore")
def test_an_unmerged_model_is_exported_by_torch_with_any_number_of_rows(method: str) -> None:
    model = adapted(MODELS["mlp"], method).get_base_model()
    program = torch.export.export(
        model, (MODELS["mlp"].inputs()["x"],), dynamic_shapes={"x": {0: torch.export.Dim("rows")}}
    )
    x = torch.randn(3, 10)
    torch.testing.assert_close(program.module()(x), output(model, {"x": x}), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_merged_model_is_exported_by_torch(method: str) -> None:
    tuned, x = adapted(MODELS["mlp"], method), torch.randn(3, 10)
    live = output(tuned, {"x": x})
    tuned.merge_adapter()
    program = torch.export.export(tuned.get_base_model(), (x,))
    torch.testing.assert_close(program.module()(x), live, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mlp", "vit"])
def test_a_step_reads_no_value_of_a_tensor(method: str, kind: str) -> None:
    """On the meta device there are none: .item(), .cpu() or a branch on data in forward or backward would fail."""
    tiny = MODELS[kind]
    model: Any = get_peft_model(tiny.fresh(), config_for(tiny, method)).train().to("meta")
    found = model(**{name: value.to("meta") for name, value in tiny.inputs().items()})
    (found if isinstance(found, torch.Tensor) else found.logits).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.device.type == "meta" for p in trained)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_transformers_has_loaded_is_settled_before_it_is_exported(tmp_path: Path) -> None:
    model: Any = LLAMA.fresh()
    model.load_adapter(saved(tmp_path), adapter_name="a")
    inputs = {**LLAMA.inputs(), "use_cache": False}
    with pytest.raises(AdapterError, match=r"q_proj: .*Run the model once before torch\.export"):
        torch.export.export(model, (), inputs, strict=False)
    live = output(model, LLAMA.inputs())
    program = torch.export.export(model, (), inputs, strict=False)
    torch.testing.assert_close(program.module()(**inputs).logits, live, rtol=1e-4, atol=1e-4)


def _loaded_on_the_first(rank: int) -> Any:
    if rank:
        return None
    return output(PeftModel.from_pretrained(LLAMA.fresh(), FOLDER[0]).eval(), LLAMA.inputs())


FOLDER: list[str] = []


def test_one_process_of_several_loads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective would wait for the other process until its timeout."""
    monkeypatch.setattr(dist, "all_gather_object", _no_collective)
    monkeypatch.setattr(dist, "broadcast", _no_collective)
    model = adapted(LLAMA, "spectral_r")
    model.save_pretrained(tmp_path / "adapter")
    FOLDER[:] = [str(tmp_path / "adapter")]
    found, nothing = together(_loaded_on_the_first, tmp_path)
    assert nothing is None
    torch.testing.assert_close(found, output(model, LLAMA.inputs()), rtol=0, atol=1e-4)


def _no_collective(*_: Any, **__: Any) -> None:
    raise AssertionError("a collective was called")


def test_a_pipeline_weakens_an_adapter_for_one_call() -> None:
    utils = pytest.importorskip("diffusers.utils.peft_utils")
    model = adapted(LLAMA, "svft", gate=False)
    inner = model.get_base_model()
    whole, base = output(inner, LLAMA.inputs()), output(LLAMA.fresh(), LLAMA.inputs())
    utils.scale_lora_layers(inner, 0.5)
    model.set_scale("default", 0.5)
    half = output(inner, LLAMA.inputs())
    assert not torch.equal(half, whole) and not torch.equal(half, base)
    model.set_scale("default", 1.0)
    utils.scale_lora_layers(inner, 0.5)
    assert torch.equal(output(inner, LLAMA.inputs()), half)
    utils.unscale_lora_layers(inner, 0.5)
    assert torch.equal(output(inner, LLAMA.inputs()), whole)


def test_diffusers_own_file_of_a_lora_is_written_by_the_export(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from ..autoload.test_readers import unet_of_diffusers

    model = unet_of_diffusers()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter(SpectralConfig(r=2, target_modules=["to_q", "to_v"]))
    train(model)
    with pytest.raises(OptionError, match=r"which this adapter is not.*spectune\.export_lora"):
        model.save_lora_adapter(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    get_peft_model(unet_of_diffusers(), SpectralConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path / "ours")
    with pytest.raises((OSError, ValueError), match="pytorch_lora_weights"):
        unet_of_diffusers().load_lora_adapter(str(tmp_path / "ours"), prefix=None)
    export_lora(model, tmp_path / "lora", diffusers="unet", check_logits=False)
    again = unet_of_diffusers()
    again.load_state_dict(base)
    again.load_lora_adapter(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    inputs = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 8))
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).sample, model(*inputs).sample, rtol=1e-4, atol=1e-4)


MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}


@pytest.mark.parametrize("layer", ["out_proj", "conv1d"])
def test_a_layer_on_which_peft_refuses_a_lora_is_refused_before_training(layer: str) -> None:
    mamba = tf.MambaForCausalLM(tf.MambaConfig(**MAMBA))
    with pytest.raises(SpectuneError, match=f"PEFT refuses a LoRA on {layer} of a mamba model.* Exclude the layer"):
        get_peft_model(mamba, SpectralConfig(r=2, target_modules=[layer]))
    assert not any(hasattr(module, "base_layer") for module in mamba.modules())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_all_linear_leaves_such_a_layer_out_and_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"left out of the adapter: backbone\.layers\.0\.mixer\.out_proj \(PEFT refuses"
    ):
        model = get_peft_model(
            tf.MambaForCausalLM(tf.MambaConfig(**MAMBA)), SpectralConfig(r=2, target_modules="all-linear")
        )
    adapted_ones = {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "spectune_adapter")}
    assert adapted_ones == {"in_proj", "x_proj", "dt_proj"}
