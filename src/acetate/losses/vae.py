"""The three views of an RGBA reconstruction (Wan-Alpha, section 3.2)."""

from torch import Tensor, nn

from acetate.alpha import harden, over
from acetate.losses.perceptual import FeatureMaps
from acetate.losses.terms import SobelL1, l1


class VAELoss(nn.Module):
    """Sums three views, alpha, soft and hard render: L = w1 |x_hat - x|_1 + w2 perceptual + w3
    |edge(x_hat) - edge(x)|_1.

    The alpha view is the matte as a grey picture in [-1, 1], so that all three share a range. The
    hard render shows a prediction where the target's alpha is above eps.
    """

    def __init__(
        self,
        *,
        l1_weight: float,
        perceptual_weight: float,
        edge_weight: float,
        perceptual: nn.Module | None,
        eps: float,
    ) -> None:
        super().__init__()
        if perceptual is None and perceptual_weight:
            raise ValueError(
                "loss.perceptual is null but its weight is not 0. Set "
                "loss.reconstruction.perceptual_weight=0."
            )
        self.l1_weight = l1_weight
        self.perceptual_weight = perceptual_weight
        self.edge_weight = edge_weight
        self.perceptual, self.eps, self.sobel_l1 = perceptual, eps, SobelL1()

    def edge(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Returns the edge term of a view."""
        return self.sobel_l1(x_hat, x)

    def hard_support(self, alpha_hat: Tensor, alpha: Tensor) -> Tensor:
        """Returns where the hard render of the prediction shows it, (B, 1, T, H, W) in {0, 1}."""
        return harden(alpha, self.eps)

    def views(
        self,
        rgb_hat: Tensor,
        alpha_hat: Tensor,
        rgb: Tensor,
        alpha: Tensor,
        soft: Tensor,
        hard: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns name -> (prediction, target), each (B, 3, T, H, W); soft and hard are backgrounds
        (B, 3, 1, 1, 1)."""
        support, support_hat = harden(alpha, self.eps), self.hard_support(alpha_hat, alpha)
        return {
            "alpha": ((alpha_hat * 2 - 1).expand_as(rgb), (alpha * 2 - 1).expand_as(rgb)),
            "soft": (over(rgb_hat, alpha_hat, soft), over(rgb, alpha, soft)),
            "hard": (over(rgb_hat, support_hat, hard), over(rgb, support, hard)),
        }

    def forward(
        self,
        rgb_hat: Tensor,
        alpha_hat: Tensor,
        rgb: Tensor,
        alpha: Tensor,
        soft: Tensor,
        hard: Tensor,
        feature_maps: FeatureMaps,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the total and its weighted parts, `alpha/l1`, `soft/edge`, ..., which add up to
        it."""
        parts: dict[str, Tensor] = {}
        for name, (x_hat, x) in self.views(rgb_hat, alpha_hat, rgb, alpha, soft, hard).items():
            parts[f"{name}/l1"] = self.l1_weight * l1(x_hat, x)
            if self.perceptual is not None and self.perceptual_weight:
                parts[f"{name}/perceptual"] = self.perceptual_weight * self.perceptual(
                    x_hat, x, feature_maps
                )
            if self.edge_weight:
                parts[f"{name}/edge"] = self.edge_weight * self.edge(x_hat, x)
        return sum(parts.values()), parts  # type: ignore[return-value]


class UnrenderedVAELoss(VAELoss):
    """Sums two views, alpha and straight colour, also where nothing of it is seen: the ablation
    without rendering (Wan-Alpha, section 4)."""

    def views(
        self,
        rgb_hat: Tensor,
        alpha_hat: Tensor,
        rgb: Tensor,
        alpha: Tensor,
        soft: Tensor,
        hard: Tensor,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        matte_hat, matte = ((a * 2 - 1).expand_as(rgb) for a in (alpha_hat, alpha))
        return {"alpha": (matte_hat, matte), "rgb": (rgb_hat, rgb)}
