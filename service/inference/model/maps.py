"""Maps by place, float32 [N,H,W]: how anomalous each place of a row is."""

from __future__ import annotations

import numpy as np

from service.inference.model.graph_runners import GraphRunners
from service.scores.evaluation import ForwardPasses
from service.scores.forward_pass import ForwardPass
from service.scores.maps.anomaly_map import AnomalyMap, MapInputs, MapKind

NO_ANOMALY_MAP = "nothing was fitted for it: `vaeserve calibrate` or `vaetrain calibrate` write a bundle that has it"


def at_loc(runners: GraphRunners, target: np.ndarray, loc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[x|loc] and −log p(x|loc) by place, float32 [n,C,H,W] both, of targets [n,C,H,W] and loc [n,L]."""
    decoded = runners.decode(loc)
    return decoded["mean"], -runners.joint(target, loc[:, None], decoded).log_p_x_given_z_map[:, 0]


def map_inputs(runners: GraphRunners, x: np.ndarray) -> MapInputs:
    """Compute the inputs of an anomaly map of rows x, float32 [N,C,H,W]; behind a backbone the rows are features."""
    encoded = next(runners.encode(x, 1, 0))
    return MapInputs(x, *at_loc(runners, encoded["target"], encoded["loc"]))


def map_values(
    kind: MapKind,
    runners: GraphRunners,
    anomaly_map: AnomalyMap | None,
    passes: ForwardPasses,
    forward_pass: ForwardPass,
) -> np.ndarray:
    """Compute the map of that kind of a few rows, float32 [N,H,W].

    ``forward_pass``: the pass at the score's own k samples, over which a distortion is averaged.
    """
    if kind == "corruption":
        return passes.log_odds()
    if kind == "anomaly" and anomaly_map is not None:
        return anomaly_map.values(map_inputs(runners, forward_pass.x))
    return np.stack([row.sum(axis=0) for row in forward_pass.distortion]).astype(np.float32)
