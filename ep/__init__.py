"""ep: expert-parallel serving of Mixture-of-Experts models on Ray."""

__version__ = "0.1.0"
