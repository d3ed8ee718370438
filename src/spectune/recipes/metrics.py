"""Metrics of classes and of scores, by name, from scikit-learn and scipy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError, MissingExtraError, nearest

# Metrics that are better when smaller, also as a part of lm-eval's names (word_perplexity, bits_per_byte).
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


def better_is_smaller(metric: str) -> bool:
    """Ask whether a metric is better when smaller."""
    return metric.rpartition("/")[2].split(",")[0].endswith(SMALLER_IS_BETTER)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise MissingExtraError("metrics: they need scikit-learn. Run: pip install 'spectune[train]'") from None
    return metrics


def accuracy(found: Sequence[Any], right: Sequence[Any]) -> float:
    """Get the share of right answers."""
    return sum(f == r for f, r in zip(found, right, strict=True)) / len(right)


def _f1(found: Sequence[Any], right: Sequence[Any]) -> float:
    """F1 of class 1, as GLUE scores MRPC and QQP; only for two classes."""
    if (set(found) | set(right)) - {0, 1}:
        raise DataError("metric 'f1': is only for two classes, but there are more. Use macro_f1.")
    return float(_sklearn().f1_score(right, found, zero_division=0.0))


def _macro_f1(found: Sequence[Any], right: Sequence[Any]) -> float:
    return float(_sklearn().f1_score(right, found, average="macro", zero_division=0.0))


def _matthews(found: Sequence[Any], right: Sequence[Any]) -> float:
    return float(_sklearn().matthews_corrcoef(right, found))


def _correlation(name: str, found: Sequence[Any], right: Sequence[Any]) -> float:
    _sklearn()
    from scipy import stats

    if len(set(found)) < 2 or len(set(right)) < 2:
        return 0.0  # for a constant, scipy would warn and return NaN
    return float(getattr(stats, name)(found, right).statistic)


def _pearson(found: Sequence[Any], right: Sequence[Any]) -> float:
    return _correlation("pearsonr", found, right)


def _spearman(found: Sequence[Any], right: Sequence[Any]) -> float:
    return _correlation("spearmanr", found, right)


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "accuracy": accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
FOR_SCORES = ("pearson", "spearman")


def try_metrics(names: Sequence[str], right: Sequence[Any], classes: int | None) -> None:
    """Compute each metric on the right answers, to check that it works; `classes` is None for scores."""
    if "f1" in names and classes is not None and classes != 2:
        raise DataError(f"evaluation.metrics: 'f1' is only for two classes, but the data have {classes}. Use macro_f1.")
    measure(names, right, right)


def measure(names: Sequence[str], found: Sequence[Any], right: Sequence[Any]) -> dict[str, float]:
    """Get each named metric of the answers against the right ones; class indices, or scores."""
    for name in names:
        if name not in METRICS:
            raise DataError(f"metric {name!r} does not exist. {nearest(name, list(METRICS))}")
    return {name: METRICS[name](found, right) for name in names}


def confused(found: Sequence[int], right: Sequence[int], classes: int) -> list[list[int]]:
    """Get how many examples of each class, a row, were taken for which class."""
    counts = [[0] * classes for _ in range(classes)]
    for answer, truth in zip(found, right, strict=True):
        counts[truth][answer] += 1
    return counts
