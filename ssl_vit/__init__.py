"""ssl_vit: pretrain Vision Transformers on unlabeled images by masked patch prediction."""

from ssl_vit.encoders.weights import load_encoder

__version__ = "0.1.0"

__all__ = ["__version__", "load_encoder"]
