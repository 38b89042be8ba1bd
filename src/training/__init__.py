"""Loss, metrics, the Lightning module, training and evaluation."""
