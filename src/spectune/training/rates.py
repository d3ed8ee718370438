"""Learning rates that are known to work, by method, and a warning for a rate far outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..methods import METHODS, build_method
from .config import HEAD, NO_ADAPTER, RunConfig
from .muon import MUON

# More than ten times outside, runs learn nothing or diverge. Chosen.
FAR = 10.0
# A new head's default rate: SVFT (arXiv 2405.19597), table 14, every method on vision; its GLUE runs used 6e-3
# (table 11).
HEAD_RATE = 4e-3


@dataclass(frozen=True)
class KnownRates:
    """The lowest and highest peak rates of published or measured runs with AdamW, and the usual one."""

    low: float
    high: float
    source: str
    usual: float | None = None
    """None for the methods of METHODS, which have their own default."""


SVFT = "SVFT, arXiv 2405.19597"
SPECTRAL = "Spectral Adapter, arXiv 2405.13952"
BENCH = "PEFT's method_comparison (MetaMathQA, Llama-3.2-3B)"
# Models of up to 23 million parameters, a hundred steps: larger models and longer runs need the lower end.
SMALL = "small models, benchmarks/results/rates.json"
KNOWN: dict[str, KnownRates] = {
    "spectral_a": KnownRates(1e-5, 1e-2, f"{SPECTRAL}: 1e-5 (Llama-3-8B) to 7e-4 (MRPC); {SMALL}"),
    "spectral_r": KnownRates(1e-4, 1e-1, f"{SPECTRAL}: 1e-4 (text encoder) to 5e-2 (UNet); {SMALL}"),
    "svft": KnownRates(1e-3, 1e-1, f"{SVFT}: 1e-3 (random, LLaMA-3) to 8e-2 (plain, CoLA); {SMALL}"),
    "specadapt": KnownRates(3e-4, 1e-2, f"SpecAdapt's official trainer: 3e-3, all of VTAB-1k; {SMALL}"),
    "one_sided": KnownRates(1e-4, 1e-2, "as LoRA, one of whose factors it trains; chosen, not measured"),
    "svdiff": KnownRates(1e-4, 1e-1, f"{SPECTRAL}: its SVDiff runs, 1e-4 and 1e-3; {SMALL}"),
    "lidb": KnownRates(1e-4, 1e-2, f"{SPECTRAL}: its LiDB runs, 1e-4 and 5e-4; {SMALL}"),
    "orthogonal_adaptation": KnownRates(1e-5, 1e-2, f"{SPECTRAL}: as its LoRA runs, 1e-5 and 1e-4; {SMALL}"),
    "LORA": KnownRates(1e-5, 1e-2, f"{SPECTRAL}: 1e-5 to 2e-4; {SVFT}: 4e-3; {SMALL}", 2e-4),
    "ADALORA": KnownRates(5e-4, 2.2e-3, f"{SPECTRAL}: GLUE", 1e-3),
    "OFT": KnownRates(8e-5, 9e-4, f"{SPECTRAL}: GLUE", 2e-4),
    "BOFT": KnownRates(1e-4, 4e-3, f"{SVFT}: 4e-3 (vision); {BENCH}: 1e-4", 1e-3),
    "VERA": KnownRates(2e-2, 7e-2, f"{SVFT}: vision", 2e-2),
    "IA3": KnownRates(1e-4, 5e-3, f"{BENCH}: 1e-4 scored 31.1, 5e-3 scored 45.5", 5e-3),
    "LOKR": KnownRates(1e-4, 3e-3, BENCH, 3e-3),
    "HIRA": KnownRates(1e-4, 4.5e-3, BENCH, 4.5e-3),
    # One seed, a dense core of 78: test accuracy 74.1% at 0.005, 76.2% at 0.02, 68.8% at 0.08.
    MUON: KnownRates(5e-3, 8e-2, "the demo's task, 100 steps: 0.005, 0.02 and 0.08 were tried, 0.02 was best", 0.02),
    "none": KnownRates(1e-5, 8e-5, f"full fine-tuning: {SPECTRAL}: 1e-5; {SVFT}: 4e-5 and 8e-5 (ViT-B)", 2e-5),
}


def method_of(config: RunConfig) -> str:
    """Get how a run tunes, in one word: one of METHODS, one of PEFT's types, none or head."""
    if isinstance(config.adapter, str):
        return config.adapter
    options = config.adapter_options or {}
    return str(options.get("method") or str(options.get("peft_type", "")).upper())


def learning_rate(config: RunConfig) -> float:
    """Get the run's peak rate: its own, else the method's default; `OptionError` if there is none."""
    if config.adapter == HEAD:
        return head_learning_rate(config)
    asked = config.training.learning_rate
    if asked is not None:
        return asked
    return usual_rate(tuned_by(config), "training.learning_rate", config.adapter_options)


def tuned_by(config: RunConfig) -> str:
    """Get the word whose rates are known: the optimizer where its rates are the same for every method (muon)."""
    method = method_of(config)
    return MUON if config.training.optimizer == MUON and method in METHODS else method


def usual_rate(method: str, where: str, options: Mapping[str, Any] | None = None) -> float:
    """Get the default rate of a method with these options; `OptionError`, beginning with `where`, if it has none."""
    if method in METHODS:
        known = METHODS[method].options()
        given = {name: value for name, value in (options or {}).items() if name in known and value is not None}
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return build_method(method, given).usual_rate()
    usual = KNOWN[method].usual if method in KNOWN else None
    if usual is None:
        raise OptionError(f"{where}: {method} has no default rate. Give one; `spectune lr` proposes a value.")
    return usual


def choice(config: RunConfig) -> str | None:
    """Get a line about the default rate of a run where the adapter's options decide it, else None."""
    method = method_of(config)
    if config.training.learning_rate is not None or config.training.optimizer == MUON or method not in METHODS:
        return None
    rate, first = learning_rate(config), METHODS[method].learning_rate
    if rate == first:
        return None
    return f"learning rate {rate:.3g}: the default for these options of {method} ({first:g} for others)"


def head_learning_rate(config: RunConfig) -> float:
    """Get the rate of a new head: the run's own; in full fine-tuning the model's; else the usual one."""
    asked = config.training.head_learning_rate
    if asked is not None:
        return asked
    return learning_rate(config) if config.adapter == NO_ADAPTER else config.usual_head_rate or HEAD_RATE


def advice(method: str, rate: float) -> str | None:
    """Get a warning if a rate is more than ten times outside the range that is known to work, else None."""
    known = KNOWN.get(method)
    if known is None or known.low / FAR <= rate <= known.high * FAR:
        return None
    side = "below" if rate < known.low else "above"
    times = known.low / rate if rate < known.low else rate / known.high
    span = f"{known.low:g} to {known.high:g}" if known.low != known.high else f"{known.low:g}"
    return (
        f"learning rate {rate:g} is {times:.0f} times {side} the rates known to work for {method} ({span}; "
        f"{known.source}). Leave it out for the default, or find one with `spectune lr`."
    )


def within_known(method: str, rate: float | None) -> float | None:
    """Get the rate, or the nearest one that is known to work for the method."""
    known = KNOWN.get(method)
    return rate if rate is None or known is None else min(max(rate, known.low), known.high)


def said(config: RunConfig) -> dict[str, Any]:
    """Get the rates of a run and the range that is known to work, for `check`."""
    method, rate = tuned_by(config), learning_rate(config)
    known = KNOWN.get(method)
    return {
        "learning_rate": rate,
        "head_learning_rate": head_learning_rate(config),
        "known": None if known is None else [known.low, known.high],
        "source": None if known is None else known.source,
        "choice": choice(config),
        "advice": advice(method, rate),
    }
