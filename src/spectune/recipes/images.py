"""Images and labels from folders, .npz files, packages or the hub, as a model's tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoImageProcessor

from ..checkpoint import load_auto
from ..errors import DataError, MissingExtraError
from ..training.config import SPLITS, DataSection
from .data import hub_split
from .labels import class_name

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Larger pictures are refused before they are unpacked: a few kilobytes can unpack to gigabytes. Chosen.
MOST_PIXELS = 100_000_000
# The mean and deviation of ImageNet's channels, for models without their own.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Packaged = Literal["digits"]


@dataclass(frozen=True)
class Picture:
    """One image, opened when it is needed, and the name of its class."""

    open: Callable[[], Any]
    label: str
    name: str


def pillow() -> Any:
    """Get PIL.Image; `MissingExtraError` names the extra."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("images: this needs pillow. Run: pip install 'spectune[vision]'") from None
    return Image


def load_pictures(data: DataSection, packaged: Packaged | None) -> dict[str, list[Picture]]:
    """Get the pictures of every split that is given.

    A folder contains one folder for each class; an .npz file contains x_train, y_train and perhaps x_validation,
    x_test (uint8, N x H x W or N x H x W x 3) and is given as train. `DataError` for missing or malformed data.
    """
    if packaged is not None:
        return _digits()
    if data.train is None:
        raise DataError("data.train: is missing. Give a folder, an .npz file, or a split of data.hub.")
    if data.train.endswith(".npz") and not data.hub:
        return _npz(Path(data.train))
    named = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
    return {split: _hub(data, name) if data.hub else _folder(Path(name)) for split, name in named.items()}


def _folder(path: Path) -> list[Picture]:
    if not path.is_dir():
        raise DataError(
            f"{path}: a folder with one folder of images for each class is needed, but there is none. Check the path."
        )
    classes = sorted(child for child in path.iterdir() if child.is_dir() and not is_litter(child))
    found = [
        Picture(lambda file=file: _opened(file), class_name(folder.name), str(file))  # type: ignore[misc]
        for folder in classes
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in ENDINGS and not any(map(is_litter, (file, *file.relative_to(folder).parents)))
    ]
    if not found:
        raise DataError(
            f"{path}: its folders contain no images. Put them into one folder for each class, such as {path}/cat/1.jpg."
        )
    return found


def is_litter(path: Path) -> bool:
    """Ask whether a file is an operating system's: macOS's ._x.jpg, .DS_Store, Thumbs.db."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def unread(path: Path) -> list[Path]:
    """Get what is ignored in a folder of pictures: other endings, pictures outside a class, empty classes."""
    found = []
    for child in sorted(path.iterdir()):
        inside = [child] if child.is_file() else [file for file in sorted(child.rglob("*")) if file.is_file()]
        files = [file for file in inside if not any(map(is_litter, (file, *file.relative_to(path).parents)))]
        pictures = [file for file in files if file.suffix.lower() in ENDINGS]
        found += [file for file in files if child.is_file() or file not in pictures]
        found += [child] if child.is_dir() and not pictures and not is_litter(child) else []
    return found


def _opened(file: Path) -> Any:
    image_type = pillow()
    try:
        with image_type.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(
                    f"{image.width} x {image.height} pixels are too many (limit {MOST_PIXELS:,}). Make it smaller."
                )
            return upright_rgb(image)
    except (OSError, ValueError, SyntaxError, image_type.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise DataError(f"{file}: {error}") from None
        raise DataError(f"{file}: pillow cannot read this image: {error}") from error


def upright_rgb(image: Any) -> Any:
    """Get pillow's picture as eight bits of red, green and blue, rotated by its EXIF orientation.

    Sixteen bits are scaled: 65,535 becomes 255. `DataError` for 32-bit pixels, whose white level is unknown.
    """
    if image.mode in ("I", "F") and getattr(image, "format", None) != "PNG":  # older pillows open a 16-bit PNG as I
        raise DataError(f"the white level of 32-bit pixels (mode {image.mode}) is unknown. Save it in 8 or 16 bits.")
    if image.mode.startswith("I"):
        # Rounded division: 65,535 / 257 = 255.
        exif = image.getexif()
        image = pillow().fromarray(np.rint(np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
        image.getexif().update(exif)
    return image_ops().exif_transpose(image).convert("RGB")


def image_ops() -> Any:
    """Get PIL.ImageOps."""
    pillow()
    from PIL import ImageOps

    return ImageOps


def _npz(path: Path) -> dict[str, list[Picture]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: this is not a .npz file of plain arrays: {error}") from error
    found: dict[str, list[Picture]] = {}
    for split in SPLITS:
        if f"x_{split}" in arrays:
            if f"y_{split}" not in arrays or len(arrays[f"y_{split}"]) != len(arrays[f"x_{split}"]):
                raise DataError(f"{path}: x_{split} needs a y_{split} of the same length.")
            found[split] = _from_arrays(arrays[f"x_{split}"], arrays[f"y_{split}"], f"{path.name}:{split}")
    if "train" not in found:
        raise DataError(
            f"{path}: x_train and y_train are needed, but it contains {', '.join(arrays) or 'nothing'}. Rename them."
        )
    return found


def _from_arrays(pixels: Any, labels: Any, name: str) -> list[Picture]:
    if pixels.dtype != np.uint8 or (pixels.ndim != 3 and pixels.shape[3:] != (3,)):
        raise DataError(
            f"{name}: pixels must be uint8 and N x H x W or N x H x W x 3, but are {pixels.dtype} {pixels.shape}."
        )
    image_type = pillow()
    names = [_named(label, f"{name} {i}") for i, label in enumerate(labels.tolist())]
    return [
        Picture(lambda array=array: image_type.fromarray(array).convert("RGB"), label, f"{name} {i}")  # type: ignore[misc]
        for i, (array, label) in enumerate(zip(pixels, names, strict=True))
    ]


def _named(label: Any, where: str) -> str:
    try:
        return class_name(label)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _digits() -> dict[str, list[Picture]]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; the last 297 are the test set, as in its examples."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtraError(
            "data.packaged=digits: this needs scikit-learn. Run: pip install 'spectune[train]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    small = (pixels.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    pictures = _from_arrays(small, labels, "digits")
    return {"train": pictures[:1500], "test": pictures[1500:]}


def _hub(data: DataSection, split: str) -> list[Picture]:
    found = hub_split(data, split)
    images = [name for name, feature in found.features.items() if type(feature).__name__ == "Image"]
    labels = [name for name, feature in found.features.items() if hasattr(feature, "int2str")]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"data.hub={data.hub}: needs one column of images and one of classes, but has {images} and {labels}."
        )
    kind, places = found.features[labels[0]], found[labels[0]]
    # In a test set, -1 means a hidden label.
    names = [
        _named(None if place is None or place < 0 else kind.int2str(place), f"{data.hub}, {split}, row {number}")
        for number, place in enumerate(places, 1)
    ]
    return [
        Picture(lambda i=i: _of_hub(found, images[0], i, f"{data.hub}, {split}, row {i + 1}"), name, f"{split} {i}")  # type: ignore[misc]
        for i, name in enumerate(names)
    ]


def _of_hub(found: Any, column: str, i: int, where: str) -> Any:
    try:
        image = found[i][column]
        if image is None:
            raise DataError("has no picture. Add it, or remove the row.")
        return upright_rgb(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Pixels:
    """Turns an image into a tensor: resized, cropped to the middle, normalised as in the model's training."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Any, chance: random.Random | None = None) -> torch.Tensor:
        """Get the 3 x H x W tensor. With `chance`, a random crop of 60-100% of the area and a random mirror image."""
        height, width = self.size
        box = _random_box(image.size, chance) if chance is not None else _middle_box(image.size, width / height)
        small = image.resize((width, height), pillow().Resampling.BICUBIC, box=box)
        if chance is not None and chance.random() < 0.5:
            small = small.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
        x_HWC = torch.from_numpy(np.array(small, dtype=np.float32) / 255)
        return ((x_HWC - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()


def _middle_box(size: tuple[int, int], ratio: float) -> tuple[float, float, float, float]:
    width, height = size
    cut_width, cut_height = (width, width / ratio) if width / height < ratio else (height * ratio, height)
    left, top = (width - cut_width) / 2, (height - cut_height) / 2
    return left, top, left + cut_width, top + cut_height


def _random_box(size: tuple[int, int], chance: random.Random) -> tuple[float, float, float, float]:
    # Milder than Inception's 8-100% and 3/4-4/3: fine-tuning sees each image only a few times. Chosen.
    width, height = size
    share, ratio = chance.uniform(0.6, 1.0) ** 0.5, chance.uniform(0.9, 1.1)
    cut_width, cut_height = min(width, width * share * ratio), min(height, height * share / ratio)
    left, top = chance.uniform(0, width - cut_width), chance.uniform(0, height - cut_height)
    return left, top, left + cut_width, top + cut_height


def image_processor(model: str | Path, **where: Any) -> Any:
    """Get transformers' image processor of a model; `MissingExtraError` if it needs a package that is missing.

    Without the processor, pictures would be scaled differently than in the model's training.
    """
    try:
        return load_auto(AutoImageProcessor, model, **where)
    except ImportError as error:
        wants = " ".join(str(error).split()).partition(". ")[0]
        raise MissingExtraError(f"{model}: {wants}. Run: pip install 'spectune[vision]'") from error


def pixels_of(model: Any, processor: Any, side: int | None) -> Pixels:
    """Get a model's input size (or the given side) and normalisation: from timm's record, its processor, its config."""
    config = model.config
    timm_model = getattr(model, "timm_model", None)
    if timm_model is not None:
        record = {**timm_model.default_cfg, **(getattr(config, "pretrained_cfg", None) or {})}
        _, height, width = record["input_size"]
        timm_size = (height, width) if side is None else (side, side)
        return Pixels(timm_size, tuple(record["mean"]), tuple(record["std"]))
    size = side or (getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None)
    size = size or getattr(processor, "size", None) or getattr(config, "image_size", None)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    default_mean, default_std = IMAGENET
    return Pixels(_height_and_width(size, config), tuple(mean or default_mean), tuple(std or default_std))


def _height_and_width(size: Any, config: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)):
        return int(size[0]), int(size[1])
    get = size.get if hasattr(size, "get") else lambda name: getattr(size, name, None)
    edge = get("shortest_edge")
    height, width = get("height") or edge, get("width") or edge
    if not height or not width:
        raise DataError(f"model: {type(config).__name__} does not contain its image size. Give data.image_size.")
    return int(height), int(width)
