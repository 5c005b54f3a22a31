"""Verbs that a model cannot answer, with the reasons, derived from its manifest alone.

service.inference.model raises them as errors, and /v1/models shows them.
"""

from __future__ import annotations

from service.bundle.manifest import Manifest

DRAWING = ("decode", "interpolate", "sample")
"""The verbs that take ``draw``."""
SHOWING = ("decode", "reconstruct", "interpolate", "sample")
"""The verbs whose answers are rows of the same kind as the model's input."""


def refusals(manifest: Manifest) -> dict[str, str]:
    """Reasons why this model cannot answer: by verb, by ``verb.parameter`` or by ``score.estimator``.

    ``score.map`` stands for every map that is made from log p(x): all but ``score.map.corruption``.
    """
    refused: dict[str, str] = {}
    if manifest.prior.family == "none":
        refused["sample"] = "the model has no prior p(z) to draw from"
    if manifest.posterior.moments == "point":
        refused["encode.samples"] = "the encoder is deterministic: q(z|x) is a point, loc, and leaves nothing to draw"
    if "observation" not in manifest.graphs:
        reason = "there is no observation graph: the model gives E[x|z], not draws of x"
        refused |= {f"{verb}.draw": reason for verb in DRAWING}
    if not manifest.likelihood.pixelwise:
        refused["score.map"] = "the model's log p(x) does not come apart into the places of x"
    if manifest.backbone is not None:
        reason = "the model is of a frozen backbone's features, which nothing here turns back into images"
        refused |= dict.fromkeys(SHOWING, reason)
        refused |= {f"{verb}.draw": reason for verb in DRAWING}
        if manifest.backbone.kind == "vector":
            refused["score.map"] = "the backbone's features are pooled over the image: they have no places"
    if "corruption" not in manifest.graphs:
        reason = "the bundle has no corruption graph: it was exported without one"
        refused |= {"score.corruption": reason, "score.map.corruption": reason}
    if manifest.evidence == "none":
        reason = "the model has no likelihood, and so no bound on log p(x): it scores by reconstruction"
        refused |= {"score.elbo": reason, "score.iwae": reason, "score.rate": reason}
    elif manifest.posterior.moments == "point":
        refused["score.rate"] = "the encoder is deterministic: q(z|x) is a point, and has no rate"
    if "score.rate" in refused:
        refused["score.top_latents"] = refused["score.rate"]
    elif manifest.posterior.moments == "base":
        refused["score.top_latents"] = (
            "loc and scale are of the posterior's base: by dimension nothing is known of q(z|x)"
        )
    if not manifest.has_distortion:
        refused["score.reconstruction"] = "the decoder inverts the encoder: every x is reconstructed without loss"
    return refused
