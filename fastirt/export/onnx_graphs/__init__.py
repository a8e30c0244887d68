"""ONNX files of a run: the encoder, its preprocessing, and both in fewer bits."""
