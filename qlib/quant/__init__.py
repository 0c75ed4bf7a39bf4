"""The maths of affine quantization, and the plan that says what is quantized how."""
