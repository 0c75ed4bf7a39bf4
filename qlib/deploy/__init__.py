"""What is handed over: ONNX files, the proof that they compute the same integers, and what runs where."""
