"""Files that lie, point elsewhere or never end: each is one clear refusal, in little time and memory."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from spectune.checkpoint import open_checkpoint, read_adapter_folder, read_lora
from spectune.checkpoint.config_limits import refuse_absurd_size
from spectune.checkpoint.patterns import LayerPatterns
from spectune.checkpoint.reader import read_json
from spectune.checkpoint.targets import find_targets, ordered
from spectune.checkpoint.tensor_file import TensorFile
from spectune.errors import LONGEST_MESSAGE, AdapterError, SpectuneError, nearest

from ..effort import at_most


def written(path: Path, header: object, body: bytes = b"\0" * 64) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


LIES: dict[str, object] = {
    "nested header": b'{"a":' * 50_000,
    "nested lists": b"[" * 1_000_000,
    "sides are floats": {"a": entry(shape=[2.0, 3.0])},
    "sides are truths": {"a": entry(shape=[True, 6])},
    "offsets are floats": {"a": entry(data_offsets=[0.0, 24.0])},
    "a side is infinite": b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,Infinity]}}',
    "empty, and 2^60 rows": {"a": entry(shape=[2**60, 0], data_offsets=[0, 0])},
    "more digits than Python reads": b'{"a":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,4]}}',
    "shape is an object": {"a": entry(shape={"0": 2})},
    "dtype is a list": {"a": entry(dtype=["F32"])},
    "metadata is a list": {"__metadata__": [1], "a": entry()},
    "metadata holds numbers": {"__metadata__": {"steps": 3}, "a": entry()},
    "half a letter in a name": {"\ud800": entry()},
    "a name that clears the screen": {"\x1b[2Jlayer": entry()},
    "a name without end": {"a" * 501: entry()},
    "no object": [1, 2],
    "an entry is null": {"a": None},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_in_one_line(lie: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", LIES[lie])
    said = "the name of a tensor is too long or has" if "name" in lie else "is not a safetensors file"
    with pytest.raises(AdapterError, match=said) as caught:
        TensorFile.open(path)
    assert str(caught.value).isprintable()


def test_terabytes_that_are_promised_are_not_allocated(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", {"a": entry(shape=[2**40], data_offsets=[0, 2**42])})
    with pytest.raises(AdapterError, match="its header promises 4,398,"):
        TensorFile.open(path)


def test_a_shape_of_a_million_sides_is_refused_before_they_are_multiplied(tmp_path: Path) -> None:
    """80,000 sides of ten digits took eleven seconds."""
    for sides in ([2_999_999_999] * 400_000, [1] * 65, [2**64], [2**40, 2**40, 2**40]):
        path = written(tmp_path / "a.safetensors", {"a": entry(shape=sides)})
        with at_most(30), pytest.raises(AdapterError, match="is not a safetensors file"):
            TensorFile.open(path)


def outcome(path: Path) -> str:
    """Read all of a file: `read`, or the words of the refusal, which are one printable line."""
    try:
        file = TensorFile.open(path)
        for name in file.names:
            assert tuple(file.tensor(name).shape) == file.shapes[name]
    except SpectuneError as error:
        return str(error)
    return "read"


def test_a_tensor_that_stands_twice_is_not_half_believed(tmp_path: Path) -> None:
    """Python would take the last of two equal keys, and another parser may take the first."""
    one, other = (json.dumps({"a": entry(shape=shape)}).encode() for shape in ([2, 3], [6]))
    words = outcome(written(tmp_path / "a.safetensors", one[:-1] + b"," + other[1:], b"\0" * 24))
    assert "not a safetensors file" in words


def test_a_file_exchanged_after_opening_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2, 3)}, path)
    file = TensorFile.open(path)
    save_file({"a": torch.ones(7)}, path)
    with pytest.raises(AdapterError, match="has changed since it was opened"):
        file.tensor("a")


@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"[1]", b"nan", b'"a"', b""])
def test_json_that_is_none_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"not valid JSON|a JSON object is needed"):
        read_json(tmp_path / "a.json", 2**20)


def test_a_config_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(2**33)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(AdapterError, match=r"8,589,934,592 bytes are too many for this kind of file"):
        read_adapter_folder(tmp_path)


SHARDS = (
    "../a.safetensors",
    "/etc/passwd",
    "x/../../a",
    "C:\\a",
    "..\\a",
    "",
    "a\0b",
    "a" * 5_000,
    "a\x1b[2J",
    "\ud800",
)


@pytest.mark.parametrize("shard", SHARDS)
def test_an_index_cannot_lead_out_of_its_folder(shard: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(AdapterError, match=r"outside its folder|there is no such file"):
        open_checkpoint(model)


def test_links_are_followed_to_files_only(tmp_path: Path) -> None:
    """The Hugging Face cache is made of links; what is behind one must be a regular file."""
    save_file({"a": torch.ones(1)}, tmp_path / "blob")
    folder = tmp_path / "model"
    folder.mkdir()
    link = folder / "model.safetensors"
    link.symlink_to(tmp_path / "blob")
    assert open_checkpoint(folder).names == ("a",)
    for aim in ("/dev/zero", str(tmp_path), "model.safetensors"):
        link.unlink()
        link.symlink_to(aim)
        with pytest.raises(AdapterError):
            open_checkpoint(folder)
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(AdapterError, match="not a regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "b" * 300 + ".gguf"])
def test_a_name_that_no_disk_can_hold_is_a_missing_file(name: str) -> None:
    for opened in (open_checkpoint, read_adapter_folder, read_lora):
        with pytest.raises(AdapterError):
            opened(name)


def names_layer(pattern: Any, layer: str) -> bool:
    return LayerPatterns([pattern]).first(layer) is not None


def test_a_pattern_that_never_ends_is_stopped() -> None:
    with at_most(30), pytest.raises(AdapterError, match=r"take more than 1\.0 seconds"):
        names_layer("(a|aa)+[bc]", "a" * 64)


def test_all_patterns_of_a_config_have_one_deadline() -> None:
    """Each alone stays under the limit: with a limit of its own, twenty of them took twelve seconds."""
    slow = LayerPatterns([f"(a|aa)+[bc]{n}" for n in range(900)])
    with at_most(30), pytest.raises(AdapterError, match=r"take more than 1\.0 seconds"):
        for _ in range(1_000):
            slow.first("a" * 26)


def test_a_config_has_a_thousand_expressions_at_most_and_any_number_of_names() -> None:
    with pytest.raises(AdapterError, match="more than 1,000 patterns"):
        LayerPatterns(f"a{n}.*" for n in range(1_001))
    with pytest.raises(AdapterError, match="more than 1,000 patterns"):  # in alike ones a look-up would be a search
        LayerPatterns(f"{'.'.join('abcdefghijk')}".translate({46: "._-"[n % 3]}) + f".{n}.*" for n in range(1_001))
    layers = [f"model.layers.{n}.q_proj" for n in range(20_000)]
    exact, ends = LayerPatterns(f"^{re.escape(layer)}" for layer in layers), LayerPatterns(layers)
    with at_most(30):
        for place in range(0, 20_000, 10):
            assert exact.first(layers[place]) == f"^{re.escape(layers[place])}"
            assert ends.first(f"base.{layers[place]}") == layers[place] and exact.first(f"base.{layers[place]}") is None


@pytest.mark.parametrize("pattern", ["((a{99}){99}){99}", "(a{1000}){1000}" * 50, "a{3}{9}{99}", "a{e<=2}", r"\p{L}"])
def test_what_cannot_be_compiled_in_time_is_no_pattern(pattern: str) -> None:
    """regex copies what is repeated: the second of these took three minutes and then all memory."""
    with pytest.raises(AdapterError, match=r"copies|a brace that counts nothing"):
        names_layer(pattern, "model.layers.0.q_proj")


@pytest.mark.parametrize(
    "pattern",
    ["(" * 500, "a{999999999999999}", "[", "a" * 1_001, 3, "(?P<a", "\\", "(?R)", "(?|a|b)"],
)
def test_what_is_no_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(AdapterError, match="pattern"):
        names_layer(pattern, "model.layers.0.q_proj")


WRITTEN = ["q_proj", "^q_proj", "lin0", "^lin0", "0.q", "a.b.c", r"a\.b\.c", "a.b", r"x\.a\-b", "proj", ".*q", "q|lin0"]
WRITTEN += [
    "model.layers.0.q_proj",
    "^model.layers.1.q_proj",
    r"^model\.layers\.10\.q_proj",
    r"\d",
    "a_b",
    "",
    "q_proj$",
]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_patterns_match_as_peft_matches(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    layers = ["model.layers.0.q_proj", "model.layers.10.q_proj", "lin0", "a_b.c", "x.a-b", "q_proj", "q_proj.more", "q"]
    for layer in layers:
        named = get_pattern_key([pattern, "nothing"], layer) == pattern
        assert names_layer(pattern, layer) == (named and bool(re.match(rf"(.*\.)?({pattern})$", layer))), layer


def test_the_first_pattern_in_the_config_wins_as_in_peft() -> None:
    layer = "model.layers.0.q_proj"
    for patterns in (
        ["q_proj", r".*\.q_proj"],
        [r".*\.q_proj", "q_proj"],
        ["0.q_proj", "q_proj"],
        ["k", "q.proj", layer],
    ):
        assert LayerPatterns(patterns).first(layer) == next(p for p in patterns if names_layer(p, layer))


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"n_layer": 10**5}},
        {"depths": [2, 10**400]},
        {"num_labels": 10**10},
        {"num_hidden_layers": 1_000, "num_experts": 10_000},
    ],
)
def test_a_config_of_absurd_size_is_refused_before_anything_is_built(config: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=r"Do not use it"):
        refuse_absurd_size(Path("config.json"), config)


def test_the_configs_of_real_models_pass() -> None:
    for config in (
        {"num_hidden_layers": 126, "vocab_size": 128_256, "block_size": 1024},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "vocab_size_per_layer_input": 262_144},
        {"depths": [3, 3, 27, 3], "id2label": {str(n): str(n) for n in range(1000)}, "num_labels": 21_841},
    ):
        refuse_absurd_size(Path("config.json"), config)


def test_a_message_is_one_printable_line_of_bounded_length() -> None:
    words = str(AdapterError("layer\x1b[2J\n\u202e: " + "x" * 100_000))
    assert words.isprintable() and len(words) < LONGEST_MESSAGE + 50
    assert words.startswith("layer\\x1b[2J\\n\\u202e: x")


def test_near_misses_of_hostile_names_take_seconds_at_most() -> None:
    known = [("ab" * 60)[: 100 + n % 20] + str(n) for n in range(100_000)]
    with at_most(60):
        assert len(nearest("ba" * 5_000, known)) < 3_000


def test_digits_of_other_scripts_are_no_block_numbers(tmp_path: Path) -> None:
    assert ordered(["a.²", "a.10", "a.9"]) == ["a.²", "a.9", "a.10"]
    save_file({"layer.²": torch.ones(2, 2), "layer.².weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    assert find_targets(open_checkpoint(tmp_path))[0][0].shape == (2, 2)


# --- properties ---------------------------------------------------------------------------------------------------

sides = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.5, None, "2", True]))
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "", 3]), st.text(max_size=3)),
        "shape": st.one_of(st.lists(sides, max_size=4), sides),
        "data_offsets": st.lists(sides, max_size=3),
    }
)
headers = st.dictionaries(st.text(max_size=12), st.one_of(entries, sides, st.lists(sides, max_size=2)), max_size=4)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(header=headers, body=st.binary(max_size=64))
def test_any_header_opens_or_is_refused(header: dict[str, Any], body: bytes, tmp_path_factory: Any) -> None:
    words = outcome(written(tmp_path_factory.getbasetemp() / "any.safetensors", header, body))
    assert words.isprintable() and len(words) < LONGEST_MESSAGE + 50


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    double=st.booleans(),
    name=st.text(min_size=1, max_size=9),
)
def test_what_safetensors_writes_is_read_back(shape: list[int], double: bool, name: str, tmp_path_factory: Any) -> None:
    """The checks refuse no honest file: the names that torch gives its modules are printable."""
    if not name.isprintable() or name == "__metadata__":
        name = "layer.weight"
    tensor = torch.ones(shape, dtype=torch.float64 if double else torch.float16)
    path = tmp_path_factory.getbasetemp() / "honest.safetensors"
    save_file({name: tensor}, path)
    assert torch.equal(TensorFile.open(path).tensor(name), tensor)
