"""Features computed when they are asked for, offline and online by the same function.

Feast keeps a function of this kind in its registry as an importable name, because `item_log_q`
lives in a module: no code travels through the registry.
"""

import numpy as np
import pandas as pd


def item_log_q(inputs: pd.DataFrame) -> pd.DataFrame:
    """log q of an item: (count + α) / (total + α·M); an item without a count has count 0.

    Args:
        inputs: `count`, `total`, `smoothing` (α) and `num_items` (M); null where the catalogue's
            popularity is not known (before the log) or too old: then log q is null too.
    """
    count = inputs["count"].astype("float64").fillna(0.0)
    smoothing = inputs["smoothing"].astype("float64")
    total = inputs["total"].astype("float64") + smoothing * inputs["num_items"].astype("float64")
    return pd.DataFrame({"log_q": np.log((count + smoothing) / total)})
