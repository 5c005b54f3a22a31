"""The contract between training and serving. The trainer writes bundles, the service reads them, nothing else passes.

A bundle is a folder exported/NAME/VERSION/ with a manifest, ONNX graphs, reference tensors and calibration scores.
Shapes below use N rows (images, vectors or signals), K posterior samples a row, M latents, L latent dimensions, E noise
numbers a posterior sample, P a prior sample, and C×H×W numbers a row: an image's pixels, 1×1×D for a vector of D
features, C×1×T for a signal. Graphs are pure functions; every random number is an input.

    encoder.onnx      x [N,C,H,W], noise [N,K,E], dither [N,C,H,W] (only if signature.dither)
                      -> target [N,C,H,W], loc [N,L], scale [N,L], z [N,K,L], log_q [N,K]
    decoder.onnx      z [M,L] -> mean [M,C,H,W] and each of likelihood.parameters [M,C,H,W]
    density.onnx      target [N,C,H,W], z [N,K,L], each of likelihood.parameters [N,K,C,H,W]
                      -> log_p_x [N,K], log_p_x_map [N,K,C,H,W], log_p_z [N,K]
    observation.onnx  each of likelihood.parameters [M,C,H,W], noise [M,C,H,W] -> sample [M,C,H,W]
    prior.onnx        noise [M,P], choice [M] (only if prior.choice) -> z [M,L]
    backbone.onnx     x [N,C,H,W] -> features [N,F] or [N,F,h,w]
    corruption.onnx   x [N,C,H,W] -> log_odds [N,H,W]

The encoder, the decoder and the density are always there. Where there is a backbone, ``x`` below is an image in it
alone: the other graphs know its frozen features only, F of an image (C×H×W is then 1×1×F) or F at each of h×w places.
The corruption graph is of images, and never behind a backbone: for each place log p(painted over | x) − log p(not | x),
nats, of a classifier that was trained on inliers and on noise painted over parts of them (service.scores.corruption).

``x`` holds pixels in [0, 1], or a vector's or signal's numbers in their own units:
what scales them stands inside the graphs, with its log-Jacobian in the density. ``target`` is the point at which the
density is evaluated (the binarised or dequantised pixels). Noise is standard normal, dither and choice are uniform in
[0, 1); observation's noise is what likelihood.observation_noise says. log_q, log_p_x and log_p_z are float64 and in
nats; everything else is float32.

A model without a likelihood (``evidence`` "none") gives minus its reconstruction error as log_p_x, and by place as
log_p_x_map. A bijection has no loss to speak of: its decoder is the encoder's inverse, its parameter ``loc`` x itself,
log_p_x and log_p_x_map are 0, and log_q is −log|det dz/dx|, so that log p(z) − log q(z|x) is log p(x).

A score beyond the likelihoods needs fitted numbers (a mean, a covariance, latents to compare with): they lie in
detectors.npz, an array "SCORE/PARAMETER" each (service.scores.detectors). A model of tiles of larger images brings the
tails of its tiles' scores in tiles.npz, by the same keys (service.inference.tiled).

Earlier formats are this one without what the later brought: format 1 knows images, a standard normal prior and a bound
on the evidence, format 2 the scores elbo, iwae and reconstruction, format 3 no corruption graph.
"""
