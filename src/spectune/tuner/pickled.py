"""Refuses to save an adapter as a pickle: `save_pretrained(safe_serialization=False)`."""

from __future__ import annotations

import sys
from types import FrameType

from peft import PeftModel

from ..errors import OptionError


def refuse_pickling() -> None:
    """Raise `OptionError` when PEFT is about to pickle the tensors that it asks for.

    PEFT tells no tuner how its tensors will be written, so this looks at the call that is running. Nobody else is
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
        frame = frame.f_back
