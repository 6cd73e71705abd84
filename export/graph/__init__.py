"""Any module that calls ``bilevel.ops`` to one ONNX file, and changes of ONNX graphs that know nothing of a decoder."""
