"""Vector quantization of trained JAX models as pure transforms over parameter pytrees."""
