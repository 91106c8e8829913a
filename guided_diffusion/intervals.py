"""Intervals from posterior samples, as wide as was measured that they must be.

Samples of a prior that is not quite right lie too close together, or too far apart. By how much is
measured on images whose truth is known (--factors of tests/benchmarks/volume_samples.py and, of
k-space, kspace.py), and kept beside the weights: for each method and operator, with planes in turn
and without, the factor on the samples' standard deviation at which 90 % of the truths lie within
the interval.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from guided_diffusion.prior import Prior
from util.errors import UserError
from util.files import replacing_text
from util.remote import is_remote


def factors_path(model_path: str) -> str:
    """Where a checkpoint's factors lie: beside it, ending in .intervals.json."""
    return os.path.splitext(model_path)[0] + ".intervals.json"


def case_of(operator: str, in_turn: bool) -> str:
    """What a factor is measured for: an operator, and apart from it with planes in turn."""
    return f"{operator}, planes in turn" if in_turn else operator


def load_factor(prior: Prior, method: str, operator: str, in_turn: bool = False) -> float | None:
    """The factor on s; None where it was not measured with these weights.

    Args:
        in_turn: whether the network sees volumes along another of their axes at each step.

    Raises:
        UserError: the file is damaged.
    """
    path = factors_path(prior.config.model_path)
    if is_remote(path) or not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found["checkpoint_sha256"] != prior.digest:
            return None
        factor = found["factors"].get(method, {}).get(case_of(operator, in_turn))
        return None if factor is None else float(factor)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path}: expected factors of intervals, as tests/benchmarks/volume_samples.py "
            "--factors writes them"
        ) from None


def save_factors(
    prior: Prior, factors: Mapping[str, Mapping[str, float]], source: str, path: str
) -> None:
    """Write method → `case_of` operator → factor; others of these weights stay as they are.

    Args:
        source: what they were measured on, for people.
    """
    kept: dict[str, Any] = {"checkpoint_sha256": prior.digest, "sources": {}, "factors": {}}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if found.get("checkpoint_sha256") == prior.digest:
            kept |= {k: found.get(k, {}) for k in ("sources", "factors")}
    for method, cases in factors.items():
        kept["factors"].setdefault(method, {}).update(cases)
        kept["sources"] |= dict.fromkeys(cases, source)
    with replacing_text(path) as file:
        json.dump(kept, file, indent=2)
        file.write("\n")
