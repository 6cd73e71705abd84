"""What routing costs in quality: facts, pairs, copies and loss, on the device's own runtime, beside dense and sink + window."""
