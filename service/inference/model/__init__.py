"""One bundle, loaded, answering on arrays: every number that leaves vaeserve is computed here.

Rows (images, vectors, signals) are float32 [N,C,H,W] here, whatever shape the outside sees; of images also their 8-bit
levels, uint8, which stand for the pixels level/255. They are independent, bitwise: N of them (or of latents) together
give what N single calls give, since every row sees the same noise, graphs run through
service.inference.batch_invariance, and reductions run a row at a time.

    model          the class Model: it loads a bundle, warms it up, and answers the verbs
    validation     checks of the verbs' arguments
    graph_runners  the graphs' sessions, each run so that rows stay independent
    latents        noise of the prior, and paths between latents
    scoring        scores of rows, from few forward passes
    maps           maps by place, and what they are made from

>>> model = Model.load(open_bundle("exported/digits/1"), Runtime("cpu"))  # doctest: +SKIP
>>> model.score(images).score  # doctest: +SKIP
"""

from service.inference.model.model import Encoding, Model
from service.inference.model.scoring import Scores, TileSummary, join_scores

__all__ = ["Encoding", "Model", "Scores", "TileSummary", "join_scores"]
