"""Refuses files that nobody could read back: pickles, and diffusers' file of a LoRA."""

from __future__ import annotations

import sys
from types import FrameType

from peft import PeftModel

from ..errors import OptionError


def refuse_other_files() -> None:
    """Raise `OptionError` when PEFT is about to pickle the tensors that it asks for, or diffusers to call them a LoRA.

    They tell no tuner how its tensors will be written, so this looks at the call that is running. Nobody else is
    concerned: what users do with a state dict is their own affair.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is PeftModel.save_pretrained.__code__:
            if not frame.f_locals["safe_serialization"]:
                raise OptionError(
                    "save_pretrained(safe_serialization=False): reading a pickle runs code that it contains, so "
                    "spectune neither writes nor reads one. Leave safe_serialization out."
                )
            return
        if frame.f_code.co_name == "save_lora_adapter" and "diffusers" in frame.f_globals["__name__"]:
            raise OptionError(
                "save_lora_adapter writes the file of a LoRA, which this adapter is not. Write an exact LoRA with "
                "spectune.export_lora(model, OUT, diffusers=PART), or save a PeftModel."
            )
        frame = frame.f_back
