"""The engines, one in each folder or file, listed in `launcher.config.engines`, and the code that several of them
share."""
