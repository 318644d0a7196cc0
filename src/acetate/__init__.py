"""Train video models that output transparency, and use them: `RGBAPipeline`, `RGBAVAE`, `Clip`,
`over`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acetate.alpha import over
    from acetate.pipeline import RGBAVAE, Clip, RGBAPipeline

__all__ = ["RGBAVAE", "Clip", "RGBAPipeline", "over"]


def __getattr__(name: str) -> Any:
    """Imports torch only when something is asked for: the command line must answer at once."""
    if name == "over":
        from acetate.alpha import over

        return over
    if name in __all__:
        from acetate import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'acetate' has no attribute {name!r}")
