"""Image classification: every source, the model's own size and normalisation, CNNs and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from spectune.concepts import alignment
from spectune.errors import DataError, MissingExtraError, OptionError
from spectune.recipes import images, parse_config
from spectune.recipes.images import Pixels
from spectune.recipes.table import recipe_class
from spectune.runs import dry_run, load_run, run

from . import tiny


def recipe_of(values: dict[str, Any]) -> Any:
    config = parse_config(values)
    return recipe_class(config.recipe)(config)


def test_a_vision_transformer_learns_and_is_found_again(tmp_path: Path) -> None:
    values = tiny.image_run(tmp_path, training={"steps": 30, "save_every": 100})
    result = run(parse_config(values), tmp_path / "run")
    assert result.metrics["test"]["accuracy"] == 1.0
    recipe, model = load_run(tmp_path / "run")
    assert recipe.evaluate(model, "test") == result.metrics["test"]


def test_a_processor_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> None:
            raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr(images, "AutoImageProcessor", Missing)
    values = tiny.image_run(tmp_path)
    with pytest.raises(MissingExtraError, match=r"vit: AutoImageProcessor requires .* 'spectune\[vision\]'"):
        run(parse_config(values), tmp_path / "run")
    with pytest.raises(MissingExtraError, match="requires the Torchvision library. Run: pip"):
        alignment.load_encoder(values["model"])


def test_a_convolutional_network_is_adapted_in_its_kernels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    folder = tiny.save(tf.ResNetForImageClassification(config), tmp_path / "resnet", False)
    adapter = {"method": "spectral_a", "r": 2, "target_modules": ["convolution"]}
    values = tiny.image_run(tmp_path, model=folder, adapter=adapter, data={"image_size": 16})
    found = dry_run(parse_config(values))
    assert any(len(shape) == 4 for _, shape in found.layers) and found.head == 2 * 8 + 2
    assert run(parse_config(values), tmp_path / "run").steps == 6


def test_a_timm_model_brings_its_size_and_head(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    folder = tmp_path / "timm"
    folder.mkdir()
    cfg = {
        k: v for k, v in model.pretrained_cfg.items() if k in ("input_size", "mean", "std", "classifier", "num_classes")
    }
    record = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(record))
    from safetensors.torch import save_file

    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    adapter = {"method": "spectral_a", "r": 2, "target_modules": ["conv2"]}
    values = tiny.image_run(tmp_path, model=str(folder), adapter=adapter, training={"steps": 2})
    recipe = recipe_of(values)
    assert recipe.head(recipe.build_model()) == ["timm_model.fc"]
    assert recipe.pixels.size == tuple(cfg["input_size"][1:]) and recipe.pixels.mean == tuple(cfg["mean"])
    assert run(parse_config(values), tmp_path / "run").steps == 2


def test_a_folder_of_folders_is_read_with_its_names(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for i in range(6):
            path = tmp_path / "images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((9, 12, 3), 20 * i, np.uint8)).save(path)
    data = {"train": str(tmp_path / "images"), "validation_share": 0.25}
    recipe = recipe_of(tiny.image_run(tmp_path, data=data))
    assert recipe.labels == ["cat", "dog"] and {s: len(p) for s, p in recipe.splits.items()} == {
        "train": 9,
        "validation": 3,
    }
    assert recipe.build_model().config.id2label == {0: "cat", 1: "dog"}
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"no image")
    broken = next(
        p for p in recipe.everything["train"] + recipe.everything["validation"] if p.name.endswith("cat/0.png")
    )
    with pytest.raises(DataError, match="pillow cannot read this image"):
        broken.open()


def test_pixels_are_resized_cut_to_the_middle_and_normalised() -> None:
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, 2:6] = 255  # the middle square is white
    white = Pixels((4, 4), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))(Image.fromarray(array))
    assert white.shape == (3, 4, 4)
    torch.testing.assert_close(white[:, 1:3, 1:3], torch.tensor([2.0, 1.0, 0.5])[:, None, None].expand(3, 2, 2))


def test_augmentation_follows_from_seed_epoch_and_place_and_spares_the_held_out(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.image_run(tmp_path))
    recipe.build_model()
    rows, again, plain = recipe.rows("train"), recipe.rows("train"), recipe.plain_rows("train")
    assert torch.equal(rows[0]["pixel_values"], again[0]["pixel_values"])
    again.epoch = 1
    assert not torch.equal(rows[0]["pixel_values"], again[0]["pixel_values"])
    assert not torch.equal(rows[0]["pixel_values"], plain[0]["pixel_values"])
    assert recipe.rows("test").seed is None


def test_packaged_digits_need_no_file(tmp_path: Path) -> None:
    recipe = recipe_of(tiny.image_run(tmp_path, data={"train": None, "packaged": "digits"}))
    assert len(recipe.splits["train"]) == 1500 and len(recipe.splits["test"]) == 297 and len(recipe.labels) == 10


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"packaged": "digits"}, "packaged data has its own splits"),
        ({"test": "x.npz"}, "an .npz file contains x_validation and x_test"),
        ({"train": "nowhere"}, "one folder of images for each class is needed, but there is none"),
        ({"train": None}, "data.train: is missing"),
    ],
)
def test_sources_that_do_not_fit_are_refused(data: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises((OptionError, DataError), match=line):
        recipe_of(tiny.image_run(tmp_path, data=data)).splits  # noqa: B018


def test_pickles_and_wrong_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.npz"
    np.savez(path, x_train=np.array([{"a": 1}], dtype=object), y_train=np.zeros(1))
    with pytest.raises(DataError, match="not a .npz file of plain arrays"):
        recipe_of(tiny.image_run(tmp_path, data={"train": str(path)})).splits  # noqa: B018
    np.savez(path, x_train=np.zeros((2, 4, 4)), y_train=np.zeros(2))
    with pytest.raises(DataError, match="pixels must be uint8"):
        recipe_of(tiny.image_run(tmp_path, data={"train": str(path)})).splits  # noqa: B018


def test_what_an_operating_system_leaves_behind_is_passed_over_and_the_rest_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(folder / label / f"{i}.png")
    values = tiny.image_run(tmp_path, data={"train": str(folder)})
    for litter in ("cat/._0.png", ".DS_Store", "dog/Thumbs.db", ".trash/0.png", "__MACOSX/cat/0.png", "cat/.x/0.png"):
        (folder / litter).parent.mkdir(parents=True, exist_ok=True)
        (folder / litter).write_bytes(b"no picture")
    found = dry_run(parse_config(values))
    assert found.classes == {"train": {"cat": 2, "dog": 2}} and not any("not read" in said for said in found.remarks)
    for left in ("cat/0.heic", "0.png", "fox/notes.txt"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_bytes(b"")
    said = dry_run(parse_config(values)).remarks
    assert any("4 files or folders in it are ignored, such as 0.png" in line for line in said)


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, :8] = 255  # the left half is white
    for orientation, edge in ((1, "left"), (3, "right"), (6, "top"), (8, "bottom")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(array).save(tmp_path / f"{edge}.png", exif=exif)
        found = np.asarray(images._opened(tmp_path / f"{edge}.png"))[..., 0]
        assert found.shape == ((8, 16) if orientation in (1, 3) else (16, 8))
        edges = {"left": found[:, 0], "right": found[:, -1], "top": found[0], "bottom": found[-1]}
        assert [name for name, line in edges.items() if line.min() == 255] == [edge]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_are_scaled_and_not_cut(ending: str, tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
    found = np.asarray(images._opened(tmp_path / f"ramp.{ending}"))
    assert found.shape == (16, 16, 3) and (found[..., 0].reshape(-1) == np.arange(256)).all()


def test_sixteen_bits_are_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((8, 16), np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert images._opened(tmp_path / "a.png").size == (8, 16)


def test_pixels_that_do_not_say_what_is_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif: the white level of 32-bit pixels \(mode F\)"):
        images._opened(tmp_path / "a.tif")


def test_arrays_of_other_channels_are_refused(tmp_path: Path) -> None:
    values = tiny.image_run(tmp_path)
    np.savez(tmp_path / "squares.npz", x_train=np.zeros((2, 8, 8, 1), np.uint8), y_train=[0, 1])
    with pytest.raises(DataError, match="pixels must be uint8 and N x H x W or N x H x W x 3"):
        dry_run(parse_config(values))
