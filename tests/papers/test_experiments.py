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
EXPERIMENTS = {name: load_experiment(name) for name in experiment_names()}
SWEEPS = [name for name, experiment in EXPERIMENTS.items() if experiment.full is not None]


@pytest.fixture(autouse=True)
def nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in WORDS.items():
        monkeypatch.setitem(small_models.MAKERS, name, lambda folder, words=words: {w: f"/{w}.npz" for w in words})


# Every table and figure of the three papers -> the experiments that run it, or say why not.
COVERED = {
    "Spectral Adapter, table 1": ["glue-deberta"],
    "Spectral Adapter, table 2": ["gsm8k-mistral"],
    "Spectral Adapter, table 3": ["parameter-table"],
    "Spectral Adapter, figure 1": ["orca-llama3"],
    "Spectral Adapter, figure 5": ["concept-fusion"],
    "Spectral Adapter, figure 6": ["concept-vase"],
    "Spectral Adapter, figure 7": ["concept-chair"],
    "Spectral Adapter, figure 8": ["svd-cost", "training-cost"],
    "Spectral Adapter, appendix F.3 and F.5": ["column-choice", "concept-fusion"],
    "Spectral Adapter, lemmas 3.1 and 4.1": ["lemmas"],
    "SVFT, table 1": ["metamath-gemma", "metamath-gemma-7b", "metamath-llama3"],
    "SVFT, table 2": ["commonsense-gemma-7b"],
    "SVFT, table 3": ["glue-svft", "glue-svft-random"],
    "SVFT, tables 4 and 9": ["few-shot-vision", "few-shot-vision-large"],
    "SVFT, table 5": ["svft-patterns"],
    "SVFT, table 6": ["metamath-pythia"],
    "SVFT, table 8": ["commonsense-gemma"],
    "SVFT, table 10": ["svft-truncation"],
    "SVFT, figure 4": ["svft-modules"],
    "SVFT, figures 1 and 5": ["metamath-gemma"],
    "SVFT, section 3.2": ["lemmas"],
    "SpecAdapt, VTAB-1k": ["vtab-specadapt"],
    "SpecAdapt, sensitivity": ["specadapt-ablation"],
    "SpecAdapt, other benchmarks": ["specadapt-other-benchmarks"],
    "no table": ["limited-data"],
}


def test_every_table_and_figure_has_a_name() -> None:
    assert {name for names in COVERED.values() for name in names} == set(EXPERIMENTS)
    with pytest.raises(OptionError, match="Did you mean 'glue-deberta'"):
        load_experiment("glue-debert")


def test_the_docs_list_every_table_and_figure_with_its_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compare.md").read_text("utf-8")
    rows = dict(line.strip("| ").split(" | ", 1) for line in page.splitlines() if line.startswith("| S"))
    for item, names in COVERED.items():
        if item != "no table":
            assert rows[item].split(" | ")[0] == ", ".join(f"`{name}`" for name in names), item


@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items() if e.missing])
def test_what_cannot_be_run_says_why(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="it cannot be run. [A-Z]") as found:
        prepare(load_experiment(name), tmp_path, small=False)
    assert EXPERIMENTS[name].missing in str(found.value)


@pytest.mark.parametrize(
    ("name", "small"), [(n, s) for n in SWEEPS for s in (True, False) if not s or EXPERIMENTS[n].small]
)
def test_every_sweep_is_whole(name: str, small: bool, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    ready = prepare(experiment, tmp_path, small=small, data=tmp_path, overrides=["seeds=[5]"])
    assert ready.sweep.seeds == [5] and "Changed by the user: seeds=[5]" in ready.published["deviations"]
    assert ("small" if small else "full size") in ready.sweep.title
    tasks, methods = set(ready.sweep.tasks), set(ready.sweep.methods)
    if not small:  # a printed figure has a measured one beside it, or a sentence says which rows are not trained
        unsaid = [row for row in set(experiment.published) - methods if row != "base"]
        assert not unsaid or any(
            "not trained" in sentence and all(row in sentence for row in unsaid)
            for sentence in ready.published["deviations"]
        ), unsaid
        assert {task for row in experiment.published.values() for task in row} - {"average"} <= tasks
    else:
        assert all(len(m.rates(task)) >= 3 for m in ready.sweep.methods.values() for task in tasks)
    assert methods


def test_a_deviation_is_a_sentence_and_stands_once() -> None:
    for name, experiment in EXPERIMENTS.items():
        versions = [v for v in (experiment.full, experiment.small, experiment.small_with_data) if v is not None]
        for sentences in [experiment.deviations, *(version.deviations for version in versions)]:
            assert len(set(sentences)) == len(sentences), name
            assert all(s.endswith(".") for s in sentences), name


def test_a_small_size_is_not_tuned_twice(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="grid of rates already. Leave --tune out"):
        prepare(load_experiment("glue-deberta"), tmp_path, small=True, tune=True)


def test_a_full_size_sweep_that_reads_files_asks_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Give --data DIR"):
        prepare(load_experiment("few-shot-vision"), tmp_path, small=False)


def test_printed_averages_are_the_means_of_their_rows() -> None:
    """A typing error in a figure would not survive this."""
    names = ("glue-deberta", "glue-svft", "glue-svft-random")
    for figures in (row for name in names for row in EXPERIMENTS[name].published.values()):
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
