"""How large a global batch is still worth its images: the gradient noise scale (McCandlish et al. 2018)."""

import math

# Estimates from a single step are all over the place: numerator and denominator are averaged over about so many.
_SAMPLES = 20


class NoiseScale:
    """The critical batch size, estimated from how much the ranks' gradients differ; appendix A.1 of the paper.

    Below it, twice the batch takes nearly half the steps; far above it, more images in a batch are wasted. It belongs to plain
    gradients; Adam's own critical batch is of the same order. One rank alone knows nothing of it.
    """

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, images: float, squared_images: float, ranks_squares: float, total_square: float) -> None:
        """Of one step: the images n_r of the ranks as sum(n_r) and sum(n_r^2), |gradient|^2 summed over ranks, and of the sum.

        Gradients are of sums over images: E|g_r|^2 = n_r^2 |G|^2 + n_r S, with the mean gradient G and the trace S of the
        covariance of one image's gradient.
        """
        if images**2 <= squared_images or not 0 < ranks_squares < math.inf:
            return  # all images on one rank, or nothing known of the ranks' gradients
        signal = (total_square - ranks_squares) / (images**2 - squared_images)
        noise = (total_square - images**2 * signal) / images
        keep = 1 - 1 / _SAMPLES
        self._signal = keep * self._signal + signal
        self._noise = keep * self._noise + noise

    def images(self) -> float | None:
        """The noise scale S / |G|^2, in images; None where the gradient cannot be told from its noise yet."""
        is_known = self._signal > 0 and self._noise > 0
        return round(self._noise / self._signal, 1) if is_known else None
