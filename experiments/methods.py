"""The methods of the vision experiments, each at its rates.

Rates are nominal: bits a weight of codes, signs and choices of kept weights, without codebooks.
Sizes are such that all methods have the same.
"""

from collections.abc import Mapping

import ssvq_jax as ssvq
from ssvq_jax.quantizers import Quantizer

# Codewords and dimension.
VECTOR = {1.125: (512, 8), 1.25: (32, 4), 1.5: (64, 4), 2.0: (256, 4), 3.0: (64, 2)}
SIGN_SPLIT = {1.125: (2, 8), 1.25: (4, 8), 1.5: (16, 8), 2.0: (256, 8), 3.0: (256, 4)}
# Codewords, dimension, N and M: those of least error before training, of what has equal bits.
MASKED = {
    1.125: (16, 8, 2, 8),
    1.25: (32, 8, 2, 8),
    1.5: (64, 8, 3, 8),
    2.0: (32, 4, 2, 4),
    3.0: (512, 4, 2, 4),
}
MASKED_SIGN_SPLIT = {1.25: (8, 8, 2, 8), 1.5: (32, 8, 2, 8), 2.0: (8, 4, 2, 4)}
# Networks and methods that are not run together: under a mask, signs lost to signs alone at every
# rate of the other network.
LEFT_OUT = (("vit_cifar", "ssvq-masked"),)
METHODS: Mapping[str, Mapping[float, Quantizer]] = {
    "uniform": {float(bits): ssvq.Uniform(bits=bits) for bits in (2, 3, 4, 8)},
    "vq": {bits: ssvq.Vector(*sizes) for bits, sizes in VECTOR.items()},
    "mvq": {bits: ssvq.Masked(k, d, keep=n, group=m) for bits, (k, d, n, m) in MASKED.items()},
    "ssvq-fixed": {
        bits: ssvq.SignSplit(*sizes, learn_signs=False) for bits, sizes in SIGN_SPLIT.items()
    },
    "ssvq": {bits: ssvq.SignSplit(*sizes) for bits, sizes in SIGN_SPLIT.items()},
    "ssvq-freeze": {bits: ssvq.SignSplit(*sizes) for bits, sizes in SIGN_SPLIT.items()},
    "ssvq-masked": {
        bits: ssvq.MaskedSignSplit(k, d, keep=n, group=m)
        for bits, (k, d, n, m) in MASKED_SIGN_SPLIT.items()
    },
}
