"""PEFT's name of the method: a new member of its closed enum."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

# "spectral_" occurs in base models (spectral_norm layers), "spectune_" does not, and PEFT finds an
# adapter's tensors by this prefix.
METHOD = "spectune"


def extend_peft_type() -> PeftType:
    """Get the PeftType member of this method, adding it to PEFT's closed enum if need be."""
    name = METHOD.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        # Since Python 3.12 members are attributes of their class; before, they are looked up in the first table.
        setattr(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
    return PeftType[name]


PEFT_TYPE = extend_peft_type()
