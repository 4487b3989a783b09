"""Loading: from bytes in files to tensors on devices, each rank its own part."""
