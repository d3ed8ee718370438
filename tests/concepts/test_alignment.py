"""Rules of the alignment scores: each region by itself, nothing of it cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from examples.glyphs.base import make_tokenizer
from spectune.concepts.alignment import Encoder, Region, alignment, load_encoder
from spectune.errors import DataError, OptionError

LEFT, RIGHT = (0.0, 0.0, 0.25, 1.0), (0.75, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("encoders")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    text = CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **small)
    config = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(image_size=16, patch_size=4, **small).to_dict(),
        projection_dim=8,
    )
    dino = {name: value for name, value in small.items() if name != "intermediate_size"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(home / "clip")
        Dinov2Model(Dinov2Config(image_size=16, patch_size=4, **dino)).save_pretrained(home / "dino")
        BertModel(BertConfig(vocab_size=10, **small)).save_pretrained(home / "bert")
    tokenizer.save_pretrained(home / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for name in ("clip", "dino"):
        processor.save_pretrained(home / name)
    return home


@pytest.fixture(scope="module", params=["clip", "dino"])
def encoder(folders: Path, request: pytest.FixtureRequest) -> Encoder:
    return load_encoder(folders / request.param)


def wide(left: str, right: str) -> Image.Image:
    """A picture twice as wide as high whose outer quarters have two colours."""
    image = Image.new("RGB", (64, 32), "gray")
    image.paste(left, (0, 0, 16, 32))
    image.paste(right, (48, 8, 64, 20))
    return image


def test_a_region_that_is_its_reference_scores_one_and_another_less(encoder: Encoder) -> None:
    picture = wide("red", "blue")
    references = [picture.crop((0, 0, 16, 32))]
    same, other = alignment([picture], [Region(LEFT, references), Region(RIGHT, references)], encoder)
    assert same.image == pytest.approx(1, abs=1e-5) and same.text is None
    assert other.image is not None and other.image < 0.999


def test_what_stands_at_the_side_counts_in_its_own_region_alone(encoder: Encoder) -> None:
    reference = [wide("red", "blue").crop((0, 0, 16, 32))]
    regions = [Region(LEFT, reference), Region(RIGHT, reference)]
    before, after = (alignment([wide("red", colour)], regions, encoder) for colour in ("blue", "yellow"))
    assert before[0] == after[0] and before[1] != after[1]


def test_nothing_of_a_wide_region_is_cut_off(encoder: Encoder) -> None:
    """CLIP's own preprocessing keeps the middle square of a wide picture, so its sides would not count."""
    whole = Region(references=[Image.new("RGB", (16, 16), "red")])
    pictures = [Image.new("RGB", (96, 32), "gray") for _ in range(2)]
    pictures[0].paste("red", (0, 0, 16, 32))  # far from the middle square
    assert alignment(pictures[:1], [whole], encoder) != alignment(pictures[1:], [whole], encoder)


def test_scores_are_means_over_all_pairs(encoder: Encoder) -> None:
    pictures = [wide("red", "blue"), wide("green", "blue")]
    references = [Image.new("RGB", (16, 16), colour) for colour in ("red", "yellow", "white")]
    pairs = [alignment([p], [Region(LEFT, [r])], encoder)[0].image for p in pictures for r in references]
    together = alignment(pictures, [Region(LEFT, references)], encoder)[0].image
    assert together == pytest.approx(sum(float(x or 0) for x in pairs) / 6, abs=1e-5)


def test_clip_scores_words_and_dino_refuses_them(folders: Path) -> None:
    region = Region(LEFT, prompt="a red square")
    found = alignment([wide("red", "blue")], [region], load_encoder(folders / "clip"))[0]
    other = alignment([wide("red", "blue")], [Region(LEFT, prompt="a blue star")], load_encoder(folders / "clip"))[0]
    assert found.image is None and found.text is not None and -1 <= found.text <= 1 and found != other
    with pytest.raises(OptionError, match="dinov2 reads only pictures"):
        alignment([wide("red", "blue")], [region], load_encoder(folders / "dino"))


def test_wrong_regions_and_encoders_are_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="left < right"):
        Region((0.5, 0, 0.5, 1), prompt="a")
    with pytest.raises(OptionError, match="Give references or a prompt"):
        Region()
    with pytest.raises(DataError, match="no pictures"):
        alignment([], [], load_encoder(folders / "dino"))
    with pytest.raises(OptionError, match="but this is 'bert'"):
        load_encoder(folders / "bert")
    with pytest.raises(OptionError, match="cannot load an encoder"):
        load_encoder(tmp_path)
