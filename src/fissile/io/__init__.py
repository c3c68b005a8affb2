"""Reading and writing checkpoints: headers, tensors, manifests, atomic publishing."""
