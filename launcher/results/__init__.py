"""Types of results, and the figures of a record computed from them."""
