"""`match` and `sequential`: the closed forms against their problems, and the walk through a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectune.algebra import dense
from spectune.errors import OptionError
from spectune.fusion import Part, fuse
from spectune.fusion.match import Match, Sequential

from .parts import base_folder, inputs, load_base, lora, lora_part, save_adapter, spectral, weight


def seen_parts() -> tuple[list[Part], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two adapters, with what reaches the layer in their own models (z) and behind what is merged (x)."""
    rows = [(inputs(seed), inputs(seed) + 0.3 * inputs(seed + 5)) for seed in range(2)]
    parts = [
        replace(
            lora_part(f"{seed}", 3, 10 * seed),
            gram_II=x.mT @ x / len(x),
            cross_II=z.mT @ x / len(x),
            weight_OI=weight(),
        )
        for seed, (z, x) in enumerate(rows)
    ]
    return parts, rows


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 2.0]])
@pytest.mark.parametrize("rule", [Match(rank=18), Sequential()])
def test_they_are_the_minimum_of_their_problems(rule: Match | Sequential, weights: list[float]) -> None:
    parts, rows = seen_parts()
    updates = [dense(part.delta) for part in parts]
    ridge = rule.eps * sum(w * p.gram_II for w, p in zip(weights, parts, strict=True)).diagonal().mean()  # type: ignore[union-attr]
    prior = sum(w * update for w, update in zip(weights, updates, strict=True)) / sum(weights)

    def loss(at: torch.Tensor) -> torch.Tensor:
        total = ridge * (at - prior).square().sum()
        for w, update, (z, x) in zip(weights, updates, rows, strict=True):
            wanted = (weight() + update) @ z.mT - weight() @ x.mT if isinstance(rule, Match) else update @ x.mT
            total = total + w * (at @ x.mT - wanted).square().sum() / len(x)
        return total

    found = dense(rule.fuse(parts, weights).delta).requires_grad_()
    loss(found).backward()
    assert found.grad is not None and found.grad.abs().max() < 1e-9 * loss(torch.zeros_like(found))


def test_the_cut_keeps_what_the_inputs_see() -> None:
    parts, _ = seen_parts()
    total = parts[0].gram_II + parts[1].gram_II  # type: ignore[operator]
    whole = dense(Match(rank=18).fuse(parts, [1.0, 1.0]).delta)
    plain_U, plain_S, plain_Vh = torch.linalg.svd(whole, full_matrices=False)
    plain = plain_U[:, :3] @ torch.diag(plain_S[:3]) @ plain_Vh[:3]
    cut = dense(Match(rank=3).fuse(parts, [1.0, 1.0]).delta)
    off, plain_off = (torch.trace((one - whole) @ total @ (one - whole).mT) for one in (cut, plain))
    assert torch.linalg.matrix_rank(cut) == 3 and off < 0.97 * plain_off


def batches(seed: int, count: int = 3) -> list[dict[str, torch.Tensor]]:
    stream = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 60, (4, 8), generator=stream)} for _ in range(count)]


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [
        save_adapter(tmp_path, "one", lora(2), 1),
        save_adapter(tmp_path, "other", spectral([0, 1, 2]), 2),
    ]


def hidden(model: Any, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch, output_hidden_states=True).hidden_states[-1] for batch in given])


def off(tmp_path: Path, folder: Path, adapters: list[Path], given: list[list[dict[str, torch.Tensor]]]) -> float:
    """Get how far the merged model is from each adapter's own on that adapter's examples."""
    total = 0.0
    for adapter, examples in zip(adapters, given, strict=True):
        own, merged = load_base(base_folder(tmp_path)), load_base(base_folder(tmp_path))
        own.load_adapter(str(adapter))
        merged.load_adapter(str(folder))
        total += float((hidden(own, examples) - hidden(merged, examples)).square().mean())
    return total


def test_behind_the_merge_the_model_comes_nearer_to_each_adapters_own(tmp_path: Path, adapters: list[Path]) -> None:
    given, base = [batches(1), batches(2)], base_folder(tmp_path)
    model = load_base(base).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    away: dict[str, float] = {}
    told: list[tuple[int, int]] = []
    for rule in ("average", "sequential", "match"):
        more: dict[str, Any] = {"model": model, "examples": given, "on_layers": lambda *at: told.append(at)}
        fused = fuse(adapters, rule=rule, base=base, **(more if rule != "average" else {}))
        saved = fused.save(tmp_path / rule, as_lora=True)
        assert saved.max_rank <= 8  # rank 2 of the LoRA and 6 of spectral_a, r = 3
        away[rule] = off(tmp_path, tmp_path / rule, adapters, given)
    assert away["match"] < 0.9 * away["sequential"] < 0.8 * away["average"], away
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and model.training
    assert told[-1] == (4, 4) and sorted(told[:4]) == told[:4]


def test_one_adapter_is_itself_and_the_order_does_not_matter(tmp_path: Path, adapters: list[Path]) -> None:
    model, base = load_base(base_folder(tmp_path)), base_folder(tmp_path)
    alone = fuse(adapters[:1], rule="match", base=base, model=model, examples=[batches(1)]).deltas
    own = fuse(adapters[:1], rule="average", base=base).deltas
    for layer, delta in own.items():
        torch.testing.assert_close(dense(alone[layer]), dense(delta), rtol=1e-2, atol=1e-6)  # float32 forwards
    given = [batches(1), batches(2)]
    forward = fuse(adapters, rule="match", base=base, model=model, examples=given).deltas
    back = fuse(adapters[::-1], rule="match", base=base, model=model, examples=given[::-1]).deltas
    for layer, delta in forward.items():
        torch.testing.assert_close(dense(back[layer]), dense(delta), rtol=1e-4, atol=1e-6)


def test_what_is_kept_stays_nearer_to_the_base(tmp_path: Path, adapters: list[Path]) -> None:
    base, given, neutral = base_folder(tmp_path), [batches(1), batches(2)], batches(3)
    plain = hidden(load_base(base), neutral)
    moved = []
    for keep in (None, neutral):
        fuse(adapters, rule="match", base=base, model=load_base(base), examples=given, keep=keep).save(
            tmp_path / f"{bool(keep)}", as_lora=True
        )
        merged = load_base(base)
        merged.load_adapter(str(tmp_path / f"{bool(keep)}"))
        moved.append(float((hidden(merged, neutral) - plain).square().mean()))
    assert moved[1] < 0.7 * moved[0], moved


@pytest.mark.parametrize(
    ("rule", "more", "said"),
    [
        ("match", {}, "Pass model=the base and examples"),
        ("match", {"model": 1, "examples": [[]]}, "Give one for each, none of them empty"),
        ("average", {"keep": batches(1)}, "rule 'average' does not use them"),
        ("match", {"rank": 0}, "rank=0 must be at least 1"),
        ("sequential", {"eps": 0.0}, "eps=0.0 must be a share above 0"),
        ("average", {"rank": 3}, "rule 'average' has no option 'rank'"),
    ],
)
def test_what_does_not_go_together_is_refused(adapters: list[Path], rule: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        fuse(adapters, rule=rule, **more)


def test_heads_of_their_own_are_left_out_when_told(tmp_path: Path) -> None:
    both = [save_adapter(tmp_path, name, lora(2, modules_to_save=["lm_head"]), i) for i, name in enumerate("ab")]
    fused = fuse(both, rule="task_singular", heads_apart=True)
    assert not fused.carried
    fused.save(tmp_path / "fused")
    load_base(base_folder(tmp_path)).load_adapter(str(tmp_path / "fused"))
