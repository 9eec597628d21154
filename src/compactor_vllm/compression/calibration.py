"""Context-calibrated compression: the smallest retention that keeps a wanted quality, inferred from the context.

Quality of a retention r is g = NLL of the true answer with the full cache / NLL with the compressed one, modelled as

    f(r) = (exp(b (r - 1)) - exp(-b)) / (1 - exp(-b)),    b = alpha · NLL(context) + beta,

so f(1) = 1 and f(0) = 0 (Chari and Van Durme, arXiv 2507.08143, section on context-calibrated compression). alpha and
beta belong to one model and one method. NLL(context) is the model's own mean negative log-likelihood of tokens of a
window of the context, see `probe_window`. A leaf besides numpy: no tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from compactor_vllm.compression.common import BaseCompressionMethod
from compactor_vllm.errors import InvalidInputError, NoCalibrationError
from compactor_vllm.utils.builtin import cache_dir

PROBE_SHARE, PROBE_LEAST, PROBE_MOST = 1 / 8, 128, 1024
PROBE_WARM_UP = 16
"""First tokens of the window, which nothing precedes, and which do not count."""

STEP = 0.01
"""Retentions are rounded up to multiples of this, so that rounding of the NLL does not change them."""

TARGETS = (0.8, 0.85, 0.9, 0.95)
"""Qualities at which a fit is to choose the right retention."""

CAUTION = 4.0
"""Weight in a fit of choosing less than a context needs, against choosing more."""


def probe_window(length: int) -> tuple[int, int]:
    """The half-open range of a context of `length` tokens that stands for the whole: an eighth, from its middle."""
    size = min(length, max(PROBE_LEAST, min(PROBE_MOST, round(length * PROBE_SHARE))))
    begin = (length - size) // 2
    return begin, begin + size


def mean_nll(logprobs: Sequence[float]) -> float:
    """NLL(context) from the log-probabilities of a window's tokens, nats per token; those of the first do not count.

    Args:
        logprobs: of the tokens from the second on.
    """
    counted = logprobs[PROBE_WARM_UP:] or logprobs
    return -math.fsum(counted) / len(counted)


def predicted_quality(retention: float, b: float) -> float:
    """f(r) for a steepness b; its limit r where b is 0."""
    if abs(b) < 1e-6:
        return retention
    return math.expm1(b * retention) / math.expm1(b)


def least_retention(quality: float, b: float) -> float:
    """The r with f(r) = quality: (1/b) · ln(1 + quality · (exp(b) - 1)), the inverse of f."""
    if abs(b) < 1e-6:
        return quality
    return math.log1p(quality * math.expm1(b)) / b


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One model and method.

    Attributes:
        method: see `method_label`.
        alpha, beta: of the steepness.
        lowest, highest: NLL(context) of the contexts that it was fitted on; others count as the nearest.
        triples: number of (retention, context, quality) triples.
        error: root of the mean squared difference between chosen and needed retentions.
    """

    method: str
    alpha: float
    beta: float
    lowest: float
    highest: float
    triples: int
    error: float

    def steepness(self, nll: float) -> float:
        return self.alpha * min(max(nll, self.lowest), self.highest) + self.beta

    def choose(self, nll: float, quality: float) -> tuple[float, float]:
        """The retention for a context, in (0, 1], and the quality that is predicted for it: at least the wanted one."""
        b = self.steepness(nll)
        steps = math.ceil(least_retention(quality, b) / STEP - 1e-9)
        retention = round(min(max(steps, 1) * STEP, 1.0), 6)
        return retention, predicted_quality(retention, b)


def needed_retention(points: Sequence[tuple[float, float]], quality: float) -> float:
    """The smallest retention from which on a context's measured quality is at least `quality`.

    Args:
        points: (retention, quality) of one context, in any order, with straight lines between them and to (1, 1).
    """
    above = (1.0, 1.0)
    for r, y in sorted(points, reverse=True):
        if y < quality:
            return r + (above[0] - r) * (quality - y) / (max(above[1], quality) - y)
        above = (r, y)
    return above[0]


def fit(method: str, triples: Sequence[tuple[float, float, float]]) -> Calibration:
    """Fits alpha and beta to (retention, NLL(context), quality), where equal NLLs mean the same context.

    Minimised is the squared difference between the retention that is chosen and the one that the context needs, over
    contexts and `TARGETS`; choosing too little weighs `CAUTION` times as much as choosing too much.

    Raises:
        InvalidInputError: fewer than two contexts, or no retention below 1.
    """
    contexts: dict[float, list[tuple[float, float]]] = {}
    for r, x, y in triples:
        contexts.setdefault(x, []).append((r, y))
    if len(contexts) < 2 or all(r >= 1 for r, *_ in triples):
        raise InvalidInputError("a calibration needs at least two different contexts, and retentions below 1")
    x_N = np.array(list(contexts))
    needed_NQ = np.array([[needed_retention(points, q) for q in TARGETS] for points in contexts.values()])
    low, high = float(x_N.min()), float(x_N.max())
    place_N = (x_N - low) / (high - low)

    # The search is for b at both ends of the range of NLL(context), which have the same scale and meaning.
    def errors(b_low: np.ndarray, b_high: np.ndarray) -> np.ndarray:
        b_GN1 = (b_low[:, None] * (1 - place_N) + b_high[:, None] * place_N)[..., None]
        b_GN1 = np.where(np.abs(b_GN1) < 1e-6, 1e-6, b_GN1)
        return np.log1p(np.array(TARGETS) * np.expm1(b_GN1)) / b_GN1 - needed_NQ

    def loss(b_low: np.ndarray, b_high: np.ndarray) -> np.ndarray:
        e_GNQ = errors(b_low, b_high)
        return (np.where(e_GNQ < 0, CAUTION, 1.0) * e_GNQ**2).mean((1, 2))

    best, width = np.zeros(2), 60.0
    for _ in range(24):
        grid = np.linspace(-width, width, 25)
        b_low, b_high = (axis.ravel() for axis in np.meshgrid(best[0] + grid, best[1] + grid))
        place = int(loss(b_low, b_high).argmin())
        best, width = np.array([b_low[place], b_high[place]]), width / 2
    alpha = float((best[1] - best[0]) / (high - low))
    return Calibration(
        method=method,
        alpha=alpha,
        beta=float(best[0]) - alpha * low,
        lowest=low,
        highest=high,
        triples=len(triples),
        error=float(np.sqrt((errors(best[:1], best[1:]) ** 2).mean())),
    )


def method_label(method: BaseCompressionMethod) -> str:
    """A method's name with the options that are not its defaults: "compactor[pool=1]"."""
    options = [f"{f.name}={getattr(method, f.name)}" for f in fields(method) if getattr(method, f.name) != f.default]
    return method.name + (f"[{','.join(options)}]" if options else "")


# ---- files ----------------------------------------------------------------------------------------------------------

_SHIPPED = Path(__file__).parent / "calibrations"


def calibration_files(fingerprint: str) -> list[Path]:
    """Where calibrations of a model are looked for, first the user's, then those that come with the package."""
    name = f"{fingerprint[:16]}.json"
    return [cache_dir() / "calibrations" / name, _SHIPPED / name]


def load_calibrations(fingerprint: str) -> dict[str, Calibration]:
    """All calibrations of a model by method; the user's come first.

    Raises:
        InvalidInputError: a file cannot be used.
    """
    found: dict[str, Calibration] = {}
    for file in reversed(calibration_files(fingerprint)):
        if file.is_file():
            try:
                entries = json.loads(file.read_text(encoding="utf-8"))["methods"]
                found |= {entry["method"]: Calibration(**entry) for entry in entries}
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidInputError(f"{file} holds no calibrations: {error}; fit them again") from error
    return found


def find_calibration(model: str, fingerprint: str, method: BaseCompressionMethod) -> Calibration:
    """The calibration of a method.

    Raises:
        NoCalibrationError: there is none; the message names the command that makes it.
    """
    label, known = method_label(method), load_calibrations(fingerprint)
    if label not in known:
        have = f" (there are some for {', '.join(sorted(known))})" if known else ""
        raise NoCalibrationError(
            f'compression_ratio="auto" needs a calibration of {model} and {label}{have}; make one: '
            f'compactor-vllm calibrate --model {model} --method "{label}"'
        )
    return known[label]


def save_calibrations(
    model: str,
    fingerprint: str,
    calibrations: Sequence[Calibration],
    about: Mapping[str, Any],
    file: Path | None = None,
) -> Path:
    """Adds calibrations to those of a model, in place of older ones of the same methods; returns their file.

    Args:
        about: how they were made, for the record.
        file: None is the user's own.
    """
    file = file or calibration_files(fingerprint)[0]
    old = json.loads(file.read_text(encoding="utf-8"))["methods"] if file.is_file() else []
    entries = {entry["method"]: entry for entry in old} | {c.method: asdict(c) for c in calibrations}
    content = {"model": model, "fingerprint": fingerprint, "about": dict(about), "methods": list(entries.values())}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)
    return file
