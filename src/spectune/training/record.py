"""`Record`: what is written as JSON and read back. The one codec of configurations' results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ..checkpoint import write_atomically
from ..errors import DataError


def _whole(value: Any) -> Any:
    """Half a surrogate pair, which JSON and YAML files can hold, is not text: it becomes its number in words."""
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_whole)]
"""Words that may come out of anybody's files."""
Plain = Annotated[dict[str, Any], BeforeValidator(_whole)]
"""A configuration as YAML holds it."""
_RecordT = TypeVar("_RecordT", bound="Record")


class Record(BaseModel):
    """Plain numbers and words: frozen, every key known, NaN and infinity as words, which every JSON reader takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings", protected_namespaces=())

    def to_json(self) -> str:
        """Get the record as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the record, whole or not at all."""
        write_atomically(path, self.to_json())

    @classmethod
    def read_file(cls: type[_RecordT], path: str | Path, remedy: str) -> _RecordT:
        """Get the record of a file; `DataError` names the first thing that is wrong, and ends with `remedy`."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: the file cannot be read: {error.strerror}. {remedy}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"{path}: this is not a {cls.__name__}: {place}: {first['msg'].lower()}. {remedy}"
            ) from None
