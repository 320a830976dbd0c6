"""mmedit: edit multimodal models and measure honestly what the edit did."""

__version__ = "0.1.0"
