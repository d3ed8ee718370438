"""Rules of concept training: what is trained, what is saved, what is drawn, and what the loss counts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from PIL import Image, ImageChops

from examples.glyphs.base import fresh_pipeline
from examples.glyphs.concepts import write_concept
from spectune import SpectralConfig
from spectune.concepts.data import read_shots, to_weights
from spectune.concepts.loss import ConceptModel, denoising_loss
from spectune.concepts.pipeline import contact_sheet, load_concepts, open_pipeline, sample
from spectune.concepts.text_to_image import (
    ATTENTION,
    CONVOLUTIONS,
    TEXT_ATTENTION,
    ConceptOptions,
    ConceptRun,
    train_concept,
)
from spectune.errors import AdapterError, DataError, OptionError, OutputError

PROMPTS = ("a {token} on the left", "a red star on the right")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained pipeline in base/ and pictures with captions in dax/."""
    folder = tmp_path_factory.mktemp("concept")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh_pipeline().save_pretrained(folder / "base")
    write_concept("<dax>", folder / "dax", count=3)
    return folder


def options(home: Path, **told: Any) -> ConceptOptions:
    chosen: dict[str, Any] = {
        "pipeline": home / "base",
        "images": home / "dax",
        "token": "<dax>",
        "initial_word": "shape",
        "unet": SpectralConfig(r=2, target_modules=[*ATTENTION, *CONVOLUTIONS]),
        "text_encoder": SpectralConfig(r=2, target_modules=TEXT_ATTENTION),
        "unet_rate": 1e-2,
        "text_encoder_rate": 1e-2,
        "token_rate": 1e-1,
        "steps": 3,
        "sampling_steps": 2,
        "validation_prompts": PROMPTS,
        "validation_every": 2,
    }
    return ConceptOptions(**(chosen | told))


@pytest.fixture(scope="module")
def run(home: Path) -> ConceptRun:
    return train_concept(options(home), home / "run", say=lambda line: None)


def drawn(home: Path, *folders: Path) -> Image.Image:
    pipeline = load_concepts(open_pipeline(home / "base"), folders)
    return contact_sheet(sample(pipeline, ["a <dax> on the left", PROMPTS[1]], steps=2))


def test_the_saved_concept_draws_what_training_drew_last(home: Path, run: ConceptRun) -> None:
    assert [path.name for path in run.validation] == ["step-0.png", "step-2.png", "step-3.png"]
    again = drawn(home, run.output)
    # One of 255 levels: the basis is found anew on load, to roundoff.
    assert difference(again, Image.open(run.validation[-1])) <= 1
    assert difference(again, Image.open(run.validation[0])) > 3


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


def test_attention_and_convolutions_get_adapters_and_the_word_a_row(run: ConceptRun) -> None:
    names = set(load_names(run.output / "unet"))
    for target in (*ATTENTION, *CONVOLUTIONS):
        assert any(f".{target}.spectune_adapter" in name for name in names), target
    texts = load_names(run.output / "text_encoder")
    assert texts and not any("embed" in name for name in texts)
    assert run.trainable["token"] == 64 and len(run.losses) == 3


def load_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_word_moves_alone_and_diffusers_reads_it_as_textual_inversion(home: Path, run: ConceptRun) -> None:
    base = open_pipeline(home / "base")
    before = base.text_encoder.get_input_embeddings().weight.clone()
    start = before[base.tokenizer("shape", add_special_tokens=False).input_ids[0]]
    base.load_textual_inversion(str(run.output / "token.safetensors"))
    after = base.text_encoder.get_input_embeddings().weight
    word = after[base.tokenizer.convert_tokens_to_ids("<dax>")]
    assert torch.equal(after[: len(before)], before)
    # Three steps of Adam at warmed-up rates: it moved, and by no more than the sum of the rates.
    assert 1e-3 < (word - start).abs().max() < 0.31
    ours = load_concepts(open_pipeline(home / "base"), [run.output])
    assert torch.equal(ours.text_encoder.get_input_embeddings().weight[len(before)], word)


def test_the_base_folder_and_its_drawings_are_untouched(home: Path, run: ConceptRun) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = fresh_pipeline().unet.state_dict()
    kept = open_pipeline(home / "base").unet.state_dict()
    assert all(torch.equal(fresh[name], kept[name]) for name in fresh)


def test_drawing_between_the_steps_changes_nothing(home: Path, run: ConceptRun, tmp_path: Path) -> None:
    train_concept(options(home, validation_prompts=()), tmp_path / "quiet", say=lambda line: None)
    assert not (tmp_path / "quiet" / "validation").exists()
    for part in ("unet/adapter_model", "text_encoder/adapter_model", "token"):
        name = f"{part}.safetensors"
        assert (tmp_path / "quiet" / name).read_bytes() == (run.output / name).read_bytes(), name


def test_the_record_is_plain_json(home: Path, run: ConceptRun) -> None:
    record = json.loads((run.output / "concept.json").read_text())
    assert record["losses"] == run.losses and record["trainable"] == run.trainable
    assert record["validation"][0] == "validation/step-0.png"
    assert record["options"]["unet"]["method"] == "spectral_a" and record["options"]["token"] == "<dax>"


def test_any_peft_method_trains_alone_with_a_prior(home: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=ATTENTION)
    told = options(
        home, unet=lora, text_encoder=None, unet_rate=None, text_encoder_rate=None,
        prior_prompts=("a shape on the left",), prior_images=2, validation_prompts=(), snr_gamma=5.0, batch_size=1,
    )  # fmt: skip
    done = train_concept(told, tmp_path / "lora", say=lambda line: None)
    assert set(done.trainable) == {"unet", "token"} and not (tmp_path / "lora" / "text_encoder").exists()
    assert drawn(home, done.output).tobytes() != drawn(home, home / "run").tobytes()


def test_several_concepts_live_in_one_pipeline(home: Path, run: ConceptRun, tmp_path: Path) -> None:
    write_concept("<wug>", tmp_path / "wug", count=2)
    other = train_concept(
        options(home, images=tmp_path / "wug", token="<wug>", validation_prompts=()),
        tmp_path / "b",
        say=lambda line: None,
    )
    both = load_concepts(open_pipeline(home / "base"), [run.output, other.output])
    unet, latents = both.unet, torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    hidden = torch.zeros(1, 4, 64)
    deltas = {}
    for folder in (run.output, other.output):
        layer = load_concepts(open_pipeline(home / "base"), [folder]).unet.mid_block.resnets[0].conv1
        deltas[folder] = layer.get_delta_weight("default")
    layer = unet.mid_block.resnets[0].conv1
    assert layer.active_adapters == ["default", "concept_1"]
    torch.testing.assert_close(layer.get_delta_weight("default"), deltas[run.output])
    torch.testing.assert_close(layer.get_delta_weight("concept_1"), deltas[other.output])
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
    return ConceptModel(fresh_pipeline(), SpectralConfig(r=1, target_modules=["to_q"]), None, None)


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
    with pytest.raises(DataError, match="found none. Put 3 to 10"):
        read_shots(tmp_path, "a", 8)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: it cannot be read as a picture"):
        read_shots(tmp_path, "a", 8)
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(DataError, match=r"masks/a\.png: it cannot be read"):
        read_shots(tmp_path, "a", 8, tmp_path / "masks")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_bytes(png())
    with pytest.raises(DataError, match="mask 1 of 1: it is black"):
        to_weights(read_shots(tmp_path, "a", 8, tmp_path / "masks"), 4)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "b"}')
    with pytest.raises(DataError, match=r"it names 'b\.png', which is not there"):
        read_shots(tmp_path, "a", 8)
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.png"}')
    with pytest.raises(DataError, match="metadata.jsonl:1: asked for file_name and text"):
        read_shots(tmp_path, "a", 8)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"unet": None, "text_encoder": None, "token": None, "initial_word": None}, "nothing would be trained"),
        ({"initial_word": None}, "a new word starts from a known one"),
        ({"steps": 0}, "steps=0"),
        ({"prior_weight": -1.0}, "prior_weight=-1.0 must not be negative"),
        ({"prior_prompts": ("a",), "prior_images": 0}, "prior_images=0"),
        ({"token": None, "initial_word": None}, "but no token is trained"),
    ],
)
def test_wrong_options_are_refused_at_once(home: Path, told: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError, match=line):
        options(home, **told)


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"token": "star"}, "'star' is a word of the tokenizer already"),
        ({"initial_word": "starry"}, "is 2 tokens, a new word starts from one|tokens, a new word starts from one"),
        ({"images": "elsewhere"}, "found none"),
        ({"pipeline": "elsewhere"}, "cannot be loaded"),
        ({"unet": LoraConfig(target_modules=["nothing_like_it"])}, "not found"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    home: Path, tmp_path: Path, told: dict[str, Any], line: str
) -> None:
    told = {name: tmp_path / value if name in ("images", "pipeline") else value for name, value in told.items()}
    with pytest.raises(ValueError, match=line):
        train_concept(options(home, **told), tmp_path / "out", say=lambda line: None)


def test_a_full_output_folder_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="asked for an empty output folder"):
        train_concept(options(home), tmp_path, say=lambda line: None)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_pipeline_of_another_kind_is_refused(home: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    parts = open_pipeline(home / "base")
    DDPMPipeline(unet=parts.unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="DDPMPipeline with no text_encoder, vae, tokenizer"):
        open_pipeline(tmp_path)


def test_a_folder_without_a_concept_is_refused(home: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="asked for a concept, found no unet"):
        load_concepts(open_pipeline(home / "base"), [tmp_path])
