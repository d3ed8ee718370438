"""What is fuzzed: for each door a seed corpus, a mutation that keeps inputs near the format, and what may come out.

A target takes bytes and must return, or raise a `SpectuneError`. Everything else (another exception, a message that is
no single line, more time or memory than the limits below) is a finding.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import torch
from dataset_targets import dataset_targets
from live_targets import live_targets
from target import PLACE, Target, folder, header_of, spectral_config, tensor_bytes

from spectune.adapter.saved import saved_method, saved_modules
from spectune.checkpoint import open_checkpoint, read_adapter_folder, read_lora
from spectune.checkpoint.gguf_file import GgufFile
from spectune.checkpoint.gguf_header import check_gguf_header
from spectune.checkpoint.reader import read_json
from spectune.checkpoint.tensor_file import TensorFile
from spectune.errors import SpectuneError
from spectune.fusion.adapters import open_adapters
from spectune.records import Weight
from spectune.spectrum import BasisCache, Key, Request, decompose
from spectune.spectrum.entry import entry_name

# --- one file of tensors ----------------------------------------------------------------------------------------

SMALL = tensor_bytes(
    {"a.weight": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(2, dtype=torch.bfloat16)}, {"k": "v"}
)


def tensor_file(data: bytes) -> None:
    path = PLACE / "one.safetensors"
    path.write_bytes(data)
    file = TensorFile.open(path)
    for name in file.names[:20]:
        file.tensor(name)


def with_header(data: bytes) -> None:
    """The same, the input being the JSON of the header: mutations then reach what stands behind the length."""
    tensor_file(struct.pack("<Q", len(data)) + data + b"\0" * 64)


HEADERS = (
    b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}',
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]}}',
    b'{"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
)


# --- JSON: configs and indexes ----------------------------------------------------------------------------------


def json_file(data: bytes) -> None:
    path = PLACE / "some.json"
    path.write_bytes(data)
    read_json(path, 2**20)


def index_file(data: bytes) -> None:
    place = folder("shards", **{"a__safetensors": SMALL, "model.safetensors.index.json": data})
    checkpoint = open_checkpoint(place)
    for name in checkpoint.names[:5]:
        checkpoint.tensor(name)


INDEXES = (
    b'{"metadata":{"total_size":28},"weight_map":{"a.weight":"a.safetensors","b":"a.safetensors"}}',
    b'{"weight_map":{"a.weight":"../a.safetensors"}}',
    b'{"weight_map":{"c":"/etc/passwd","b":"a.safetensors\\u0000"}}',
)


# --- adapters ---------------------------------------------------------------------------------------------------

W_OI = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
BASE = folder("base", model__safetensors=tensor_bytes({"layer.weight": W_OI}))
SPECTRUM = decompose(Weight("layer", W_OI), 2)


STEM = "base_model.model.layer.spectune_adapter."
SPECTRAL_TENSORS = tensor_bytes(
    {f"{STEM}A_U": torch.ones(6, 2), f"{STEM}A_Vh": torch.ones(2, 5)}
    | {f"{STEM}{name}": getattr(SPECTRUM, name).contiguous() for name in ("U_OR", "S_R", "Vh_RI")}
)


def use_spectral(place: Path) -> None:
    """Read an adapter as merging, inspecting and fusing do."""
    saved = read_adapter_folder(place).require("SPECTUNE")
    for _, _, _, module in saved_modules(saved, open_checkpoint(BASE)):
        module.delta()
    (adapter,) = open_adapters([place])
    list(adapter.parts(None))


def spectral_config_file(data: bytes) -> None:
    use_spectral(folder("spectral-config", adapter_config__json=data, adapter_model__safetensors=SPECTRAL_TENSORS))


def spectral_tensor_header(data: bytes) -> None:
    content = (
        struct.pack("<Q", len(data)) + data + SPECTRAL_TENSORS[8 + int.from_bytes(SPECTRAL_TENSORS[:8], "little") :]
    )
    place = folder("spectral-header", adapter_config__json=spectral_config(), adapter_model__safetensors=content)
    use_spectral(place)


def spectral_tensor_file(data: bytes) -> None:
    use_spectral(folder("spectral-file", adapter_config__json=spectral_config(), adapter_model__safetensors=data))


SPECTRAL_CONFIGS = (
    spectral_config(),
    spectral_config(columns=[0, 1], rank_pattern={"layer": 2}, svd={"solver": "exact", "seed": 0, "tolerance": 1e-4}),
    spectral_config(method="svft", basis_rank=2, pattern="banded", off_diagonals=1),
    spectral_config(method="lidb", basis_seed=7, output_width=3, input_width=4),
    spectral_config(method="specadapt", basis_rank=2, shared_core=True, weight_dropout=0.5),
    spectral_config(format_version=2, columns="random"),
)


def method_config(data: bytes) -> None:
    """The config alone, for speed: every method is built from it, and says what it trains."""
    path = PLACE / "method.json"
    path.write_bytes(data)
    method = saved_method(read_json(path, 2**20), "model.layers.0.self_attn.q_proj")
    method.basis(6, 5), method.trained_shapes(6, 5)


# --- LoRA -------------------------------------------------------------------------------------------------------

LORA = tensor_bytes(
    {"base_model.model.layer.lora_A.weight": torch.ones(2, 5), "base_model.model.layer.lora_B.weight": torch.ones(6, 2)}
)
KOHYA = tensor_bytes(
    {
        "lora_unet_x.lora_down.weight": torch.ones(2, 5),
        "lora_unet_x.lora_up.weight": torch.ones(6, 2),
        "lora_unet_x.alpha": torch.tensor(4.0),
    }
)
LORA_CONFIGS = (
    b'{"peft_type":"LORA","r":2,"lora_alpha":4,"bias":"none"}',
    b'{"peft_type":"LORA","r":2,"lora_alpha":4,"use_rslora":true,"alpha_pattern":{"layer":8,"(a|aa)+[bc]":1},"rank_pattern":{}}',
    b'{"peft_type":"LORA","lora_alpha":1e999,"init_lora_weights":"pissa","target_parameters":[],"use_dora":true}',
)


def lora_config_file(data: bytes) -> None:
    place = folder("lora-config", adapter_config__json=data, adapter_model__safetensors=LORA)
    lora = read_lora(place)
    for name in lora.layers:
        lora.delta(name)


def lora_file(data: bytes) -> None:
    path = PLACE / "lora.safetensors"
    path.write_bytes(data)
    lora = read_lora(path)
    for name in list(lora.layers)[:5]:
        lora.delta(name)


def lora_header(data: bytes) -> None:
    body = KOHYA[8 + int.from_bytes(KOHYA[:8], "little") :]
    lora_file(struct.pack("<Q", len(data)) + data + body)


# --- the cache of bases -----------------------------------------------------------------------------------------

KEY, REQUEST = Key.of(Weight("layer", W_OI)), Request(2)


def entry_bytes() -> bytes:
    cache = BasisCache(PLACE / "cache", limit=2**30)
    cache.store(KEY, SPECTRUM, REQUEST)
    return next((PLACE / "cache").glob("??/*.safetensors")).read_bytes()


ENTRY = entry_bytes()
ENTRY_PATH = PLACE / "cache" / KEY.identity[:2] / entry_name(KEY, SPECTRUM, REQUEST)


def cache_entry(data: bytes) -> None:
    """A damaged entry is a miss, so here not even a `SpectuneError` may come out."""
    ENTRY_PATH.write_bytes(data)
    cache = BasisCache(PLACE / "cache", writes=False, limit=2**30)
    found = cache.find(KEY, REQUEST)
    if found is not None:
        left = W_OI @ found.Vh_RI.mT - found.U_OR * found.S_R
        assert float(left.abs().max()) < 0.5, "a foreign basis was served"
    list(cache.entries())


def cache_header(data: bytes) -> None:
    cache_entry(struct.pack("<Q", len(data)) + data + ENTRY[8 + int.from_bytes(ENTRY[:8], "little") :])


# --- GGUF -------------------------------------------------------------------------------------------------------


def gguf_bytes() -> bytes:
    import gguf
    import numpy as np

    path = PLACE / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    writer.add_token_list(["a", "b", "c", "d"])
    writer.add_token_scores([0.0, 1.0, 2.0, 3.0])
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_header(data: bytes) -> None:
    path = PLACE / "header.gguf"
    path.write_bytes(data)
    check_gguf_header(path)


def gguf_file(data: bytes) -> None:
    path = PLACE / "whole.gguf"
    path.write_bytes(data)
    file = GgufFile.open(path)
    for name in file.shapes:
        file.tensor(name)


# --- run files --------------------------------------------------------------------------------------------------

RUN_FILE = b"""recipe: text_classification
model: some/model
seed: 0
adapter: {method: spectral_a, r: 8, target_modules: [query, value]}
data: {train: train.csv, text: text, label: label}
training: {steps: 10, batch_size: 4, learning_rate: 1e-3}
"""


def yaml_file(data: bytes) -> None:
    from spectune.training.config import RunConfig, validate
    from spectune.training.yaml_file import read_yaml

    path = PLACE / "run.yaml"
    path.write_bytes(data)
    config = validate(RunConfig, read_yaml(path), str(path))
    config.plain()


def all_targets() -> dict[str, Target]:
    targets = [
        Target("tensor_file", tensor_file, (SMALL,)),
        Target("tensor_header", with_header, HEADERS),
        Target("json_file", json_file, (*INDEXES, *LORA_CONFIGS)),
        Target("index_file", index_file, INDEXES),
        Target("method_config", method_config, SPECTRAL_CONFIGS),
        Target("spectral_config", spectral_config_file, SPECTRAL_CONFIGS),
        Target("spectral_header", spectral_tensor_header, (header_of(SPECTRAL_TENSORS),)),
        Target("spectral_file", spectral_tensor_file, (SPECTRAL_TENSORS,)),
        Target("lora_config", lora_config_file, LORA_CONFIGS),
        Target("lora_header", lora_header, (header_of(KOHYA), header_of(LORA))),
        Target("lora_file", lora_file, (KOHYA, LORA)),
        Target("cache_header", cache_header, (header_of(ENTRY),)),
        Target("cache_entry", cache_entry, (ENTRY,)),
        Target("yaml_file", yaml_file, (RUN_FILE,)),
    ]
    seed = gguf_bytes()
    # transformers builds a model class for each whole GGUF file, on a machine that does other things.
    targets += [Target("gguf_header", gguf_header, (seed,)), Target("gguf_file", gguf_file, (seed,), seconds=20.0)]
    targets += [*dataset_targets(), *live_targets()]
    return {target.name: target for target in targets}


def judge(target: Target, data: bytes) -> None:
    """Run one input; anything but a return or one clear `SpectuneError` goes through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.run(data)
    except SpectuneError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) <= 2_100, f"no clear line: {line[:200]!r}"
