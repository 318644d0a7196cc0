"""Checks that cached latents are of the models that a run names."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from acetate.data.shards import ShardError
from acetate.formats.rgba_vae import comfyui_pair, read_rgba_vae
from acetate.models.loading import load_vae, weights_sha256
from acetate.models.plain_vae import joint_sha256
from acetate.models.rgba_vae import latents_sha256


class SameBase(Callback):
    """Compares the latents' base VAE and RGBA-VAE with the run's, before anything is trained.

    vae, rgba_vae: as the settings wan.vae and rgba_vae. Where the base is not on this machine, what
    the adapters say of theirs stands in for it. Raises ShardError that names the folder and both
    hashes. It warns of what nothing here can tell, with the way to have it compared.
    """

    def __init__(self, vae: str, rgba_vae: str | Sequence[str] | None) -> None:
        self.vae, self.rgba_vae = vae, rgba_vae

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        joint = data.manifest.get("scheme") == "joint"
        if joint and self.rgba_vae is not None:
            raise ShardError(
                f"{_folders(data)}: latents of scheme=joint, which no RGBA-VAE made, and "
                f"rgba_vae={self.rgba_vae} is given. Train experiment=dit_joint on them, or give "
                "those of acetate prep cache_latents rgba_vae=RUN."
            )
        unknown: dict[str, str] = {}
        blocks, base = 2, None
        try:
            vae = load_vae(self.vae)
            blocks, base = vae.config.num_res_blocks, weights_sha256(vae)
            self._compare(data, "base_sha256", base, f"wan.vae={self.vae}")
            del vae
        except FileNotFoundError as error:
            unknown["base_sha256"] = f"{error}"
        if joint:  # made by the base alone
            if base is not None:
                found = joint_sha256(base)
                self._compare(data, "vae_sha256", found, f"the plain VAE of wan.vae={self.vae}")
            return self._warn(data, unknown) if unknown else None
        try:
            state, facts = self._adapters(blocks)
        except FileNotFoundError as error:
            state, facts = {}, {}
            unknown["vae_sha256"] = f"{error}"
        if theirs := facts.get("base_sha256"):
            self._compare(data, "base_sha256", theirs, f"the base of rgba_vae={self.rgba_vae}")
            unknown.pop("base_sha256", None)
        name = "vae_sha256"
        if base is None and theirs is None:
            unknown.setdefault(name, "it is made of both, and the base is not known")
        elif name not in unknown:
            merge = {key[6:]: value for key, value in state.items() if key.startswith("merge.")}
            found = latents_sha256(base or theirs, facts["merge_init"], merge)
            self._compare(data, name, found, f"rgba_vae={self.rgba_vae}")
        if unknown:
            self._warn(data, unknown)

    def _adapters(self, res_blocks: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and facts of what encodes. FileNotFoundError where there is none."""
        if self.rgba_vae is None:
            raise FileNotFoundError("rgba_vae=null")
        if comfyui_pair(self.rgba_vae) is not None:
            raise FileNotFoundError(f"rgba_vae={self.rgba_vae} only decodes")
        _, state, facts = read_rgba_vae(str(self.rgba_vae), res_blocks)
        if not any(name.startswith("merge.") for name in state):
            raise FileNotFoundError(f"rgba_vae={self.rgba_vae} only decodes")
        return state, facts

    @staticmethod
    def _warn(data: Any, unknown: dict[str, str]) -> None:
        ways = {
            "base_sha256": "wan.vae=, a folder or file of this machine with the VAE that they were "
            "cached with",
            "vae_sha256": "rgba_vae=, the adapters that they were cached with",
        }
        said = "; ".join(f"{name} ({why})" for name, why in unknown.items())
        rank_zero_warn(
            f"{_folders(data)}: not compared with what the latents were cached with: {said}. "
            f"To have it compared, give {' and '.join(ways[name] for name in unknown)}."
        )

    @staticmethod
    def _compare(data: Any, name: str, found: str, setting: str) -> None:
        cached = data.manifest[name]
        if cached != found:
            raise ShardError(
                f"{_folders(data)}: the latents were cached with {name} {cached[:12]}, {setting} "
                f"has {found[:12]}. Give the wan= and rgba_vae= that they were cached with, or "
                "cache them anew."
            )


def _folders(data: Any) -> str:
    return ", ".join(map(str, data.folders))
