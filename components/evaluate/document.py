"""What marks an evaluation (`components.evaluate.steps` writes it, the gate reads it)."""

FORMAT, FORMAT_VERSION = "hrnn-meta-evaluation", 2
# One-sided confidences that the gate may ask for, and their counterparts.
CONFIDENCES = (0.8, 0.9, 0.95, 0.975, 0.99, 0.995)
