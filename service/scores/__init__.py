"""Score definitions, what they are computed from, and how they are fitted to held-out inliers."""
