"""Rules of concept training: what is trained, what is saved, what is drawn, and what the loss counts."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDPMScheduler
from PIL import Image, ImageChops

from examples.glyphs.base import fresh_pipeline
from examples.glyphs.concepts import write_concept
from spectune import SpectralConfig
from spectune.concepts import text_to_image
from spectune.concepts.data import read_shots, to_weights
from spectune.concepts.loss import denoising_loss
from spectune.concepts.model import ConceptModel
from spectune.concepts.pipeline import contact_sheet, load_concepts, open_pipeline, sample
from spectune.concepts.text_to_image import ATTENTION, CONVOLUTIONS
from spectune.errors import AdapterError, DataError, OptionError
from spectune.runs import Drawing, RunResult, dry_run, load_base, load_run, measure, range_test, run, train_run
from spectune.sweeps import parse_sweep, run_sweep, summarise
from spectune.sweeps.workers import Workers
from spectune.training import Interrupted
from tests.concepts.concepts import NO_WORD, TEXT, concept_home, config_of, run_values
from tests.sweeps.sweeps import in_this_process

PROMPTS = ["a {token} on the left", "a red star on the right"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return concept_home(tmp_path_factory.mktemp("concept"))


@pytest.fixture(scope="module")
def result(home: Path) -> RunResult:
    return train_run(config_of(home), home / "run", looks=True).result


@pytest.fixture(scope="module")
def saved(home: Path, result: RunResult) -> Path:
    """Where the concept of `result` is."""
    return home / "run" / "adapter"


def picture(drawing: Drawing) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(drawing.png)))


def drawn(home: Path, *folders: Path) -> Image.Image:
    pipeline = load_concepts(open_pipeline(home / "base"), folders)
    return contact_sheet(sample(pipeline, ["a <dax> on the left", PROMPTS[1]], steps=2))


def test_the_saved_concept_draws_what_training_drew_last(home: Path, result: RunResult) -> None:
    assert [drawing.caption.split(":")[0] for drawing in result.drawings] == ["step 0", "step 2", "step 3"]
    assert result.drawings[0].caption.endswith("a <dax> on the left; a red star on the right")
    again = drawn(home, home / "run")
    # One of 255 levels: the basis is found anew on load, to roundoff.
    assert difference(again, picture(result.drawings[-1])) <= 1
    assert difference(again, picture(result.drawings[0])) > 3


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def test_attention_and_convolutions_get_adapters_and_the_word_a_row(result: RunResult, saved: Path) -> None:
    names = set(load_names(saved / "unet"))
    for target in (*ATTENTION, *CONVOLUTIONS):
        assert any(f".{target}.spectune_adapter" in name for name in names), target
    texts = load_names(saved / "text_encoder")
    assert texts and not any("embed" in name for name in texts)
    assert result.head == 64 and len(result.losses) == 3


def test_each_part_has_its_size(home: Path, result: RunResult, saved: Path) -> None:
    sizes = {size.name: size for size in result.sizes}
    assert list(sizes) == ["spectral_a adapter", "unet", "text_encoder", "token", "the whole model"]
    assert sizes["unet"].trainable + sizes["text_encoder"].trainable == result.trainable
    assert sizes["unet"].file_bytes == (saved / "unet" / "adapter_model.safetensors").stat().st_size
    assert sizes["token"].file_bytes == (saved / "token.safetensors").stat().st_size
    base = open_pipeline(home / "base")
    whole = sum(p.numel() for part in (base.unet, base.text_encoder) for p in part.parameters())
    assert result.total == whole + 64  # the new word's row
    assert {update.name.split(".")[0] for update in result.updates} == {"unet", "text_encoder"}


def load_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_word_moves_alone_and_diffusers_reads_it_as_textual_inversion(home: Path, saved: Path) -> None:
    base = open_pipeline(home / "base")
    before = base.text_encoder.get_input_embeddings().weight.clone()
    start = before[base.tokenizer("shape", add_special_tokens=False).input_ids[0]]
    base.load_textual_inversion(str(saved / "token.safetensors"))
    after = base.text_encoder.get_input_embeddings().weight
    word = after[base.tokenizer.convert_tokens_to_ids("<dax>")]
    assert torch.equal(after[: len(before)], before)
    # Three steps of Adam at warmed-up rates: it moved, and by no more than the sum of the rates.
    assert 1e-3 < (word - start).abs().max() < 0.31
    for folder in (saved.parent, saved):  # of a run, and a plain one
        ours = load_concepts(open_pipeline(home / "base"), [folder])
        assert torch.equal(ours.text_encoder.get_input_embeddings().weight[len(before)], word)


def test_the_base_folder_is_untouched(home: Path, result: RunResult) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = fresh_pipeline().unet.state_dict()
    kept = open_pipeline(home / "base").unet.state_dict()
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh)


def tensors(run_folder: Path) -> dict[str, bytes]:
    adapter = run_folder / "adapter"
    return {str(path.relative_to(adapter)): path.read_bytes() for path in adapter.rglob("*.safetensors")}


def test_drawing_between_the_steps_changes_nothing(home: Path, result: RunResult, tmp_path: Path) -> None:
    quiet = run(config_of(home, drawings={"prompts": []}), tmp_path / "quiet")
    assert not (tmp_path / "quiet" / "validation").exists() and not quiet.drawings
    assert tensors(tmp_path / "quiet") == tensors(home / "run") and len(tensors(home / "run")) == 3


@pytest.mark.parametrize("method", ["spectral_a", "LoRA with a prior"])
def test_a_resumed_run_ends_in_the_same_weights_and_pictures(method: str, home: Path, tmp_path: Path) -> None:
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ATTENTION, "lora_dropout": 0.5}
    prior = {"prompts": ["a shape on the left"], "images": 2}
    training: dict[str, Any] = {"steps": 5, "gradient_accumulation": 2}
    more: dict[str, Any] = {}
    if method != "spectral_a":
        training |= {"text_encoder_learning_rate": None}
        more = {"adapter": {"unet": lora}, "prior": prior}
    config = config_of(home, training=training, **more)
    whole = run(config, tmp_path / "whole")

    def stop(done: int, steps: int, loss: float) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="stopped at step 3"):
        run(config, tmp_path / "parts", on_step=stop)
    assert not (tmp_path / "parts" / "result.json").exists()
    resumed = run(config, tmp_path / "parts", resume=True)
    assert resumed.losses == whole.losses and len(set(whole.losses)) == 5
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    assert resumed.drawings == whole.drawings and len(whole.drawings) == 4


def test_held_out_pictures_give_the_same_figure_again_and_the_base_another(home: Path, tmp_path: Path) -> None:
    write_concept("<dax>", tmp_path / "more", count=2, seed=1)
    rates = {"learning_rate": 1e-3, "text_encoder_learning_rate": 1e-3, "head_learning_rate": 1e-2}
    told = config_of(
        home, data={"validation": str(tmp_path / "more"), "test": str(home / "dax")},
        training={"validate_every": 2, "steps": 6, **rates},
    )  # fmt: skip
    found = run(told, tmp_path / "run")
    assert set(found.metrics) == {"validation", "test"} and list(found.metrics["test"]) == ["loss"]
    again = measure(*load_run(tmp_path / "run"))
    for split, figures in found.metrics.items():
        assert again[split]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert measure(*load_run(tmp_path / "run")) == again, "the noise is fixed"
    before = measure(*load_base(tmp_path / "run"))
    assert before["test"]["loss"] > found.metrics["test"]["loss"] * 1.001
    # The loop looks at the same pictures with the same noise; its batches are means of equal size.
    assert [step for step, _ in found.validation_losses] == [2, 4, 6]
    assert found.validation_losses[-1][1] == pytest.approx(found.metrics["validation"]["loss"], rel=1e-5)
    unlooked = run(told.model_copy(update={"training": told.training.model_copy(update={"validate_every": None})}),
                   tmp_path / "unlooked")  # fmt: skip
    assert unlooked.losses == found.losses, "a look at held-out pictures takes no noise away"


def test_epochs_count_pictures(home: Path, tmp_path: Path) -> None:
    told = config_of(home, training={"steps": None, "epochs": 3, "batch_size": 1}, drawings={"prompts": []})
    assert run(told, tmp_path / "run").steps == 9


def test_the_word_alone_is_trained_and_loaded(home: Path, tmp_path: Path) -> None:
    training = {"learning_rate": None, "text_encoder_learning_rate": None}
    done = train_run(config_of(home, adapter="head", training=training), tmp_path / "run", looks=True).result
    assert done.trainable == 0 and done.head == 64 and set(tensors(tmp_path / "run")) == {"token.safetensors"}
    assert difference(drawn(home, tmp_path / "run"), picture(done.drawings[-1])) <= 1


def test_a_range_test_draws_nothing_and_checks_show_what_is_trained(home: Path, tmp_path: Path) -> None:
    told = config_of(home, prior={"prompts": ["a shape on the left"], "images": 3})
    found = range_test(told, steps=10)
    assert len(found.losses) > 1 and found.current == 1e-2 and found.method == "spectral_a"
    assert not list(home.glob("validation"))
    seen = dry_run(told)
    marked = [piece for piece, trained in seen.shown.pieces if trained]
    assert marked == ["<dax>"] and seen.shown.marks == "is trained"
    assert "".join(piece for piece, _ in seen.shown.pieces).startswith("[0.png: 8 x 12 x 12 latents] <|startoftext|> a")
    assert {name.split(".")[0] for name, _ in seen.layers} == {"unet", "text_encoder"}
    assert seen.head == 64 and seen.examples == {"train": 3}
    assert seen.remarks == ["before training, the base draws 3 pictures of the class, in 2 steps each"]


def test_any_peft_method_trains_alone_with_a_prior(home: Path, saved: Path, tmp_path: Path) -> None:
    lora = {"unet": {"peft_type": "LORA", "r": 2, "target_modules": ATTENTION}}
    training = {"text_encoder_learning_rate": None, "learning_rate": None, "snr_gamma": 5.0, "batch_size": 1}
    prior = {"prompts": ["a shape on the left"], "images": 2}
    told = config_of(home, adapter=lora, training=training, prior=prior, drawings={"prompts": []})
    done = run(told, tmp_path / "lora")
    assert done.learning_rate == 2e-4 and not (tmp_path / "lora" / "adapter" / "text_encoder").exists()
    assert drawn(home, tmp_path / "lora").tobytes() != drawn(home, saved).tobytes()


def test_several_concepts_live_in_one_pipeline(home: Path, result: RunResult, tmp_path: Path) -> None:
    write_concept("<wug>", tmp_path / "wug", count=2)
    wug = {"data": {"train": str(tmp_path / "wug")}, "word": {"token": "<wug>"}, "drawings": {"prompts": []}}
    run(config_of(home, **wug), tmp_path / "b")
    one, other = home / "run", tmp_path / "b"
    both = load_concepts(open_pipeline(home / "base"), [one, other])
    unet, latents = both.unet, torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(1, 4, 64)
    deltas = {}
    for folder in (one, other):
        layer = load_concepts(open_pipeline(home / "base"), [folder]).unet.mid_block.resnets[0].conv1
        deltas[folder] = layer.get_delta_weight("default")
    layer = unet.mid_block.resnets[0].conv1
    assert layer.active_adapters == ["default", "concept_1"]
    torch.testing.assert_close(layer.get_delta_weight("default"), deltas[one])
    torch.testing.assert_close(layer.get_delta_weight("concept_1"), deltas[other])
    with torch.no_grad():
        assert torch.isfinite(unet(latents, 5, encoder_hidden_states=hidden).sample).all()


def test_a_prompt_starts_from_its_own_noise_whatever_the_batch(home: Path) -> None:
    pipeline = open_pipeline(home / "base")
    three = sample(pipeline, ["a red star on the right"] * 3, seed=4, steps=2, output_type="latent")
    apart = sample(pipeline, ["a red star on the right"] * 3, seed=4, steps=2, batch_size=1, output_type="latent")
    for one, other in zip(three, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    later = sample(pipeline, ["a red star on the right"], seed=5, steps=2, output_type="latent")
    torch.testing.assert_close(later[0], three[1], rtol=0, atol=1e-4)
    assert not torch.allclose(three[0], three[1], atol=1e-2)


def batch_of(model: ConceptModel) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    latents, prior = (torch.randn(2, 8, 12, 12, generator=chance) for _ in range(2))
    return {
        "latents": latents, "tokens": tokens, "weights": torch.ones(2, 1, 12, 12),
        "prior_latents": prior, "prior_tokens": tokens,
    }  # fmt: skip


@pytest.fixture
def model() -> ConceptModel:
    found = ConceptModel(fresh_pipeline())
    found.attach("unet", SpectralConfig(r=1, target_modules=["to_q"]))
    return found


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_the_clean_picture_for_every_kind_of_prediction(
    model: ConceptModel, kind: str, gamma: float | None
) -> None:
    """With gamma, the error of the clean latents counts min(snr, gamma) times, whatever is predicted."""
    levels = DDPMScheduler(prediction_type=kind)
    model.noise_levels = levels
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    def wrong_by_one_in_clean_latents(noisy: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        chance = torch.Generator("cpu").manual_seed(7)
        noise = torch.randn(noisy.shape, generator=chance)
        a = levels.alphas_cumprod[t].view(-1, 1, 1, 1).sqrt()
        s = (1 - a * a).sqrt()
        clean = (noisy - s * noise) / a + 1  # noisy = a clean + s noise
        asked.append((a.flatten(), s.flatten()))
        noise = (noisy - a * clean) / s
        return {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[kind]

    batch = {name: value for name, value in batch_of(model).items() if not name.startswith("prior")}
    found = denoising_loss(model, 7, 1.0, gamma)(wrong_by_one_in_clean_latents, batch)  # type: ignore[arg-type]
    a, s = asked[0]
    snr = (a / s) ** 2
    # What an error of one in the clean latents is in what is predicted, squared.
    in_prediction = {"epsilon": snr, "v_prediction": 1 / s**2, "sample": torch.ones_like(snr)}[kind]
    expected = in_prediction.mean() if gamma is None else snr.clamp(max=gamma).mean()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_the_prior_counts_by_its_weight(model: ConceptModel) -> None:
    batch = batch_of(model)
    with torch.no_grad():
        losses = [denoising_loss(model, 0, weight, None)(model, batch) for weight in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))
    assert losses[1] - losses[0] > 0.1


def test_what_a_mask_hides_is_not_learned(model: ConceptModel) -> None:
    batch = {name: value for name, value in batch_of(model).items() if not name.startswith("prior")}
    batch["weights"] = torch.zeros(2, 1, 12, 12)
    batch["weights"][..., :6] = 2
    answer = torch.zeros(2, 8, 12, 12)
    loss = denoising_loss(model, 0, 1.0, None)
    seen = loss(lambda noisy, t, tokens: answer, batch)  # type: ignore[arg-type]
    loss = denoising_loss(model, 0, 1.0, None)
    hidden_changed = torch.cat([answer[..., :6], answer[..., 6:] + 9], -1)
    assert torch.equal(loss(lambda noisy, t, tokens: hidden_changed, batch), seen)  # type: ignore[arg-type]
    assert seen > 0


def test_masks_and_captions_belong_to_their_pictures(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (40, 20), (i * 100, 0, 0)).save(tmp_path / f"{i}.png")
        mask = Image.new("L", (40, 20), 0)
        mask.paste(255, (10, 0, 20, 20))
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask.save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    (tmp_path / "2.txt").write_text("two\n")
    shots = read_shots(tmp_path, "any", 8, tmp_path / "masks")
    assert [shot.caption for shot in shots] == ["any", "one", "two"]
    assert shots[2].image.size == (8, 8) and shots[2].image.getpixel((4, 4)) == (200, 0, 0)
    weights = to_weights(shots, 4)
    # The middle square of the mask is white in its left half.
    assert weights[0, 0, 0].tolist() == pytest.approx([2, 2, 0, 0], abs=0.05) and weights.mean() == pytest.approx(1)


def png(side: int = 4, colour: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("L", (side, side), colour).save(content, "PNG")
    return content.getvalue()


def test_wrong_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="contains no pictures of the concept. Put 3 to 10"):
        read_shots(tmp_path, "a", 8)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: cannot read this picture"):
        read_shots(tmp_path, "a", 8)
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(DataError, match=r"masks/a\.png: cannot read this picture"):
        read_shots(tmp_path, "a", 8, tmp_path / "masks")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(png())
    with pytest.raises(DataError, match="mask 1 of 1: is black"):
        to_weights(read_shots(tmp_path, "a", 8, tmp_path / "masks"), 4)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b"}')
    with pytest.raises(DataError, match=r"the file 'b\.png' does not exist"):
        read_shots(tmp_path, "a", 8)
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png"}')
    with pytest.raises(DataError, match="metadata.jsonl:1: file_name and text are needed"):
        read_shots(tmp_path, "a", 8)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"adapter": {"unet": None}}, "give unet, text_encoder or both"),
        ({"adapter": "none"}, "adapter"),
        ({"adapter": {"unett": {}}}, "unett"),
        (
            {"adapter": "head", "word": NO_WORD, "training": {"learning_rate": None}},
            "adapter: head trains only the new word",
        ),
        ({"word": {"initial_word": None}}, "a new word starts from a known one"),
        ({"training": {"steps": 0}}, "training.steps=0:"),
        ({"prior": {"weight": -1.0}}, "prior.weight=-1.0:"),
        ({"prior": {"prompts": ["a"], "images": 0}}, "prior.images=0:"),
        ({"prior": {"prompts": ["a {token}"]}}, "prior.prompts contain {token}"),
        ({"word": NO_WORD, "training": {"head_learning_rate": None}}, "drawings.prompts contain {token}"),
        ({"word": NO_WORD}, "training.head_learning_rate is the new word's"),
        ({"training": {"head_first": True}}, "training.head_first is for classifiers"),
        ({"adapter": {"unet": {"method": "svft"}}}, "training.text_encoder_learning_rate is that of a second adapter"),
        ({"drawings": {"evry": 3}}, "drawings.evry: unknown key. Did you mean 'every'"),
        ({"pipeline": "here"}, "pipeline: it was written before 0.1.0"),
    ],
)
def test_wrong_options_are_refused_at_once(home: Path, told: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as refused:
        config_of(home, **told)
    assert line in str(refused.value)


ADALORA = {"peft_type": "ADALORA", "target_modules": ["to_q"], "total_step": 3, "tinit": 1, "tfinal": 1}


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"word": {"token": "star"}}, "the tokenizer already has the word 'star'"),
        ({"word": {"initial_word": "starry"}}, "must be one token"),
        ({"data": {"train": "elsewhere"}}, "contains no pictures"),
        ({"data": {"test": "elsewhere"}}, "contains no pictures"),
        ({"model": "elsewhere"}, "cannot load"),
        (
            {"adapter": {"unet": {"peft_type": "LORA", "target_modules": ["nothing"]}, "text_encoder": TEXT}},
            "not found",
        ),
        ({"adapter": {"unet": ADALORA, "text_encoder": TEXT}}, "AdaLoRA does not work here"),
        ({"word": {"token": "<wug>"}, "data": {"train": "words"}}, "no caption contains the new word '<wug>'"),
        ({"training": {"validate_every": 1}}, "there are no validation examples"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    home: Path, tmp_path: Path, told: dict[str, Any], line: str
) -> None:
    write_concept("<dax>", tmp_path / "words", count=1)
    (tmp_path / "words" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a star"}')
    if told.get("data"):
        told = told | {"data": {name: str(tmp_path / value) for name, value in told["data"].items()}}
    with pytest.raises(ValueError) as refused:
        run(config_of(home, **told), tmp_path / "out", on_step=lambda *step: pytest.fail("it trained"))
    assert line in str(refused.value)


def test_several_processes_are_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_to_image, "join", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(OptionError, match="works only in one process. Start it without a launcher."):
        run(config_of(home), tmp_path / "out")


def test_a_sweep_compares_two_methods(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "run", in_this_process)
    values = run_values(home, data={"validation": str(home / "dax"), "test": str(home / "dax")})
    del values["adapter"], values["training"]["learning_rate"], values["training"]["text_encoder_learning_rate"]
    methods = {
        "spectral_a": {"adapter": {"unet": {"method": "spectral_a", "r": 1, "target_modules": ["to_q"]}}},
        "word": {"adapter": "head", "over": {"training": {"head_learning_rate": None}}},
    }
    arms = {name: arm | {"learning_rates": [1e-2]} for name, arm in methods.items()}
    sweep = parse_sweep({"run": values, "methods": arms, "seeds": [0]})
    records = run_sweep(sweep, tmp_path, provenance={})
    assert {record.method: record.ok for record in records} == {"spectral_a": True, "word": True}
    summary = summarise(sweep, records)
    assert "loss" in json.dumps(summary)


def test_the_model_computes_in_other_precisions_and_recomputes_activations(home: Path, tmp_path: Path) -> None:
    for told in ({"dtype": "bfloat16"}, {"training": {"precision": "bfloat16"}}):
        assert all(map(math.isfinite, run(config_of(home, **told), tmp_path / next(iter(told))).losses))
    plain = run(config_of(home), tmp_path / "plain").losses
    again = run(config_of(home, training={"gradient_checkpointing": True}), tmp_path / "again").losses
    assert again == pytest.approx(plain, rel=1e-5)


def test_a_pipeline_of_another_kind_is_refused(home: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    parts = open_pipeline(home / "base")
    DDPMPipeline(unet=parts.unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="DDPMPipeline with no text_encoder, vae, tokenizer"):
        open_pipeline(tmp_path)


def test_a_folder_without_a_concept_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="not a concept: it has no unet"):
        load_concepts(open_pipeline(home / "base"), [tmp_path])
