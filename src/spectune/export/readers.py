"""What servers do with a LoRA folder, by their own rules: `refusals`, `vllm_rank`.

Read in their sources: vLLM (vllm/lora/peft_helper.py, lora_model.py, utils.py, vllm/config/lora.py), SGLang
(python/sglang/srt/lora/lora.py, lora_config.py), llama.cpp (convert_lora_to_gguf.py, src/llama-adapter.h).
"""

from __future__ import annotations

from ..checkpoint import PEFT_PREFIX, AdapterFolder

# The only values that vLLM's --max-lora-rank takes (vllm/config/lora.py, MaxLoRARanks), and its default.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
VLLM, SGLANG, LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
FACTORS = (".lora_A.weight", ".lora_B.weight")
# Tasks for which llama.cpp has no model: its adapters are of language models.
NOT_GENERATING = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")


def vllm_rank(rank: int) -> int | None:
    """Get the value for vLLM's --max-lora-rank; None if the rank is larger than vLLM serves."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def refusals(folder: AdapterFolder) -> dict[str, str]:
    """Get reader -> why it would refuse this LoRA, or give other outputs than PEFT."""
    checks = {VLLM: _vllm(folder), SGLANG: _sglang(folder), LLAMA_CPP: _llama_cpp(folder)}
    return {reader: why for reader, why in checks.items() if why}


def _vllm(folder: AdapterFolder) -> str | None:
    """PEFTHelper takes no modules_to_save; scaling is lora_alpha / r of the config, one for all layers."""
    if whole := _trained_in_full(folder):
        return f"{whole[0]} was trained in full"
    if vllm_rank(max(_ranks(folder))) is None:
        return f"rank {max(_ranks(folder))} is more than it serves ({VLLM_RANKS[-1]})"
    return _one_scaling(folder)


def _sglang(folder: AdapterFolder) -> str | None:
    """LoRAAdapter.scaling is lora_alpha / r of the config; the factors of q, k, v are stacked, r rows each.

    A head or an embedding that was trained in full is left out silently (0.5.23, LoRAAdapter._process_weight).
    """
    if whole := _trained_in_full(folder):
        return f"{whole[0]} was trained in full"
    if isinstance(folder.config.get("target_modules"), str):
        return "target_modules is a regex, and it reads a list"
    return _mixed(folder) or _one_scaling(folder)


def _llama_cpp(folder: AdapterFolder) -> str | None:
    """The converter stops at any tensor that is no factor; the scale of a tensor is the file's alpha / its own rank."""
    if whole := _trained_in_full(folder):
        return f"{whole[0]} was trained in full"
    if folder.config.get("fan_in_fan_out"):
        return "its converter turns the layers of GPT-2 (Conv1D) around once more"
    if (task := folder.config.get("task_type")) in NOT_GENERATING:
        return f"it reads adapters of causal language models only ({task})"
    return _mixed(folder)


def _trained_in_full(folder: AdapterFolder) -> list[str]:
    whole = [name.removeprefix(PEFT_PREFIX) for name in folder.names if not name.endswith(FACTORS)]
    return [name.rpartition(".")[0] for name in whole] or list(folder.config.get("modules_to_save") or [])


def _ranks(folder: AdapterFolder) -> set[int]:
    return {shape[0] for name, shape in folder.shapes.items() if name.endswith(FACTORS[0])}


def _mixed(folder: AdapterFolder) -> str | None:
    ranks = _ranks(folder)
    return f"ranks {min(ranks)} to {max(ranks)} in one file; export without --no-pad" if len(ranks) > 1 else None


def _one_scaling(folder: AdapterFolder) -> str | None:
    """Servers that read one rank for the file reserve that much room: a layer of a larger one does not fit."""
    largest, r = max(_ranks(folder)), folder.config.get("r")
    return f"a layer has rank {largest}, the config says r={r}; export without --no-pad" if largest != r else None
