"""Linear previews of the Nano latents: rows of (R, G, B) for each channel, and a bias, in [-1, 1].

Least squares on drawn pictures; the codes are principal components, so all colour is in the first three channels.
"""

from __future__ import annotations

Factors = tuple[list[list[float]], list[float]]

_EDGES = [[0.0, 0.0, 0.0]] * 13
NANO_VIDEO: Factors = (
    [[-0.1638, -0.1498, -0.115], [0.0935, 0.0121, -0.15], [-0.0587, 0.0876, -0.0299], *_EDGES],
    [-0.4876, -0.5418, -0.4844],
)
NANO_IMAGE: Factors = (
    [[-0.1586, -0.1444, -0.1129], [0.0922, 0.0129, -0.146], [-0.0558, 0.083, -0.0279], *_EDGES],
    [-0.4825, -0.545, -0.4924],
)
