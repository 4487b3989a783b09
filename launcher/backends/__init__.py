"""One engine a folder or file, named in `launcher.config.engines`; what several of them share is beside them."""
