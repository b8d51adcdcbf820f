"""Files that leave the house: the packed file, ONNX, and their verification."""
