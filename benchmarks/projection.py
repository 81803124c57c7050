"""How fast are projections fitted and applied, compared with scikit-learn?"""

from collections.abc import Iterator

import numpy as np
from sklearn.decomposition import PCA
from sklearn.random_projection import SparseRandomProjection

from benchmarks.pairs import Pair, pair
from models.projection import GramSums, fit_pca
from models.random_projection import make_random_projection

PCA_ROWS, PCA_WIDTH = 22_688, 1_280  # the test set of Fruits-360 with MobileNetV2
WIDE, NARROW, WIDE_ROWS = 62_720, 9_468, 64


def questions() -> Iterator[Pair]:
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(200, PCA_WIDTH))
    rows = (rng.normal(size=(PCA_ROWS, 200)) @ basis + rng.normal(size=(PCA_ROWS, PCA_WIDTH))).astype(np.float32)

    def ours() -> None:
        sums = GramSums(PCA_WIDTH)
        for start in range(0, PCA_ROWS, 2_048):
            sums.add(rows[start : start + 2_048])
        fit_pca(sums, 0.90)

    question = f"PCA(0.9) of {PCA_ROWS:,} × {PCA_WIDTH:,} in one process, against scikit-learn"
    yield pair(question, "rows/s", 1.0, PCA_ROWS, ours, lambda: PCA(0.9).fit(rows))

    features = rng.random((WIDE_ROWS, WIDE), np.float32)
    projection = make_random_projection(WIDE, NARROW)
    peer = SparseRandomProjection(NARROW, random_state=0).fit(features)
    question = f"random projection {WIDE:,} → {NARROW:,}, against scikit-learn"
    yield pair(
        question, "rows/s", 1.0, WIDE_ROWS, lambda: projection.transform(features), lambda: peer.transform(features)
    )
