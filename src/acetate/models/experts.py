"""The two experts of a base such as Wan2.2's A14B, one for high and one for low noise, and which
adapters are whose."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# expert -> the part of a source that holds it, as diffusers names the folder
PARTS = {"high": "transformer", "low": "transformer_2"}
# and as the original release does
ORIGINAL = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
AS_IT_IS = "base"  # in the place of an expert's adapters: none


def check_given(
    second: str | None, boundary: float | None, given: Mapping[str, tuple[Any, Any]]
) -> None:
    """Raises ValueError where adapters are given for the high-noise expert alone, or for two of a
    base that is one DiT.

    second, boundary: wan.transformer_2 and wan.boundary. given: setting -> its value and that of
    SETTING_2, null for none.
    """
    if second is not None and boundary is None:
        raise ValueError(
            "wan.transformer_2 is given, but no wan.boundary: the share of the steps from which on "
            "wan.transformer works. Wan2.2's T2V-A14B has 0.875, its I2V-A14B 0.9."
        )
    for name, (high, low) in given.items():
        if second is not None and high is not None and low is None:
            raise ValueError(
                f"{name}={high} is of the high-noise expert, and {name}_2=null: the low-noise "
                f"one would be without. Give its own as {name}_2=, or {name}_2={AS_IT_IS} for its "
                "weights as they are."
            )
        if second is None and low is not None:
            raise ValueError(
                f"{name}_2={low}, but wan.transformer_2=null: this base is one DiT. Leave {name}_2 "
                "out, or choose a base with two, as wan=wan22_a14b."
            )


def check_own(path: Path, facts: Mapping[str, Any], expert: str | None) -> None:
    """Raises ValueError for adapters of another expert than this one."""
    trained = facts.get("expert")
    if trained is not None and expert is not None and trained != expert:
        raise ValueError(
            f"{path} was trained on the {trained}-noise expert, and stands in the place of the "
            f"{expert}-noise one's. Give the high-noise expert's as dora= (or checkpoint=), the "
            "low-noise one's as dora_2= (or checkpoint_2=)."
        )


def check_pair(high: Mapping[str, Any], low: Mapping[str, Any]) -> None:
    """Raises ValueError where adapters of two experts were trained on other latents or noise."""
    for name in ("mean_shift", "vae_sha256", "text_encoder_sha256", "ellipse"):
        if high and low and high.get(name) != low.get(name):
            raise ValueError(
                f"{high['file']} was trained with {name} {high.get(name)}, {low['file']} with "
                f"{low.get(name)}. Give adapters of both experts that were trained alike."
            )
