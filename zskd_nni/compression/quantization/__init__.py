"""Quantization with NNI: calibration, BatchNorm folding, saved scales, and ONNX files in integers."""
