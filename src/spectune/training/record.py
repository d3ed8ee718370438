"""`Record`: results as JSON, written and read back. Their one codec."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ..checkpoint import write_atomically
from ..errors import DataError


def _whole(value: Any) -> Any:
    """Replace half a surrogate pair, which JSON and YAML files can contain, by its escape."""
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_whole)]
"""Text that may come from anybody's files."""
Plain = Annotated[dict[str, Any], BeforeValidator(_whole)]
"""A configuration as plain values."""
_RecordT = TypeVar("_RecordT", bound="Record")


class Record(BaseModel):
    """Plain numbers and text: frozen, unknown keys are errors, NaN and infinity are strings, valid in any JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings", protected_namespaces=())

    def to_json(self) -> str:
        """Get the record as JSON text."""
        return self.model_dump_json(indent=1) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the whole record or nothing."""
        write_atomically(path, self.to_json())

    @classmethod
    def read_file(cls: type[_RecordT], path: str | Path, remedy: str) -> _RecordT:
        """Get the record in a file; `DataError` names the first mistake, and ends with `remedy`."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(f"{path}: cannot read the file: {error.strerror}. {remedy}") from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"{path}: this is not a {cls.__name__}: {place}: {first['msg'].lower()}. {remedy}"
            ) from None
