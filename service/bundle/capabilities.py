"""What a model cannot answer, and why: read off its manifest, raised by service.inference.model, shown by
/v1/models."""

from __future__ import annotations

from service.bundle.manifest import Manifest

DRAWING = ("decode", "interpolate", "sample")
"""The verbs that take ``draw``."""
SHOWING = ("decode", "reconstruct", "interpolate", "sample")
"""The verbs that answer in rows as they came in."""


def refusals(manifest: Manifest) -> dict[str, str]:
    """Verb, or ``verb.parameter``, or ``score.estimator`` -> why this model cannot answer it.

    ``score.map`` is of the maps by log p(x), which are all but ``score.map.corruption``.
    """
    found: dict[str, str] = {}
    if manifest.prior.family == "none":
        found["sample"] = "the model has no prior p(z) to draw from"
    if manifest.posterior.moments == "point":
        found["encode.samples"] = "the encoder is deterministic: q(z|x) is a point, loc, and leaves nothing to draw"
    if "observation" not in manifest.graphs:
        reason = "there is no observation graph: the model gives E[x|z], not draws of x"
        found |= {f"{verb}.draw": reason for verb in DRAWING}
    if not manifest.likelihood.pixelwise:
        found["score.map"] = "the model's log p(x) does not come apart into the places of x"
    if manifest.backbone is not None:
        reason = "the model is of a frozen backbone's features, which nothing here turns back into images"
        found |= dict.fromkeys(SHOWING, reason)
        found |= {f"{verb}.draw": reason for verb in DRAWING}
        if manifest.backbone.kind == "vector":
            found["score.map"] = "the backbone's features are pooled over the image: they have no places"
    if "corruption" not in manifest.graphs:
        reason = "the bundle has no corruption graph: it was exported without one"
        found |= {"score.corruption": reason, "score.map.corruption": reason}
    if manifest.evidence == "none":
        reason = "the model has no likelihood, and so no bound on log p(x): it scores by reconstruction"
        found |= {"score.elbo": reason, "score.iwae": reason, "score.rate": reason}
    elif manifest.posterior.moments == "point":
        found["score.rate"] = "the encoder is deterministic: q(z|x) is a point, and has no rate"
    if "score.rate" in found:
        found["score.top_latents"] = found["score.rate"]
    elif manifest.posterior.moments == "base":
        found["score.top_latents"] = (
            "loc and scale are of the posterior's base: by dimension nothing is known of q(z|x)"
        )
    if not manifest.has_distortion:
        found["score.reconstruction"] = "the decoder inverts the encoder: every x is reconstructed without loss"
    return found
