"""Somebody else's model: an adapter in front of a frozen classifier in ONNX Runtime."""
