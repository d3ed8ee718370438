"""What other tools call an option of ours, for the hint at the end of an error."""

from __future__ import annotations

# Their word -> ours, in the order in which they are proposed; only those that exist where the word was used count.
# From the options of transformers' TrainingArguments, trl, axolotl and LLaMA-Factory, and the module names of
# transformers' models.
OUR_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r"), ("r",)),
    **dict.fromkeys(("lr", "learningrate"), ("learning_rate",)),
    **dict.fromkeys(("max_length", "max_seq_length", "cutoff_len", "sequence_len"), ("max_tokens",)),
    **dict.fromkeys(("bf16", "fp16", "tf32"), ("precision",)),
    **dict.fromkeys(("model_name_or_path", "base_model", "model_id", "checkpoint"), ("model",)),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bits"), ("quantization",)),
    **dict.fromkeys(("dataset", "datasets", "path", "file", "train_file", "data_files"), ("train", "data")),
    **dict.fromkeys(("dataset_name", "hub_dataset"), ("hub",)),
    **dict.fromkeys(("lora_target_modules", "lora_target", "targets", "modules"), ("target_modules",)),
    **dict.fromkeys(("gradient_accumulation_steps", "micro_batch_size"), ("gradient_accumulation", "batch_size")),
    **dict.fromkeys(("train_batch_size", "per_device_train_batch_size"), ("batch_size",)),
    **dict.fromkeys(("num_epochs", "num_train_epochs"), ("epochs",)),
    **dict.fromkeys(("max_steps", "num_steps", "num_train_steps"), ("steps",)),
    **dict.fromkeys(("save_steps", "eval_steps"), ("save_every", "validate_every")),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), ("warmup",)),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler"), ("schedule",)),
    **dict.fromkeys(("optim", "optimiser"), ("optimizer",)),
    **dict.fromkeys(("sft", "llm", "text_generation", "instruction"), ("causal_lm",)),
    **dict.fromkeys(("text-classification", "classification", "sequence_classification"), ("text_classification",)),
}
# Module names with one meaning: a query of BERT is a q_proj of Llama.
FUSED = ("query_key_value", "qkv_proj", "qkv", "c_attn", "Wqkv")
PLACES = (
    ("q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj", *FUSED),
    ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj", *FUSED),
    ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj", *FUSED),
    ("o_proj", "out_proj", "out_lin", "to_out", "wo", "c_proj", "Wo", "dense"),
    ("up_proj", "fc1", "lin1", "wi", "w3", "c_fc", "dense_h_to_4h", "gate_up_proj", "Wi", "intermediate.dense"),
    ("down_proj", "fc2", "lin2", "w2", "dense_4h_to_h", "c_proj", "output.dense"),
)
# Words for which there is nothing of ours, and why.
ADVICE = {
    **dict.fromkeys(
        ("lora_alpha", "alpha", "scaling"),
        "Spectral methods have no alpha: the singular values set the scale. Leave it out, and set learning_rate.",
    ),
    "lora_dropout": "Leave it out; of the spectral methods only specadapt has a dropout: weight_dropout.",
    **dict.fromkeys(
        ("output_dir", "output"), "The folder stands on the command line: spectune train RUN.yaml -o FOLDER."
    ),
    **dict.fromkeys(("lora", "LORA"), "For a LoRA write peft_type: LORA in place of method."),
}


def in_our_words(asked: str, known: list[str] | tuple[str, ...]) -> list[str]:
    """Get what exists here of what a word of other tools means."""
    meant = list(OUR_WORDS.get(asked.lower(), ()))
    meant += [name for names in PLACES if asked in names for name in names if name != asked]
    return [name for name in dict.fromkeys(meant) if name in known]
