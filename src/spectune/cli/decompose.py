"""`spectune decompose`: store the bases of a whole checkpoint, so that training starts without an SVD."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import OptionError, WeightError, nearest

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint, Target
    from ..spectrum import BasisCache, Done, Request

FLOATS = ("float32", "bfloat16", "float16")


def decompose(
    model: Annotated[str, typer.Argument(help="Model folder, safetensors or GGUF file, or hub name.")],
    r: Annotated[int, typer.Option("--r", help="Directions to store; any smaller r can use them.")] = 64,
    columns: Annotated[str, typer.Option(help="Which directions: top or bottom.")] = "top",
    include: Annotated[
        str | None, typer.Option(help="Regex of the weights; default: all but embeddings, heads.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Regex of weights to leave out.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest angle to the true subspace, in radians.")] = 1e-4,
    dtype: Annotated[str | None, typer.Option(help=f"Dtype the model will be loaded in: {', '.join(FLOATS)}.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help='Limit for weights and working memory, such as "2GiB".')
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to fill; default: SPECTUNE_CACHE, or ~/.cache/spectune/bases.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable results.")] = False,
) -> None:
    """Compute and store the singular directions of a whole checkpoint, shard by shard. Can be stopped and resumed."""
    import torch

    from ..checkpoint import find_base, find_targets
    from ..spectrum import BasisCache, Request, default_folder, parse_bytes

    if dtype is not None and dtype not in FLOATS:
        raise OptionError(f"--dtype {dtype!r} does not exist. {nearest(dtype, FLOATS)}")
    if columns not in ("top", "bottom"):
        raise OptionError(f"--columns {columns!r}: must be top or bottom. A list of columns uses what top stores.")
    checkpoint = find_base(model).checkpoint
    targets, left_out = find_targets(checkpoint, include, exclude)
    store = BasisCache(cache or default_folder())
    asked = Request(r, columns, tolerance=tolerance)
    limit = None if max_memory is None else parse_bytes(max_memory)
    rounded = None if dtype is None else getattr(torch, dtype)
    found = _run(checkpoint, targets, asked, store, rounded, limit, quiet=as_json)
    _report(found, store, left_out, as_json)


def _run(
    checkpoint: Checkpoint,
    targets: list[Target],
    request: Request,
    store: BasisCache,
    dtype: object,
    limit: int | None,
    quiet: bool,
) -> tuple[list[Done], float]:
    from ..spectrum import fill_cache
    from .progress import Bytes
    from .terminal import Console

    total = sum(_bytes(checkpoint, target) for target in targets)
    started, done = time.perf_counter(), []
    with Bytes(Console(stderr=True, quiet=quiet)) as bar:
        on_bytes = bar.begin("decomposing", total)
        for small, part in _by_rank(targets, request):
            for one in fill_cache(checkpoint, part, small, store, dtype=dtype, max_memory=limit):  # type: ignore[arg-type]
                done.append(one)
                on_bytes(one.bytes_read, one.name)
    return done, time.perf_counter() - started


def _by_rank(targets: list[Target], request: Request) -> list[tuple[Request, list[Target]]]:
    """Get the targets with their requests: r directions, or all of a weight that has no more than r."""
    from dataclasses import replace

    wide = [target for target in targets if min(target.shape) > (request.rank or 0)]
    narrow = [target for target in targets if min(target.shape) <= (request.rank or 0)]
    parts = [(request, wide), (replace(request, rank=None), narrow)]
    return [(asked, part) for asked, part in parts if part]


def _bytes(checkpoint: Checkpoint, target: Target) -> int:
    return target.shape[0] * target.shape[1] * checkpoint.dtypes[target.tensor].itemsize


def _report(found: tuple[list[Done], float], store: BasisCache, left_out: dict[str, int], as_json: bool) -> None:
    from .terminal import say

    done, seconds = found
    missing = [one for one in done if one.left_out]
    solved = sum(not one.cached and not one.left_out for one in done)
    size = sum(one.bytes_read for one in done)
    if as_json:
        figures = {
            "cache": str(store.folder),
            "solved": solved,
            "found": sum(one.cached for one in done),
            "not_converged": [one.name for one in missing],
            "skipped": left_out,
            "bytes_read": size,
            "seconds": seconds,
        }
        print(json.dumps(figures, indent=2))
    else:
        rate = f"{size / 2**30:.2f} GiB in {seconds:.1f} s"
        say(f"{solved} weights decomposed, {sum(one.cached for one in done)} already stored ({rate})")
        say("".join(f"left out: {count} ({reason})\n" for reason, count in left_out.items()), end="")
        say(f"stored in {store.folder}")
    if missing:
        raise WeightError(f"{missing[0].name}: {missing[0].left_out}, and so for {len(missing)} weights. Raise it.")
