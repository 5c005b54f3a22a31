"""The contract between training and serving: what a bundle is. The trainer writes it, the service reads it.

Nothing else passes between them. A bundle is a folder exported/NAME/VERSION/ with a manifest (manifest.json, see
service.bundle.manifest), manifest.sha256, which seals it, ONNX graphs, reference tensors and calibration scores.
Shapes below use N rows (images, vectors or signals), K posterior samples a row, M latents, L latent dimensions, E noise
numbers a posterior sample, P a prior sample, and C×H×W numbers a row: an image's pixels, 1×1×D for a vector of D
features, C×1×T for a signal. Graphs are pure functions; every random number is an input.

    encoder.onnx      x [N,C,H,W], noise [N,K,E] (unless E is 0), dither [N,C,H,W] (only if signature.dither)
                      -> target [N,C,H,W], loc [N,L], scale [N,L], z [N,K,L], log_q_z [N,K]
    decoder.onnx      z [M,L] -> mean [M,C,H,W] and each of likelihood.parameters [M,C,H,W]
    joint.onnx        target [N,C,H,W], z [N,K,L], each of likelihood.parameters [N,K,C,H,W]
                      -> log_p_x_given_z [N,K], log_p_x_given_z_map [N,K,C,H,W], log_p_z [N,K]
    observation.onnx  each of likelihood.parameters [M,C,H,W], noise [M,C,H,W] (unless likelihood.observation_noise
                      is "none") -> sample [M,C,H,W]
    prior.onnx        noise [M,P], choice [M] (only if prior.choice) -> z [M,L]
    backbone.onnx     x [N,C,H,W] -> features [N,F] or [N,F,h,w]
    corruption.onnx   x [N,C,H,W] -> log_odds [N,H,W]

Every bundle has the encoder, the decoder and the joint, which gives log p(x,z) in its two terms. In a bundle with a
backbone only backbone.onnx takes images: the other graphs take its frozen features, F of an image (C×H×W is then
1×1×F) or F at each of h×w places. The corruption graph takes images and never stands behind a backbone; it gives, for
each place, the log odds in nats log p(painted over | x) − log p(not | x) of a classifier that was trained on inliers
and on noise painted over parts of them (service.scores.corruption).

``x`` holds pixels in [0, 1], or a vector's or signal's numbers in their own units: the graphs scale these themselves,
with the log-Jacobian in the joint. ``target`` is the point at which p(x|z) is evaluated (the binarised or dequantised
pixels). Noise is standard normal, dither and choice are uniform in [0, 1); likelihood.observation_noise names the
distribution of observation's noise. log_q_z, log_p_x_given_z and log_p_z are float64 and in nats; everything else is
float32.

An encoder that is a function (posterior.moments "point") takes no noise: signature.noise_dim, E, is 0, and K is 1.

A model without a likelihood (likelihood.measure "none") has no log p(x|z): its joint gives negative_error [N,K] and
negative_error_map [N,K,C,H,W] in its place, minus the reconstruction error in the scores' unit, float64 and float32. A
bijection loses nothing: its decoder is the encoder's inverse, its parameter ``loc`` is x itself, log_p_x_given_z and
log_p_x_given_z_map are 0, and log_q_z is −log|det dz/dx|, so that log p(z) − log q(z|x) is log p(x).

A score beyond the likelihoods needs fitted numbers (a mean, a covariance, latents to compare with): detectors.npz holds
them as arrays named "SCORE/PARAMETER" (service.scores.detectors). A model of tiles keeps the tails of its tiles' scores
in tiles.npz, under the same keys (service.inference.tiled).

This is format 5, the only one that is read. ``vaeserve convert`` makes it of formats 3 and 4, in which the joint was
called density, log_p_x_given_z (or negative_error) log_p_x and log_q_z log_q, and in which every encoder and every
observation took noise, to multiply it by 0 where there was nothing to draw; format 3 had no corruption graph.
"""
