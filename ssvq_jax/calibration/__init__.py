"""What data say about weights, and weights encoded for the outputs they give on data."""

from ssvq_jax.calibration.feedback import LeafFeedback, feed_back

__all__ = ["LeafFeedback", "feed_back"]
