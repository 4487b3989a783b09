"""Loading: from bytes in files to tensors on devices, each rank only its own part."""
