"""Published experiments: every one loads, its sweeps are whole, its figures add up, its computations agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from spectune.errors import DataError, OptionError
from spectune.papers import COMPUTATIONS, experiment_names, load_experiment, prepare, small_models

WORDS = {
    "languages": ["minilm", "languages_train", "languages_validation", "languages_test"],
    "digits": ["vit", "new_digits"],
    "interface_lm": ["lm", *(f"{a}_{b}" for a in ("german", "dutch") for b in ("train", "validation", "test"))],
}
SWEEPS = [name for name in experiment_names() if load_experiment(name).compute is None]


@pytest.fixture(autouse=True)
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in WORDS.items():
        monkeypatch.setitem(small_models.MAKERS, name, lambda folder, words=words: {w: f"/{w}.npz" for w in words})


def test_all_that_was_promised_is_there() -> None:
    asked = "glue-deberta gsm8k-mistral orca-llama3 metamath-gemma commonsense-gemma few-shot-vision vtab-specadapt"
    assert {*asked.split(), "parameter-table", "lemmas", "svd-cost", "column-choice", "limited-data"} == set(
        experiment_names()
    )
    with pytest.raises(OptionError, match="Did you mean 'glue-deberta'"):
        load_experiment("glue-debert")


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.parametrize("small", [True, False])
def test_every_sweep_is_whole(name: str, small: bool, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    ready = prepare(experiment, tmp_path, small=small, data=tmp_path, overrides=["seeds=[5]"])
    assert ready.sweep.seeds == [5] and "Changed by the user: seeds=[5]" in ready.published["deviations"]
    assert ("small" if small else "full size") in ready.sweep.title
    tasks, methods = set(ready.sweep.tasks), set(ready.sweep.methods)
    if not small:  # a printed figure must have a measured one beside it, what is not trained here is named
        assert set(experiment.published) - methods <= {"base", "adalora"}, name
        assert {task for row in experiment.published.values() for task in row} - {"average"} <= tasks
    assert len(methods) > 1 and all(len(m.learning_rates) >= 3 for m in ready.sweep.methods.values())


def test_a_full_size_sweep_that_reads_files_asks_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Give --data DIR"):
        prepare(load_experiment("few-shot-vision"), tmp_path, small=False)


def test_printed_averages_are_the_means_of_their_rows() -> None:
    """A typing error in a figure would not survive this."""
    for figures in load_experiment("glue-deberta").published.values():
        single = [value for task, value in figures.items() if task != "average"]
        assert len(single) == 8 and sum(single) / 8 == pytest.approx(figures["average"], abs=0.011)


@pytest.mark.parametrize("name", ["parameter_table", "lemmas"])
def test_computations_agree_with_the_papers(name: str) -> None:
    found = COMPUTATIONS[name]()
    assert len(found) >= 8 and [row for row in found if row.agrees is False] == []
    assert sum(row.agrees is True for row in found) >= 7


def test_the_cost_of_the_svd_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = COMPUTATIONS["svd_cost"]()
    assert all(row.agrees and "full SVD" in row.found for row in found)


def test_the_digits_are_split_by_class_and_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np = pytest.importorskip("numpy")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(small_models, "_pretrained_vit", lambda folder, data: folder / "vit")
    found = small_models.digits(tmp_path)
    with np.load(found["new_digits"]) as file:
        arrays = {name: file[name] for name in file.files}
    assert sorted(set(arrays["y_train"].tolist())) == [6, 7, 8, 9] and len(arrays["y_train"]) == 40
    assert len(arrays["y_validation"]) == 80 and len(arrays["y_test"]) > 500
    seen = {a.tobytes() for a in arrays["x_train"]}
    assert not seen & {a.tobytes() for a in arrays["x_test"]}
