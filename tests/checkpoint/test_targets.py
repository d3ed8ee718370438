"""Which weights a survey looks at: what an adapter would be put on, by name and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spectune.checkpoint import Checkpoint, open_checkpoint
from spectune.checkpoint.targets import find_targets, group_names, ordered, spread
from spectune.errors import OptionError

from ..models import MODELS


def saved(model: str, folder: Path) -> Checkpoint:
    MODELS[model].fresh().save_pretrained(str(folder))  # type: ignore[operator]
    return open_checkpoint(folder)


def test_embeddings_norms_and_heads_are_left_alone(tmp_path: Path) -> None:
    targets, left_out = find_targets(saved("llama", tmp_path))
    assert {t.group for t in targets} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert len(targets) == 14 and left_out == {"embeddings and heads": 2}
    assert next(t for t in targets if t.group == "down_proj").shape == (32, 48)


def test_conv1d_of_a_gpt2_folder_is_turned(tmp_path: Path) -> None:
    base = saved("gpt2", tmp_path)
    target = next(t for t in find_targets(base)[0] if t.group == "c_attn")
    assert base.shapes[target.tensor] == (32, 96) and target.shape == (96, 32)
    assert target.matrix(base).shape == (96, 32)


def test_kernels_are_flattened_and_quantised_weights_named(tmp_path: Path) -> None:
    tensors = {
        "conv.weight": torch.ones(4, 3, 2, 2),
        "a.weight": torch.ones(4, 4, dtype=torch.int8),
        "b.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "norm.weight": torch.ones(4),
        "table": torch.ones(4, 4),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    targets, left_out = find_targets(open_checkpoint(tmp_path / "m.safetensors"))
    assert [(t.name, t.shape) for t in targets] == [("conv", (4, 12))]
    assert left_out == {f"stored as {kind}, with scales elsewhere": 1 for kind in ("int8", "float8_e4m3fn")}


def test_include_replaces_the_choice_and_exclude_takes_from_it(tmp_path: Path) -> None:
    base = saved("llama", tmp_path)
    targets, left_out = find_targets(base, include="lm_head|q_proj", exclude=r"layers\.1\.")
    assert [t.name for t in targets] == ["lm_head", "model.layers.0.self_attn.q_proj"]
    assert left_out == {"not in --include": 13, "in --exclude": 1}


@pytest.mark.parametrize(
    ("include", "exclude", "said"),
    [("q_prj", None, "Did you mean|Choose from"), ("(", None, "--include"), (None, ".", "has no weights for '.'")],
)
def test_a_choice_that_finds_nothing_says_so(
    include: str | None, exclude: str | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=said):
        find_targets(saved("llama", tmp_path), include, exclude)


def test_groups_are_the_shortest_endings_that_tell_places_apart() -> None:
    names = [
        f"encoder.layer.{i}.{rest}" for i in range(3) for rest in ("attention.output.dense", "output.dense", "query")
    ]
    groups = group_names(names)
    assert groups["encoder.layer.2.query"] == "query"
    assert groups["encoder.layer.0.attention.output.dense"] == "attention.output.dense"
    assert groups["encoder.layer.0.output.dense"] == "layer.*.output.dense"
    assert group_names(["x.0", "x.1"]) == {"x.0": "x.*", "x.1": "x.*"}
    kohya = [f"lora_unet_down_blocks_{i}_attn1_to_{name}" for i in range(12) for name in "qv"]
    assert sorted({*group_names(kohya).values()}) == [f"lora_unet_down_blocks_*_attn1_to_{name}" for name in "qv"]


def test_blocks_come_in_their_order() -> None:
    assert ordered(["l.10.q", "l.2.q", "l.2.k", "head"]) == ["head", "l.2.k", "l.2.q", "l.10.q"]


@pytest.mark.parametrize(
    ("sample", "blocks"), [(1, [4]), (2, [0, 8]), (3, [0, 4, 8]), (20, list(range(9))), (None, list(range(9)))]
)
def test_a_sample_is_spread_over_the_blocks_of_each_kind(sample: int | None, blocks: list[int], tmp_path: Path) -> None:
    tensors = {f"l.{i}.{kind}.weight": torch.ones(2, 2) for i in range(9) for kind in ("q", "k")}
    save_file(tensors, tmp_path / "m.safetensors")
    chosen = spread(find_targets(open_checkpoint(tmp_path / "m.safetensors"))[0], sample)
    assert [t.name for t in chosen] == [f"l.{i}.{kind}" for i in blocks for kind in ("k", "q")]
